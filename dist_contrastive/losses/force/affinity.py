"""Weight A of a pair, a function of its distance and of the log-sum-exps of its two points.

    log A[j, k] = -d[j, k] / t + row[j] + key[k]

with row and key half of minus the log-sum-exps that normalise A's row j and its column k.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_contrastive.losses.force.points import GENERATED, Tile

# Exponents up to this size neither over- nor underflow in fp32, nor do sums of them.
SAFE = 60.0
_LARGEST_POWER = 64  # the relative error of a power is that of its base times the exponent


class Scratch:
    """Memory by name that is used again and again: to allocate an array costs a CPU more than to
    fill it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # what was asked for last, of what is held

    def like(self, name: str, x: Tensor) -> Tensor:
        """An array of the shape of x, whose numbers are whatever was left in it."""
        last = self._last.get(name)
        if last is None or last.shape != x.shape or last.dtype != x.dtype:
            self._last[name] = last = self._of_shape(name, x)
        return last

    def _of_shape(self, name: str, x: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.numel() < x.numel() or held.dtype != x.dtype:
            self._held[name] = held = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        return held[: x.numel()].view(x.shape)


class _Step(NamedTuple):
    """One product in a chain of powers of the same base."""

    exponent: int
    factors: tuple[int, int] | None  # exponents whose powers are multiplied; None: the base itself
    place: int  # number of the array that the power is written into
    numbers: list[int]  # of the temperatures it is for


class Powers:
    """How ``exp(-x/t)`` at some temperatures t follow from each other.

    Args:
        temperatures: all above 0, in any order.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
        self.scratch = Scratch()
        of_base: dict[int, dict[int, list[int]]] = {}  # number of a temperature -> exponent -> ...
        for number in sorted(range(len(temperatures)), key=lambda i: -temperatures[i]):
            base, exponent = _find_base(of_base, temperatures, number)
            of_base.setdefault(base, {}).setdefault(exponent, []).append(number)
        self._chains = {base: _chain(exponents) for base, exponents in of_base.items()}

    def exponentials(self, x: Tensor, slope: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``exp(slope[t] * x)`` for every temperature: its number and [g, ...], which is not to be
        changed, and is overwritten by the next.

        Args:
            x: [g, ...], overwritten. slope: [T, g], proportional to 1/t.
        """
        *_, last = self._chains
        for base, steps in self._chains.items():
            # The first power may take the place of x where no other base needs that.
            first = x if base == last else self.scratch.like("power 0", x)
            factor = slope[base].reshape(-1, *[1] * (x.dim() - 1))
            known: dict[int, Tensor] = {}
            for exponent, factors, place, numbers in steps:
                out = first if place == 0 else self.scratch.like(f"power {place}", x)
                if factors is None:
                    power = torch.mul(x, factor, out=out).exp_()
                else:
                    power = torch.mul(*(known[k] for k in factors), out=out)
                known[exponent] = power
                for number in numbers:
                    yield number, power


def _find_base(bases: Iterable[int], temperatures: Sequence[float], number: int) -> tuple[int, int]:
    """A temperature that this one divides, and how often: itself, if there is none."""
    for base in bases:
        ratio = temperatures[base] / temperatures[number]
        if round(ratio) <= _LARGEST_POWER and abs(ratio - round(ratio)) < 1e-9 * ratio:
            return base, round(ratio)
    return number, 1


def _chain(wanted: dict[int, list[int]]) -> list[_Step]:
    """The products that lead to the exponents wanted. A power whose last use is a product gives its
    place to that: two or three arrays are enough, and stay in the processor's cache."""
    sums: dict[int, tuple[int, int] | None] = {1: None}
    for exponent in sorted(wanted):
        _add_exponent(sums, exponent)
    places: dict[int, int] = {}
    steps = []
    for number, (exponent, factors) in enumerate(sums.items(), start=1):
        later = {k for other in list(sums.values())[number:] for k in other or ()}
        free = [k for k in factors or () if k not in later]
        places[exponent] = places[free[0]] if free else len(set(places.values()))
        steps.append(_Step(exponent, factors, places[exponent], wanted.get(exponent, [])))
    return steps


def _add_exponent(sums: dict[int, tuple[int, int] | None], exponent: int) -> None:
    """As the sum of two exponents before it, with those that this takes."""
    if exponent in sums:
        return
    nearest = max(k for k in sums if k < exponent)
    if 2 * nearest < exponent:
        nearest = exponent // 2
    for part in (nearest, exponent - nearest):
        _add_exponent(sums, part)
    sums[exponent] = nearest, exponent - nearest


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
