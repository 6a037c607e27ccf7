"""The passes of the contrastive force over tiles: rows of this rank against the keys of all.

Pair weights are kept as logarithms throughout: ``log A[j, k] = -d/t - (lse_j + lse_k) / 2``
underflows for small temperatures where the force, a quotient, does not. d is symmetric, so the
column softmax is the transpose of the row softmax and one vector lse per temperature tells all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_contrastive.pairwise.chunked import chunks
from dist_contrastive.pairwise.distances import distances

_TINY = torch.finfo(torch.float32).tiny


Block = tuple[slice, slice]


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

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Row slice, key slice, distances [G, r, k] of all pairs that interact."""
        for rows, keys in self.blocks:
            for r in chunks(rows, self.chunk_size):
                for k in chunks(keys, self.chunk_size):
                    yield r, k, distances(self.rows[:, r], self.keys[:, k])

    def scaled(self, factor: Tensor) -> "Points":
        """The same points in other units; factor [G, 1, 1]."""
        return replace(self, rows=self.rows * factor, keys=self.keys * factor)

    def first(self, num_rows: int) -> "Points":
        """Only the first rows, against all keys."""
        blocks = tuple(
            (slice(r.start, min(r.stop, num_rows)), k) for r, k in self.blocks if r.start < num_rows
        )
        rows, self_key = self.rows[:, :num_rows], self.self_key[:num_rows]
        return replace(self, rows=rows, self_key=self_key, blocks=blocks)

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
    num_groups, num_rows, _ = points.rows.shape
    lse = points.rows.new_full((len(temperatures), num_groups, num_rows), -torch.inf)
    for r, k, d in points.tiles():
        if mask_diagonal:
            d = d.masked_fill(points.is_self(r, k), torch.inf)
        for i, temperature in enumerate(temperatures):
            lse[i, :, r] = torch.logaddexp(lse[i, :, r], (d / -temperature).logsumexp(-1))
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
    negative = torch.full_like(row_lse, -torch.inf)
    positive = torch.full_like(row_lse, -torch.inf)
    square = torch.full_like(row_lse, -torch.inf)
    for r, k, d in points.tiles():
        side = negative if k.stop <= points.num_negative else positive
        log_d = d.log()
        for i, log_a in _log_affinities(points, temperatures, row_lse, key_lse, r, k, d):
            side[i, :, r] = torch.logaddexp(side[i, :, r], log_a.logsumexp(-1))
            term = log_a.add_(log_d).mul_(2).logsumexp(-1)
            square[i, :, r] = torch.logaddexp(square[i, :, r], term)
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
    log_norm = torch.where(log_norm == -torch.inf, torch.inf, log_norm)[..., None]
    force = torch.zeros_like(points.rows)
    for r, k, d in points.tiles():
        is_negative = k.stop <= points.num_negative
        other = (sums.positive if is_negative else sums.negative) - log_norm
        d = d.masked_fill(d == 0, torch.inf)
        weight = torch.zeros_like(d)
        for i, log_a in _log_affinities(points, temperatures, row_lse, key_lse, r, k, d):
            weight += log_a.add_(other[i, :, r, None]).exp_()
        moved = weight @ points.keys[:, k] - weight.sum(-1, keepdim=True) * points.rows[:, r]
        force[:, r] += -moved if is_negative else moved
    return force


def _log_affinities(
    points: Points,
    temperatures: tuple[float, ...],
    row_lse: Tensor,
    key_lse: Tensor,
    r: slice,
    k: slice,
    d: Tensor,
) -> Iterator[tuple[int, Tensor]]:
    """(temperature number, log A of the tile), -inf for a point with itself."""
    is_self = points.is_self(r, k)
    for i, temperature in enumerate(temperatures):
        log_a = d / -temperature
        log_a -= row_lse[i, :, r, None] / 2
        log_a -= key_lse[i, :, None, k] / 2
        yield i, log_a.masked_fill_(is_self, -torch.inf)
