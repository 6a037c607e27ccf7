"""Reductions block by block of keys, each in tiles whose scores are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys. How a block is
computed is one of two ways: in tiles of plain torch, or by kernels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.keys import SUM, Block, KeySource, open_keys, recall, remember
from dist_contrastive.pairwise.pairs import Pairs, Tile, chunks
from dist_contrastive.pairwise.reductions import Reduction, Statistics

Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # statistics of rows, of keys


class Grads(NamedTuple):
    """Sums that gradients are added to, in place; None where none is wanted."""

    rows: Tensor  # [b, D]
    keys: Tensor | None  # of a block [k, D]
    bias: Tensor | None  # scalar


class Way(Protocol):
    """Computation of the pairs of all rows and a block of keys."""

    def add_statistics(
        self, reduction: Reduction, pairs: Pairs, block: Block, totals: Results
    ) -> None:
        """Join the block's statistics, in place, to those of rows [b] and of its keys [k]."""

    def add_gradients(
        self,
        reduction: Reduction,
        pairs: Pairs,
        block: Block,
        statistics: Statistics,
        grads: Grads,
    ) -> None:
        """Add the block's gradients; those of its keys are 0 before."""


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
    bias = None if sums.bias is None else sums.bias.to(dtype).view_as(pairs.bias)
    return sums.rows, over_ranks.finish()[0] if over_ranks else None, bias


class Tiles:
    """A block in tiles of plain torch.

    Args:
        chunk_size: rows and keys of a tile; None chooses.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self._chunk_size = chunk_size

    def add_statistics(
        self, reduction: Reduction, pairs: Pairs, block: Block, totals: Results
    ) -> None:
        """Those of one tile after the other."""
        for r, k, tile in self._tiles(pairs, block):
            parts = reduction.fast_parts(tile)
            for where, *of_kind in zip((r, k), reduction.joins, totals, parts, strict=True):
                for join, total, part in zip(*of_kind, strict=True):
                    total[where] = join.combine(total[where], part.double())

    def add_gradients(
        self,
        reduction: Reduction,
        pairs: Pairs,
        block: Block,
        statistics: Statistics,
        grads: Grads,
    ) -> None:
        """Scores again, their gradients, and two products."""
        for r, k, tile in self._tiles(pairs, block):
            grad_scores = reduction.grad_scores(tile, statistics.of(r, k))
            grads.rows[r].addmm_(grad_scores, block.keys[k])
            if grads.keys is not None:
                grads.keys[k].addmm_(grad_scores.T, pairs.rows[r])
            if grads.bias is not None:
                grads.bias.add_(grad_scores.sum())

    def _tiles(self, pairs: Pairs, block: Block) -> Iterator[tuple[slice, slice, Tile]]:
        """Tiles of a block, each with its slice of rows and of the block's keys."""
        for r in chunks(slice(0, len(pairs.rows)), self._chunk_size):
            for k in chunks(slice(0, len(block.keys)), self._chunk_size):
                tags = None if block.tags is None else block.tags[k]
                yield r, k, pairs.tile(r, block.first + k.start, block.keys[k], tags)
