"""A reduction tile by tile, over blocks of keys; scores are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive.pairwise.keys import SUM, Block, KeySource, open_keys, recall, remember
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
        row_totals, key_totals = _totals(reduction, pairs, source, chunk_size)
        remember(ctx, pairs, source, *row_totals, *key_totals)
        ctx.reduction, ctx.chunk_size = reduction, chunk_size
        return tuple(x.to(rows.dtype) for x in (*row_totals, *key_totals))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(slopes[0].device.type, enabled=False):
            return *_gradients(ctx, slopes), None, None, None


def _totals(
    reduction: Reduction, pairs: Pairs, source: KeySource, chunk_size: int | None
) -> Results:
    row_joins, key_joins = reduction.joins
    row_totals = tuple(join.start(pairs.rows) for join in row_joins)
    courier = source.courier(*key_joins) if key_joins else None
    for block in source.blocks():
        key_totals = tuple(join.start(block.keys) for join in key_joins)
        for r, k, tile in _tiles(pairs, block, chunk_size):
            row_parts, key_parts = reduction.fast_parts(tile)
            for join, total, part in zip(row_joins, row_totals, row_parts, strict=True):
                total[r] = join.two(total[r], part.double())
            for join, total, part in zip(key_joins, key_totals, key_parts, strict=True):
                total[k] = join.two(total[k], part.double())
        if courier:
            courier.add(key_totals)
    return row_totals, tuple(courier.finish()) if courier else ()


def _gradients(ctx: Any, slopes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    pairs, source, totals = recall(ctx)
    num_rows, num_keys = map(len, ctx.reduction.joins)
    row_totals, row_slopes = totals[:num_rows], slopes[:num_rows]
    grad_rows = torch.zeros_like(pairs.rows)
    courier = source.courier(SUM) if ctx.needs_input_grad[1] else None
    for block in source.blocks(*totals[num_rows:], *slopes[num_rows:]):
        grad_keys = torch.zeros_like(block.keys) if courier else None
        for r, k, tile in _tiles(pairs, block, ctx.chunk_size):
            of_keys = tuple(x[k] for x in block.extras)
            of_tile = Totals(
                rows=tuple(x[r, None] for x in row_totals),
                row_slopes=tuple(x[r, None] for x in row_slopes),
                keys=of_keys[:num_keys],
                key_slopes=of_keys[num_keys:],
            )
            slope = ctx.reduction.slope(tile, of_tile)
            grad_rows[r].addmm_(slope, block.keys[k])
            if grad_keys is not None:
                grad_keys[k].addmm_(slope.T, pairs.rows[r])
        if courier and grad_keys is not None:
            courier.add((grad_keys,))
    return grad_rows, courier.finish()[0] if courier else None


def _tiles(
    pairs: Pairs, block: Block, chunk_size: int | None
) -> Iterator[tuple[slice, slice, Tile]]:
    """Row slice, slice of the block, tile."""
    for r in chunks(slice(0, len(pairs.rows)), chunk_size):
        for k in chunks(slice(0, len(block.keys)), chunk_size):
            tags = None if block.tags is None else block.tags[k]
            yield r, k, pairs.tile(r, block.first + k.start, block.keys[k], tags)
