"""Reductions tile by tile, over blocks of keys; scores are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.keys import SUM, Block, KeySource, open_keys, recall, remember
from dist_contrastive.pairwise.pairs import Pairs, Tile, chunks
from dist_contrastive.pairwise.reductions import Reduction, Statistics

Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # statistics of rows, of keys


def reduce(reduction: Reduction, pairs: Pairs, chunk_size: int | None) -> Results:
    """`pairwise.reduce` in memory linear in rows and keys."""
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
        of_rows, of_keys = _statistics(reduction, pairs, source, chunk_size)
        remember(ctx, pairs, source, *of_rows, *of_keys)
        ctx.reduction, ctx.chunk_size = reduction, chunk_size
        return tuple(x.to(rows.dtype) for x in (*of_rows, *of_keys))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_gradients(ctx, grads), None, None, None


def _statistics(
    reduction: Reduction, pairs: Pairs, source: KeySource, chunk_size: int | None
) -> Results:
    row_joins, key_joins = reduction.joins
    of_rows = tuple(join.start(pairs.rows) for join in row_joins)
    over_ranks = source.reduction(*key_joins) if key_joins else None
    for block in source.blocks():
        of_block = tuple(join.start(block.keys) for join in key_joins)
        for r, k, tile in _tiles(pairs, block, chunk_size):
            row_parts, key_parts = reduction.fast_parts(tile)
            for join, total, part in zip(row_joins, of_rows, row_parts, strict=True):
                total[r] = join.combine(total[r], part.double())
            for join, total, part in zip(key_joins, of_block, key_parts, strict=True):
                total[k] = join.combine(total[k], part.double())
        if over_ranks:
            over_ranks.add(of_block)
    return of_rows, tuple(over_ranks.finish()) if over_ranks else ()


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    pairs, source, saved = recall(ctx)
    num_rows, num_keys = map(len, ctx.reduction.joins)
    grad_rows = torch.zeros_like(pairs.rows)
    over_ranks = source.reduction(SUM) if ctx.needs_input_grad[1] else None
    for block in source.blocks(*saved[num_rows:], *grads[num_rows:]):
        grad_keys = torch.zeros_like(block.keys) if over_ranks else None
        for r, k, tile in _tiles(pairs, block, ctx.chunk_size):
            of_keys = tuple(x[k] for x in block.extras)
            statistics = Statistics(
                rows=tuple(x[r, None] for x in saved[:num_rows]),
                grad_rows=tuple(x[r, None] for x in grads[:num_rows]),
                keys=of_keys[:num_keys],
                grad_keys=of_keys[num_keys:],
            )
            grad_scores = ctx.reduction.grad_scores(tile, statistics)
            grad_rows[r].addmm_(grad_scores, block.keys[k])
            if grad_keys is not None:
                grad_keys[k].addmm_(grad_scores.T, pairs.rows[r])
        if over_ranks and grad_keys is not None:
            over_ranks.add((grad_keys,))
    return grad_rows, over_ranks.finish()[0] if over_ranks else None


def _tiles(
    pairs: Pairs, block: Block, chunk_size: int | None
) -> Iterator[tuple[slice, slice, Tile]]:
    """Tiles of a block, each with its slice of rows and of the block's keys."""
    for r in chunks(slice(0, len(pairs.rows)), chunk_size):
        for k in chunks(slice(0, len(block.keys)), chunk_size):
            tags = None if block.tags is None else block.tags[k]
            yield r, k, pairs.tile(r, block.first + k.start, block.keys[k], tags)
