"""The weight A of a pair: a function of its distance and of what its two points are near to.

    log A[j, k] = -d[j, k] / t + row[j] + key[k]

with row and key half of minus the log-sum-exps that normalise A's row j and its column k.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.pairwise.points import GENERATED, Tile
from dist_contrastive.pairwise.powers import Powers

# Exponents up to this size neither over- nor underflow in fp32, nor do sums of them.
SAFE = 60.0


@dataclass(frozen=True)
class Affinity:
    """``A = max(sqrt(softmax over each row * softmax over each column), floor)`` of -d/t.

    With `square` every point has a row and a column. Without, generated points alone have rows. In
    the softmaxes a point leaves itself out if `mask_self`.
    """

    square: bool
    mask_self: bool
    floor: float = 0.0

    def has_row(self, row_kind: int, key_kind: int) -> bool:
        """Whether A has rows of that kind."""
        return self.square or row_kind == GENERATED

    def sides(self, row_kind: int, key_kind: int) -> list[int]:
        """Which softmaxes a point of `row_kind` takes with points of `key_kind`: 0 that over its
        row, 1 that over its column, which for square A are one."""
        if self.square:
            return [0]
        return [side for side, kind in enumerate((row_kind, key_kind)) if kind == GENERATED]

    def in_softmax(self, row_kind: int, key_kind: int) -> bool:
        """Whether there are any."""
        return bool(self.sides(row_kind, key_kind))


@dataclass(frozen=True)
class Exponents:
    """What log A is made of, for this rank's points, or for those of a tile. T temperatures."""

    slope: Tensor  # [T, G, L] or [T, g]: -1/t in units of the coordinates
    row: Tensor  # [T, G, R]
    key: Tensor  # [T, G, R]
    near_row: Tensor  # [G, R], distance of the nearest point in the row's softmax, 0 for none
    near_key: Tensor  # [G, R], the same for the column
    log_weights: Tensor | None  # [G, R] logarithms of what A's columns are multiplied by
    floor: float

    @classmethod
    def of(
        cls,
        slope: Tensor,
        lse: tuple[Tensor, Tensor],
        near: tuple[Tensor, Tensor],
        weights: Tensor | None,
        floor: float,
    ) -> "Exponents":
        """From log-sum-exps and nearest distances of rows and of columns; weights [R, G]."""
        row, key = (torch.where(x == -torch.inf, x, x / -2) for x in lse)
        near_row, near_key = (x.masked_fill(x == torch.inf, 0.0) for x in near)
        log_weights = None if weights is None else weights.T.log()
        return cls(slope, row, key, near_row, near_key, log_weights, floor)

    def travelling(self) -> list[Tensor]:
        """What must be known of keys, each [R, ...]."""
        found = [self.key.movedim(-1, 0), self.near_key.T]
        return found if self.log_weights is None else [*found, self.log_weights.T]

    def of_tile(self, tile: Tile, of_keys: tuple[Tensor, ...]) -> "Exponents":
        """For the rows and keys of a tile, from what has travelled with these, each [k, ...]."""
        g, r = tile.g, tile.r
        key, near_key, *weights = (x.movedim(0, -1)[..., g, :].contiguous() for x in of_keys)
        return Exponents(
            self.slope[:, g, tile.label], self.row[:, g, r], key, self.near_row[g, r], near_key,
            weights[0] if weights else None, self.floor,
        )  # fmt: skip

    def of_coinciding(self, coinciding: Tensor) -> Tensor:
        """Of a tile, log of the sum over keys that coincide [g, r, k] with a row: [T, g, r]."""
        sums = []
        for row, key in zip(self.row, self.key, strict=True):
            log_a = self._floored(row[..., None] + key[:, None])
            sums.append(torch.where(coinciding, log_a, -torch.inf).logsumexp(-1))
        return torch.stack(sums)

    def weights(
        self, tile: Tile, powers: Powers, log_factor: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A of a tile's pairs that do not coincide, at every temperature: its number, weight
        [g, r, k] and log_unit [g, r], with ``A * exp(log_factor) = weight * exp(log_unit)``.

        Weights are at most 1; those of each row whose A is not negligible are not all tiny. They
        may be changed, and are overwritten by those of the next temperature.

        Args:
            log_factor: [T, g, r]; None: 0.
        """
        row = self.row if log_factor is None else self.row + log_factor
        if self.floor > 0:
            yield from self._one_by_one(tile, log_factor)
            return
        half = self.slope[..., None] / 2
        key = self.key if self.log_weights is None else self.key + self.log_weights
        row_seen, key_seen = row + half * self.near_row, key + half * self.near_key
        top = _finite(key_seen.amax(-1, keepdim=True))
        lowest = key_seen.masked_fill(key_seen == -torch.inf, torch.inf).amin(-1, keepdim=True)
        unit = row_seen + top
        # Also the largest of a row may be tiny here, where keys of the tile are far from it only.
        far = tile.nearest - (self.near_row + self.near_key.amin(-1, keepdim=True)) / 2
        vanishing = (-self.slope.amin(0)[:, None] * far).masked_fill(far == torch.inf, 0.0) > SAFE
        if (top - lowest > SAFE).any() or (unit > SAFE).any() or vanishing.any():
            yield from self._one_by_one(tile, log_factor)
            return
        factor = (key_seen - top).exp_()[..., None, :]
        weight = powers.scratch.like("weight", tile.d)
        x = torch.sub(tile.d, (self.near_row / 2)[..., None], out=powers.scratch.like("x", weight))
        x -= (self.near_key / 2)[..., None, :]
        for t, exponential in powers.exponentials(x, self.slope):
            yield t, torch.mul(exponential, factor[t], out=weight), unit[t]

    def _one_by_one(
        self, tile: Tile, log_factor: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`weights` by one exponential each, seen from the largest of the row."""
        for t, (slope, row, key) in enumerate(zip(self.slope, self.row, self.key, strict=True)):
            log_a = torch.addcmul(key[:, None], tile.d, slope[:, None, None]).add_(row[..., None])
            log_a = self._floored(log_a)
            if tile.coinciding is not None:
                log_a.masked_fill_(tile.coinciding, -torch.inf)
            log_unit = log_a.amax(-1)  # -inf where all weights are 0
            log_a.sub_(_finite(log_unit)[..., None])
            if log_factor is not None:
                log_unit = torch.where(log_unit == -torch.inf, log_unit, log_unit + log_factor[t])
            yield t, log_a.exp_(), log_unit

    def _floored(self, log_a: Tensor) -> Tensor:
        """In place: not below the floor, and with the keys' weights [g, r, k]."""
        if self.floor > 0:
            log_a.clamp_(min=math.log(self.floor))
        return log_a if self.log_weights is None else log_a.add_(self.log_weights[:, None])


def _finite(x: Tensor) -> Tensor:
    """With 0 in the place of -inf."""
    return x.masked_fill(x == -torch.inf, 0.0)
