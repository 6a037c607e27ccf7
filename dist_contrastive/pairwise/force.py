"""The passes of the contrastive force over tiles: rows of this rank against the keys of all.

Pair weights are kept as logarithms throughout: ``log A[j, k] = -d/t - (lse_j + lse_k) / 2``
underflows for small temperatures where the force, a quotient, does not. d is symmetric, so the
column softmax is the transpose of the row softmax and one vector lse per temperature tells all.
The force is a length divided by a length: in other units it is the same at temperatures in them.

Every pass is one round over the keys. Of each block those of one kind and label are put side by
side, so that a tile has keys of one kind, and none that its rows do not interact with.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dist_contrastive.pairwise import dense
from dist_contrastive.pairwise.distances import distances
from dist_contrastive.pairwise.keys import Block, open_keys
from dist_contrastive.pairwise.pairs import Pairs, chunks

NEGATIVE, POSITIVE = 0, 1  # the kinds of points: generated, data

# Tiles hold all groups and temperatures at once: 5 temperatures of 512 x 512 in fp32 are 5 MiB.
_DEFAULT_CHUNK = 512
_SMALLEST_CHUNK = 32
_KEEP_BYTES = 4 * 2**20  # less than the tiles, so that memory stays linear
_TINY = torch.finfo(torch.float32).tiny


class _Run(NamedTuple):
    """Neighbours that have one kind and label."""

    kind: int
    label: int
    span: slice

    @property
    def size(self) -> int:
        return self.span.stop - self.span.start


@dataclass(frozen=True)
class Tile:
    """Some rows and some keys, which all interact. What is computed of them stays with the tile."""

    r: slice  # which rows
    rows: Tensor  # [G, r, D]
    keys: Tensor  # [G, k, D]
    kind: int  # of the keys
    at: Tensor  # [k] int64: where the keys are in their block
    self_at: Tensor | None  # [r] int64: where in the block the rows are; None: not among the keys

    @cached_property
    def d(self) -> Tensor:
        """Distances [G, r, k]."""
        return distances(self.rows, self.keys)

    @cached_property
    def is_self(self) -> Tensor | None:
        """Where row and key are the same point: bool [r, k], None for nowhere."""
        return None if self.self_at is None else self.self_at[:, None] == self.at

    @property
    def num_pairs(self) -> int:
        """Of one group; a point with itself counts."""
        return self.rows.shape[1] * self.keys.shape[1]


class Points:
    """Rows of this rank and the keys that they interact with, in G independent groups.

    Args:
        pairs: rows [R, G, D], which are this rank's keys too, near the origin, since distances are
            rounded relative to norms; tags [R, 2] int64, kind and label, in the order of `sorting`.
        chunk_size: rows and keys of a tile; None chooses.

    Collectives: see `open_keys`.
    """

    def __init__(self, pairs: Pairs, chunk_size: int | None) -> None:
        assert pairs.tags is not None, "tags tell the kinds"
        self.rows = pairs.rows.transpose(0, 1).contiguous()  # [G, R, D]
        self.source = open_keys(pairs)
        self.pairs, self._kept = pairs, list[Tile]()
        self._chunk_size = chunk_size or max(
            _SMALLEST_CHUNK, _DEFAULT_CHUNK // math.isqrt(len(self.rows))
        )
        runs = _runs(pairs.tags)
        self.num_negative = sum(run.size for run in runs if run.kind == NEGATIVE)
        self._row_runs: dict[int, list[_Run]] = {}
        for run in runs:
            self._row_runs.setdefault(run.label, []).append(run)

    def tiles(self, *extras: Tensor) -> Iterator[tuple[Tile, tuple[Tensor, ...]]]:
        """All pairs that interact, and the extras of each tile's keys, each [k, ...].

        Args:
            extras: numbers of the rows of this rank [R, ...], which travel with them as keys.

        Collectives: those of one round over the keys, see `KeySource.blocks`.
        """
        for block in self.source.blocks(*extras):
            for tile in self._kept or self._tiles(block):
                yield tile, tuple(x[tile.at] for x in block.extras)

    def _tiles(self, block: Block) -> Iterator[Tile]:
        """Tiles of a block; where it is all keys and distances take up to 4 MiB, they are kept."""
        assert block.tags is not None
        order = sorting(block.tags)
        meet = [(keys, self._row_runs.get(keys.label, [])) for keys in _runs(block.tags[order])]
        num_pairs = sum(keys.size * rows.size for keys, row_runs in meet for rows in row_runs)
        size = num_pairs * len(self.rows) * self.rows.element_size()
        keeps = self.pairs.keys_from != "ring" and size <= _KEEP_BYTES
        for keys, row_runs in meet:
            for tile in self._tiles_of(block, order, keys, row_runs):
                if keeps:
                    self._kept.append(tile)
                yield tile

    def _tiles_of(
        self, block: Block, order: Tensor, keys: _Run, row_runs: list[_Run]
    ) -> Iterator[Tile]:
        offset = self.pairs.start - block.first
        self_at = offset + torch.arange(self.rows.shape[1], device=order.device)
        for k in chunks(keys.span, self._chunk_size) if row_runs else ():
            at = order[k]
            points = block.keys[at].transpose(0, 1).contiguous()
            for rows in row_runs:
                may_meet = rows.kind == keys.kind and 0 <= offset < len(block.keys)
                for r in chunks(rows.span, self._chunk_size):
                    among = self_at[r] if may_meet else None
                    yield Tile(r, self.rows[:, r], points, keys.kind, at, among)


def sorting(tags: Tensor) -> Tensor:
    """The order [R] that puts equal tags [R, 2] side by side, negatives before positives."""
    order = tags[:, 1].argsort(stable=True)
    return order[tags[order, 0].argsort(stable=True)]


def _runs(tags: Tensor) -> list[_Run]:
    """Of sorted tags [R, 2]."""
    if len(tags) == 0:
        return []
    starts = [0, *(1 + (tags[1:] != tags[:-1]).any(1).nonzero().flatten()).tolist()]
    spans = itertools.pairwise([*starts, len(tags)])
    values = tags[starts].tolist()
    return [_Run(k, label, slice(*s)) for (k, label), s in zip(values, spans, strict=True)]


def sum_of_distances(points: Points, with_direction: bool) -> tuple[Tensor, int, Tensor | None]:
    """Sum of d over interacting pairs [G] (fp64), how many these are, and, if asked for, the sum
    over keys of the unit vectors towards a row [G, R, D] (half the derivative of the sum over all
    pairs)."""
    total, num_pairs = points.rows.new_zeros(len(points.rows), dtype=torch.float64), 0
    direction = torch.zeros_like(points.rows) if with_direction else None
    for tile, _ in points.tiles():
        total += tile.d.sum((1, 2)).double()
        num_pairs += tile.num_pairs
        if direction is not None:
            weight = torch.where(tile.d > 0, tile.d.clamp(min=_TINY).reciprocal(), 0.0)
            direction[:, tile.r] += weight.sum(-1, keepdim=True) * tile.rows
            direction[:, tile.r] -= weight @ tile.keys
    return total, num_pairs, direction


def row_logsumexp(points: Points, slope: Tensor, mask_diagonal: bool) -> Tensor:
    """lse over keys of -d/t: [T, G, R].

    Args:
        slope: -1/t for every temperature and group, [T, G, 1, 1].
    """
    lse = points.rows.new_full((*slope.shape[:2], points.rows.shape[1]), -torch.inf)
    for tile, _ in points.tiles():
        r, d = tile.r, tile.d
        if mask_diagonal and tile.is_self is not None:
            d = d.masked_fill(tile.is_self, torch.inf)
        lse[..., r] = torch.logaddexp(lse[..., r], (slope * d).logsumexp(-1))
    return lse


@dataclass(frozen=True)
class LogSums:
    """Logarithms of sums over keys, for every temperature."""

    negative: Tensor  # [T, G, R], sum of A over negatives other than the row itself
    positive: Tensor  # [T, G, R], sum of A over positives
    square: Tensor  # [T, G] fp64, sum of (d * A)**2 over all rows and keys
    num_pairs: Tensor  # [T, G] fp64, over how many pairs that is


def log_sums(points: Points, slope: Tensor, lse: Tensor) -> LogSums:
    """The sums that the force needs, from `row_logsumexp`."""
    negative, positive = (torch.full_like(lse, -torch.inf) for _ in range(2))
    square, num_pairs = lse.new_full(lse.shape[:2], -torch.inf, dtype=torch.float64), 0
    for tile, (key_lse,) in points.tiles(lse.movedim(-1, 0)):
        log_a = _log_affinity(tile, slope, lse, key_lse)
        if tile.is_self is not None:
            log_a.masked_fill_(tile.is_self, -torch.inf)
        r, side = tile.r, negative if tile.kind == NEGATIVE else positive
        side[..., r] = torch.logaddexp(side[..., r], log_a.logsumexp(-1))
        terms = log_a.add_(tile.d.log()).mul_(2).logsumexp((-2, -1))
        square = torch.logaddexp(square, terms.double())
        num_pairs += tile.num_pairs
    return LogSums(negative, positive, square, torch.full_like(square, num_pairs).log())


def accumulate(
    points: Points, slope: Tensor, lse: Tensor, sums: LogSums, log_norm: Tensor
) -> Tensor:
    """Force on every negative, all temperatures folded into one matrix product a tile: [G, m, D].

    ``F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j``, S the row sums of A, over
    norm. Seen from x_j, keys that coincide with it add nothing; left in, their weights (the largest
    there are, and nothing in norm) would overflow before they cancel.

    Args:
        log_norm: [T, G], logarithm of sqrt(mean((d * A)**2)); -inf gives no force.
    """
    log_norm = torch.where(log_norm == -torch.inf, torch.inf, log_norm)[..., None].to(lse.dtype)
    force = torch.zeros_like(points.rows[:, : points.num_negative])
    for tile, (key_lse,) in points.tiles(lse.movedim(-1, 0)):
        r, is_negative = tile.r, tile.kind == NEGATIVE
        if r.stop > points.num_negative:
            continue
        other = (sums.positive if is_negative else sums.negative)[..., r] - log_norm
        log_a = _log_affinity(tile, slope, lse, key_lse)
        log_a.masked_fill_(tile.d == 0, -torch.inf)
        weight = log_a.add_(other[..., None]).exp_().sum(0)
        moved = weight @ tile.keys - weight.sum(-1, keepdim=True) * tile.rows
        force[:, r] += -moved if is_negative else moved
    return force


def _log_affinity(tile: Tile, slope: Tensor, lse: Tensor, key_lse: Tensor) -> Tensor:
    """log A of a tile for every temperature [T, G, r, k]; lse [T, G, R], key_lse [k, T, G]."""
    log_a = slope * tile.d
    log_a -= lse[..., tile.r, None] / 2
    log_a -= key_lse.movedim(0, -1)[..., None, :].contiguous() / 2
    return log_a


def dense_force(
    points: Points, scale: Tensor, temperatures: tuple[float, ...], mask_diagonal: bool
) -> Tensor:
    """Force on every negative by the specification, which repeats on every rank what the others
    compute: [G, m, D]. Keys are not from a ring.

    Args:
        scale: [G, 1, 1], the unit of the temperatures.
    """
    (block,) = points.source.blocks()
    assert block.tags is not None
    order = sorting(block.tags)
    kinds, labels = block.tags[order].unbind(1)
    keys, num_negative = block.keys[order].transpose(0, 1) / scale, int((kinds == NEGATIVE).sum())
    force = dense.force(keys, num_negative, temperatures, mask_diagonal, labels)
    return force[:, order.argsort()[points.pairs.start : points.pairs.start + points.num_negative]]
