"""The passes of the contrastive force over tiles: rows of this rank against the keys of all.

Pair weights are kept as logarithms throughout: ``log A[j, k] = -d/t - (lse_j + lse_k) / 2``
underflows for small temperatures where the force, a quotient, does not. d is symmetric, so the
column softmax is the transpose of the row softmax and one vector lse per temperature tells all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_contrastive.pairwise.distances import distances
from dist_contrastive.pairwise.pairs import chunks

# Tiles hold all groups and temperatures at once: 5 temperatures of 512 x 512 in fp32 are 5 MiB.
_DEFAULT_CHUNK = 512
_SMALLEST_CHUNK = 32
_KEEP_BYTES = 4 * 2**20  # less than the tiles, so that memory stays linear
_TINY = torch.finfo(torch.float32).tiny


Block = tuple[slice, slice]
Tile = tuple[slice, slice, Tensor]


@dataclass(frozen=True)
class Points:
    """Rows of this rank and the keys of all ranks, in G independent groups."""

    rows: Tensor  # [G, R, D]
    keys: Tensor  # [G, K, D]: first the negatives (generated) of all ranks, then the positives
    num_negative: int  # how many of the keys are negatives
    self_key: Tensor  # [R] int64: which key each row is
    blocks: tuple[Block, ...]  # row slices and key slices that interact, keys all of one kind
    num_pairs: int  # pairs of keys that interact, in each group; a key with itself counts
    chunk_size: int | None = None
    kept: tuple[Tile, ...] | None = None  # all tiles, where they take little memory

    def keeping_tiles(self) -> "Points":
        """The same points, which compute their distances once if these take up to 4 MiB."""
        num_groups, size = self.rows.shape[0], self.rows.element_size()
        pairs = sum((r.stop - r.start) * (k.stop - k.start) for r, k in self.blocks)
        fits = pairs * num_groups * size <= _KEEP_BYTES
        return replace(self, kept=tuple(self.tiles())) if fits else self

    def tiles(self) -> Iterator[Tile]:
        """Row slice, key slice, distances [G, r, k] of all pairs that interact."""
        if self.kept is not None:
            yield from self.kept
            return
        default = max(_SMALLEST_CHUNK, _DEFAULT_CHUNK // math.isqrt(self.rows.shape[0]))
        size = self.chunk_size or default
        for rows, keys in self.blocks:
            for r in chunks(rows, size):
                for k in chunks(keys, size):
                    yield r, k, distances(self.rows[:, r], self.keys[:, k])

    def scaled(self, factor: Tensor) -> "Points":
        """The same points in other units; factor [G, 1, 1]."""
        kept = None if self.kept is None else tuple((r, k, d * factor) for r, k, d in self.kept)
        return replace(self, rows=self.rows * factor, keys=self.keys * factor, kept=kept)

    def first(self, num_rows: int) -> "Points":
        """Only the first rows, against all keys; no block may hold some of them and others."""
        blocks = tuple(block for block in self.blocks if block[0].stop <= num_rows)
        kept = self.kept and tuple(tile for tile in self.kept if tile[0].stop <= num_rows)
        rows, self_key = self.rows[:, :num_rows], self.self_key[:num_rows]
        return replace(self, rows=rows, self_key=self_key, blocks=blocks, kept=kept)

    def is_self(self, r: slice, k: slice) -> Tensor:
        """[r, k], true where row and key are the same point."""
        number = torch.arange(k.start, k.stop, device=self.keys.device)
        return self.self_key[r, None] == number


def sum_of_distances(points: Points, with_direction: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of d over interacting pairs [G] (fp64), and sum over keys of the unit vectors towards
    a row [G, R, D] (half the derivative of the sum over all pairs), if asked for."""
    total = points.rows.new_zeros(points.rows.shape[0], dtype=torch.float64)
    direction = torch.zeros_like(points.rows) if with_direction else None
    for r, k, d in points.tiles():
        total += d.sum((1, 2)).double()
        if direction is not None:
            weight = torch.where(d > 0, d.clamp(min=_TINY).reciprocal(), 0.0)
            direction[:, r] += weight.sum(-1, keepdim=True) * points.rows[:, r]
            direction[:, r] -= weight @ points.keys[:, k]
    return total, direction


def row_logsumexp(points: Points, temperatures: tuple[float, ...], mask_diagonal: bool) -> Tensor:
    """lse over keys of -d/t: [T, G, R]."""
    slope = _slopes(temperatures, points)
    lse = points.rows.new_full((len(slope), *points.rows.shape[:2]), -torch.inf)
    for r, k, d in points.tiles():
        if mask_diagonal:
            d = d.masked_fill(points.is_self(r, k), torch.inf)
        lse[..., r] = torch.logaddexp(lse[..., r], (slope * d).logsumexp(-1))
    return lse


@dataclass(frozen=True)
class LogSums:
    """Logarithms of sums over keys, for every temperature: each [T, G, R]."""

    negative: Tensor  # sum of A over negatives other than the row itself
    positive: Tensor  # sum of A over positives
    square: Tensor  # sum of (d * A)**2 over all keys

    def first(self, num_rows: int) -> "LogSums":
        """Only the first rows."""
        parts = self.negative, self.positive, self.square
        return LogSums(*(part[..., :num_rows] for part in parts))


def log_sums(
    points: Points, temperatures: tuple[float, ...], row_lse: Tensor, key_lse: Tensor
) -> LogSums:
    """The sums that the force needs, from the lse of rows [T, G, R] and keys [T, G, K]."""
    slope = _slopes(temperatures, points)
    negative, positive, square = (torch.full_like(row_lse, -torch.inf) for _ in range(3))
    for r, k, d in points.tiles():
        log_a = _log_affinity(points, slope, row_lse, key_lse, r, k, d)
        side = negative if k.stop <= points.num_negative else positive
        side[..., r] = torch.logaddexp(side[..., r], log_a.logsumexp(-1))
        terms = log_a.add_(d.log()).mul_(2).logsumexp(-1)
        square[..., r] = torch.logaddexp(square[..., r], terms)
    return LogSums(negative, positive, square)


def accumulate(
    points: Points,
    temperatures: tuple[float, ...],
    row_lse: Tensor,
    key_lse: Tensor,
    sums: LogSums,
    log_norm: Tensor,
) -> Tensor:
    """Force on every row, all temperatures folded into one matrix product a tile: [G, R, D].

    ``F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j``, S the row sums of A, over
    norm. Seen from x_j, keys that coincide with it add nothing; left in, their weights (the largest
    there are, and nothing in norm) would overflow before they cancel.

    Args:
        log_norm: [T, G], logarithm of sqrt(mean((d * A)**2)); -inf gives no force.
    """
    slope = _slopes(temperatures, points)
    log_norm = torch.where(log_norm == -torch.inf, torch.inf, log_norm)[..., None]
    force = torch.zeros_like(points.rows)
    for r, k, d in points.tiles():
        is_negative = k.stop <= points.num_negative
        other = (sums.positive if is_negative else sums.negative)[..., r] - log_norm
        d = d.masked_fill(d == 0, torch.inf)
        log_a = _log_affinity(points, slope, row_lse, key_lse, r, k, d)
        weight = log_a.add_(other[..., None]).exp_().sum(0)
        moved = weight @ points.keys[:, k] - weight.sum(-1, keepdim=True) * points.rows[:, r]
        force[:, r] += -moved if is_negative else moved
    return force


def _slopes(temperatures: tuple[float, ...], points: Points) -> Tensor:
    """-1/t for every temperature: [T, 1, 1, 1]."""
    return -1 / points.rows.new_tensor(temperatures)[:, None, None, None]


def _log_affinity(
    points: Points, slope: Tensor, row_lse: Tensor, key_lse: Tensor, r: slice, k: slice, d: Tensor
) -> Tensor:
    """log A of a tile for every temperature [T, G, r, k]; -inf for a point with itself."""
    log_a = slope * d
    log_a -= row_lse[..., r, None] / 2
    log_a -= key_lse[..., None, k] / 2
    return log_a.masked_fill_(points.is_self(r, k), -torch.inf)
