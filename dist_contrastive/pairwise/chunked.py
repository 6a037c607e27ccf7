"""Reductions block by block of keys, each in tiles whose scores are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys. How a block is
computed is one of two ways: in tiles of plain torch, here, or by kernels, in by_kernels.py.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.keys import SUM, KeySource, open_keys
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.reductions import Reduction, Statistics
from dist_contrastive.pairwise.saved import recall, remember
from dist_contrastive.pairwise.way import Grads, Results, Way


def reduce(reduction: Reduction, pairs: Pairs, way: Way) -> Results:
    """`pairwise.reduce` of pairs `multiplied`, in memory linear in rows and keys."""
    results = _Reduce.apply(pairs.rows, pairs.keys, pairs.bias, reduction, pairs, way)
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
        of_rows, of_keys = statistics(reduction, pairs, source, way)
        remember(ctx, pairs, source, *of_rows, *of_keys)
        ctx.reduction, ctx.way = reduction, way
        return tuple(x.to(rows.dtype) for x in (*of_rows, *of_keys))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        pairs, held, saved = recall(ctx)
        num_rows = len(ctx.reduction.joins[0])
        known = Statistics(saved[:num_rows], grads[:num_rows], saved[num_rows:], grads[num_rows:])
        with torch.autocast(grads[0].device.type, enabled=False):
            source, wanted = held or open_keys(pairs), ctx.needs_input_grad[1:3]
            sums = gradients(ctx.reduction, pairs, source, ctx.way, known, *wanted)
        bias = None
        if sums.bias is not None and pairs.bias is not None:
            bias = sums.bias.to(pairs.bias.dtype).view_as(pairs.bias)
        return sums.rows, sums.keys, bias, None, None, None


def statistics(reduction: Reduction, pairs: Pairs, source: KeySource, way: Way) -> Results:
    """Statistics of this rank's rows and of its own keys, in fp64."""
    row_joins, key_joins = reduction.joins
    of_rows = tuple(join.start(pairs.rows) for join in row_joins)
    over_ranks = source.reduction(*key_joins) if key_joins else None
    for block in source.blocks():
        of_block = tuple(join.start(block.keys) for join in key_joins)
        way.add_statistics(reduction, pairs, block, (of_rows, of_block))
        if over_ranks:
            over_ranks.add(of_block)
    return of_rows, tuple(over_ranks.finish()) if over_ranks else ()


def gradients(
    reduction: Reduction,
    pairs: Pairs,
    source: KeySource,
    way: Way,
    known: Statistics,
    by_keys: bool,
    by_bias: bool,
) -> Grads:
    """Gradients by rows, by this rank's own keys and by the bias, the latter if they are wanted.

    Args:
        known: statistics of this rank's rows and own keys, and gradients by them.
    """
    dtype, num_keys = collectives.accumulation_dtype(pairs.rows.dtype), len(known.keys)
    rows = torch.zeros_like(pairs.rows, dtype=dtype)
    sums = Grads(rows, None, rows.new_zeros((), dtype=torch.float64) if by_bias else None)
    over_ranks = source.reduction(SUM) if by_keys else None
    for block in source.blocks(*known.keys, *known.grad_keys):
        grad_keys = torch.zeros_like(block.keys, dtype=dtype) if over_ranks else None
        of_keys = {"keys": block.extras[:num_keys], "grad_keys": block.extras[num_keys:]}
        sums = sums._replace(keys=grad_keys)
        way.add_gradients(reduction, pairs, block, replace(known, **of_keys), sums)
        if over_ranks and grad_keys is not None:
            over_ranks.add((grad_keys,))
    return sums._replace(keys=over_ranks.finish()[0] if over_ranks else None)
