"""Reductions block by block of keys, each in tiles whose scores are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys. How a block is
computed is one of two ways: in tiles of plain torch, or by kernels.
"""

from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.keys import SUM, KeySource, open_keys
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.reductions import Reduction, Statistics
from dist_contrastive.pairwise.saved import recall, remember
from dist_contrastive.pairwise.way import Grads, Results, Way


def reduce(reduction: Reduction, pairs: Pairs, operands: Pairs, way: Way) -> Results:
    """`pairwise.reduce` in memory linear in rows and keys.

    Args:
        operands: the same pairs as the way takes them; gradients are those of `pairs`.
    """
    results = _Reduce.apply(pairs.rows, pairs.keys, pairs.bias, reduction, operands, way)
    num_rows = len(reduction.joins[0])
    return results[:num_rows], results[num_rows:]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        keys: Tensor,
        bias: Tensor | None,
        reduction: Reduction,
        pairs: Pairs,
        way: Way,
    ) -> tuple[Tensor, ...]:
        source = open_keys(pairs)
        of_rows, of_keys = _statistics(reduction, pairs, source, way)
        remember(ctx, pairs, source, *of_rows, *of_keys)
        ctx.reduction, ctx.way = reduction, way
        return tuple(x.to(rows.dtype) for x in (*of_rows, *of_keys))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_gradients(ctx, grads), None, None, None


def _statistics(reduction: Reduction, pairs: Pairs, source: KeySource, way: Way) -> Results:
    row_joins, key_joins = reduction.joins
    of_rows = tuple(join.start(pairs.rows) for join in row_joins)
    over_ranks = source.reduction(*key_joins) if key_joins else None
    for block in source.blocks():
        of_block = tuple(join.start(block.keys) for join in key_joins)
        way.add_statistics(reduction, pairs, block, (of_rows, of_block))
        if over_ranks:
            over_ranks.add(of_block)
    return of_rows, tuple(over_ranks.finish()) if over_ranks else ()


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    pairs, source, saved = recall(ctx)
    num_rows, num_keys = map(len, ctx.reduction.joins)
    dtype = collectives.accumulation_dtype(pairs.rows.dtype)
    sums = Grads(
        rows=torch.zeros_like(pairs.rows, dtype=dtype),
        keys=None,
        bias=pairs.rows.new_zeros((), dtype=torch.float64) if ctx.needs_input_grad[2] else None,
    )
    over_ranks = source.reduction(SUM) if ctx.needs_input_grad[1] else None
    for block in source.blocks(*saved[num_rows:], *grads[num_rows:]):
        grad_keys = torch.zeros_like(block.keys, dtype=dtype) if over_ranks else None
        statistics = Statistics(
            rows=saved[:num_rows],
            grad_rows=grads[:num_rows],
            keys=block.extras[:num_keys],
            grad_keys=block.extras[num_keys:],
        )
        sums = sums._replace(keys=grad_keys)
        ctx.way.add_gradients(ctx.reduction, pairs, block, statistics, sums)
        if over_ranks and grad_keys is not None:
            over_ranks.add((grad_keys,))
    bias = None
    if sums.bias is not None and pairs.bias is not None:
        bias = sums.bias.to(pairs.bias.dtype).view_as(pairs.bias)
    return sums.rows, over_ranks.finish()[0] if over_ranks else None, bias
