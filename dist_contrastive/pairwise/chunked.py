"""A reduction tile by tile, over blocks of keys; scores are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive.pairwise.keys import SUM, Block, KeySource, open_keys
from dist_contrastive.pairwise.pairs import Pairs, Tile, chunks
from dist_contrastive.pairwise.reductions import Reduction, Totals

Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def reduce(reduction: Reduction, pairs: Pairs, chunk_size: int | None) -> Results:
    """See `pairwise.reduce`."""
    results = _Reduce.apply(pairs.rows, pairs.keys, reduction, pairs, chunk_size)
    num_rows = len(reduction.joins[0])
    return results[:num_rows], results[num_rows:]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        keys: Tensor,
        reduction: Reduction,
        pairs: Pairs,
        chunk_size: int | None,
    ) -> tuple[Tensor, ...]:
        source = open_keys(pairs)
        row_results, key_results = _totals(reduction, pairs, source, chunk_size)
        ctx.save_for_backward(*row_results, *key_results)
        ctx.reduction, ctx.pairs, ctx.source, ctx.chunk_size = reduction, pairs, source, chunk_size
        return *row_results, *key_results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        num_rows = len(ctx.reduction.joins[0])
        results = ctx.saved_tensors
        with torch.autocast(ctx.pairs.rows.device.type, enabled=False):
            grads = _gradients(
                ctx,
                (results[:num_rows], slopes[:num_rows]),
                (results[num_rows:], slopes[num_rows:]),
            )
        return *grads, None, None, None


def _totals(
    reduction: Reduction, pairs: Pairs, source: KeySource, chunk_size: int | None
) -> Results:
    row_joins, key_joins = reduction.joins
    row_results = tuple(join.start(pairs.rows) for join in row_joins)
    courier = source.courier(*key_joins) if key_joins else None
    for block in source.blocks():
        key_results = tuple(join.start(block.keys) for join in key_joins)
        for r, k, tile in _tiles(pairs, block, chunk_size):
            row_parts, key_parts = reduction.fast_parts(tile)
            for join, total, part in zip(row_joins, row_results, row_parts, strict=True):
                total[r] = join.two(total[r], part)
            for join, total, part in zip(key_joins, key_results, key_parts, strict=True):
                total[k] = join.two(total[k], part)
        if courier:
            courier.add(key_results)
    return row_results, tuple(courier.finish()) if courier else ()


def _gradients(ctx: Any, of_rows: Any, of_keys: Any) -> tuple[Tensor | None, Tensor | None]:
    pairs, (row_totals, row_slopes), (key_totals, key_slopes) = ctx.pairs, of_rows, of_keys
    grad_rows = torch.zeros_like(pairs.rows)
    courier = ctx.source.courier(SUM) if ctx.needs_input_grad[1] else None
    for block in ctx.source.blocks(*key_totals, *key_slopes):
        half = len(key_totals)
        grad_keys = torch.zeros_like(block.keys) if courier else None
        for r, k, tile in _tiles(pairs, block, ctx.chunk_size):
            totals = Totals(
                tuple(x[r, None] for x in row_totals),
                tuple(x[r, None] for x in row_slopes),
                tuple(x[k] for x in block.extras[:half]),
                tuple(x[k] for x in block.extras[half:]),
            )
            slope = ctx.reduction.slope(tile, totals)
            grad_rows[r].addmm_(slope, block.keys[k])
            if grad_keys is not None:
                grad_keys[k].addmm_(slope.T, pairs.rows[r])
        if courier:
            courier.add((grad_keys,))
    return grad_rows, courier.finish()[0] if courier else None


def _tiles(
    pairs: Pairs, block: Block, chunk_size: int | None
) -> Iterator[tuple[slice, slice, Tile]]:
    """Row slice, slice of the block, tile."""
    for r in chunks(slice(0, len(pairs.rows)), chunk_size):
        for k in chunks(slice(0, len(block.keys)), chunk_size):
            yield r, k, make_tile(pairs, block, r, k)


def make_tile(pairs: Pairs, block: Block, r: slice, k: slice) -> Tile:
    """Rows r against the keys k of a block."""
    scores = pairs.rows[r] @ block.keys[k].T
    own = pairs.own(r, block.first + k.start, block.first + k.stop)
    similar = None if block.tags is None else pairs.similar(r, block.tags[k])
    return Tile(scores, own, similar)
