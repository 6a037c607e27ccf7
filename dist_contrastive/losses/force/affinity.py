"""Weight A of a pair, a function of its distance and of the log-sum-exps of its two points.

    log A[j, k] = -d[j, k] / t + row[j] + key[k]

with row and key half of minus the log-sum-exps that normalise A's row j and its column k.

T temperatures, G groups, L labels, R points of this rank; [g, r, k] those of a tile.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dist_contrastive.losses.force.points import GENERATED, PointTile

Scope = Literal["label", "group", "global"]

# Exponents up to this size neither over- nor underflow in fp32, nor do sums of them.
SAFE = 60.0
_LARGEST_POWER = 64  # the relative error of a power is that of its base times the exponent


@dataclass(frozen=True)
class ForceRules:
    """What distinguishes the forms of the force; `spec` has their meaning."""

    temperatures: tuple[float, ...]
    square: bool
    """Whether every point has a row in A; else generated ones alone."""
    mask_self: bool
    """Whether a point is left out of its own softmaxes."""
    divide_by: Literal["lengths", "force"]
    """sqrt(mean((d A)^2)), or the root mean square of the force itself."""
    scale_scope: Scope
    norm_scope: Scope
    scale_gradient: bool
    """Whether gradients flow through the mean distance."""
    per_dimension: bool
    """Whether coordinates, rather than distances, are brought to order 1: times sqrt(D)."""
    floor: float = 0.0
    normalise_total: bool = False

    def has_row(self, row_kind: int, key_kind: int) -> bool:
        """Whether A has rows of that kind."""
        return self.square or row_kind == GENERATED

    def softmax_sides(self, row_kind: int, key_kind: int) -> list[int]:
        """Which softmaxes a point of `row_kind` takes with points of `key_kind`: 0 that over its
        row, 1 that over its column, which for square A are one."""
        if self.square:
            return [0]
        return [side for side, kind in enumerate((row_kind, key_kind)) if kind == GENERATED]

    def in_softmax(self, row_kind: int, key_kind: int) -> bool:
        """Whether there are any."""
        return bool(self.softmax_sides(row_kind, key_kind))


class Scratch:
    """Named buffers that are used again and again: to allocate an array costs a CPU more than to
    fill it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # what was asked for last, of what is held

    def like(self, name: str, x: Tensor) -> Tensor:
        """An array of the shape of x, whose numbers are whatever was left in it."""
        last = self._last.get(name)
        if last is None or last.shape != x.shape or last.dtype != x.dtype:
            self._last[name] = last = self._view(name, x)
        return last

    def _view(self, name: str, x: Tensor) -> Tensor:
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
    """Exponentials ``exp(-x/t)`` at several temperatures, from few of them.

    Where a temperature divides another, as in (0.01, 0.02, 0.05, 0.1, 0.2), its exponential is a
    power of the other's, and a product costs a tenth of an exponential: the whole loss is 1.1 to
    1.3 times as fast (M = N = 2048, D = 256).

    Args:
        temperatures: all above 0, in any order.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
        self.scratch = Scratch()
        bases: dict[int, dict[int, list[int]]] = {}  # number of a temperature -> exponent -> ...
        for number in sorted(range(len(temperatures)), key=lambda i: -temperatures[i]):
            base, exponent = _find_base(bases, temperatures, number)
            bases.setdefault(base, {}).setdefault(exponent, []).append(number)
        self._chains = {base: _chain(exponents) for base, exponents in bases.items()}

    def exponentials(self, x: Tensor, neg_inv_temperature: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``exp(neg_inv_temperature[t] * x)`` for every temperature: its number and [g, ...], which
        is not to be changed, and is overwritten by the next.

        Args:
            x: [g, ...], overwritten. neg_inv_temperature: [T, g], proportional to 1/t.
        """
        *_, last = self._chains
        for base, steps in self._chains.items():
            # The first power may take the place of x where no other base needs that.
            first = x if base == last else self.scratch.like("power 0", x)
            factor = neg_inv_temperature[base].reshape(-1, *[1] * (x.dim() - 1))
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
    """Number of a temperature that this one divides, and how often; itself, if there is none."""
    for base in bases:
        ratio = temperatures[base] / temperatures[number]
        if round(ratio) <= _LARGEST_POWER and abs(ratio - round(ratio)) < 1e-9 * ratio:
            return base, round(ratio)
    return number, 1


def _chain(wanted: dict[int, list[int]]) -> list[_Step]:
    """Products that lead to the exponents wanted. A power whose last use is a product gives its
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
    """Add an exponent as the sum of two before it, with those that this takes."""
    if exponent in sums:
        return
    nearest = max(k for k in sums if k < exponent)
    if 2 * nearest < exponent:
        nearest = exponent // 2
    for part in (nearest, exponent - nearest):
        _add_exponent(sums, part)
    sums[exponent] = nearest, exponent - nearest


@dataclass(frozen=True)
class LogAffinity:
    """Terms of log A for this rank's points, or for those of a tile."""

    neg_inv_temperature: Tensor  # [T, G, L] or [T, g]: -1/t in units of the coordinates
    row: Tensor  # [T, G, R]
    key: Tensor  # [T, G, R]
    nearest_row: Tensor  # [G, R], distance of the nearest point in the row's softmax, 0 for none
    nearest_key: Tensor  # [G, R], the same for the column
    log_weights: Tensor | None  # [G, R] logarithms of what A's columns are multiplied by
    floor: float

    @classmethod
    def from_log_sum_exps(
        cls,
        neg_inv_temperature: Tensor,
        lse: tuple[Tensor, Tensor],
        nearest: tuple[Tensor, Tensor],
        weights: Tensor | None,
        floor: float,
    ) -> "LogAffinity":
        """From log-sum-exps and nearest distances of rows and of columns; weights [R, G]."""
        row, key = (torch.where(x == -torch.inf, x, x / -2) for x in lse)
        nearest_row, nearest_key = (x.masked_fill(x == torch.inf, 0.0) for x in nearest)
        log_weights = None if weights is None else weights.T.log()
        return cls(neg_inv_temperature, row, key, nearest_row, nearest_key, log_weights, floor)

    def key_payload(self) -> list[Tensor]:
        """What other ranks must know of this rank's points as keys, each [R, ...]."""
        payload = [self.key.movedim(-1, 0), self.nearest_key.T]
        return payload if self.log_weights is None else [*payload, self.log_weights.T]

    def of_tile(self, tile: PointTile, payload: tuple[Tensor, ...]) -> "LogAffinity":
        """Terms for the rows and keys of a tile, from the payload of these, each [k, ...]."""
        g, r = tile.g, tile.r
        key, nearest_key, *weights = (x.movedim(0, -1)[..., g, :].contiguous() for x in payload)
        return LogAffinity(
            self.neg_inv_temperature[:, g, tile.label],
            self.row[:, g, r],
            key,
            self.nearest_row[g, r],
            nearest_key,
            weights[0] if weights else None,
            self.floor,
        )

    def coinciding_log_sums(self, coinciding: Tensor) -> Tensor:
        """Logarithms of the sums of A over keys that coincide [g, r, k] with a row: [T, g, r]."""
        sums = []
        for row, key in zip(self.row, self.key, strict=True):
            log_a = self._floored(row[..., None] + key[:, None])
            sums.append(torch.where(coinciding, log_a, -torch.inf).logsumexp(-1))
        return torch.stack(sums)

    def weights(
        self, tile: PointTile, powers: Powers, log_factor: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A of a tile's pairs that do not coincide, at every temperature: its number, weight
        [g, r, k] and log_shift [g, r], with ``A * exp(log_factor) = weight * exp(log_shift)``.

        Weights are at most 1; those of each row whose A is not negligible are not all tiny. They
        may be changed, and are overwritten by those of the next temperature.

        Args:
            log_factor: [T, g, r]; None: 0.
        """
        row = self.row if log_factor is None else self.row + log_factor
        half = self.neg_inv_temperature[..., None] / 2
        key = self.key if self.log_weights is None else self.key + self.log_weights
        # Seen from half of both nearest distances, one exponential serves all temperatures, which
        # makes the whole loss 1.1 to 1.3 times as fast, if none of its factors over- or underflows.
        row_term, key_term = row + half * self.nearest_row, key + half * self.nearest_key
        largest = _finite(key_term.amax(-1, keepdim=True))
        log_shift = row_term + largest
        if self.floor > 0 or self._may_underflow(tile, key_term, largest, log_shift):
            yield from self._weights_one_by_one(tile, log_factor)
            return
        factor = (key_term - largest).exp_()[..., None, :]
        weight = powers.scratch.like("weight", tile.d)
        x = powers.scratch.like("x", weight)
        torch.sub(tile.d, (self.nearest_row / 2)[..., None], out=x)
        x -= (self.nearest_key / 2)[..., None, :]
        for t, exponential in powers.exponentials(x, self.neg_inv_temperature):
            yield t, torch.mul(exponential, factor[t], out=weight), log_shift[t]

    def _may_underflow(
        self, tile: PointTile, key_term: Tensor, largest: Tensor, log_shift: Tensor
    ) -> bool:
        """Whether a factor of some weight leaves the range of fp32."""
        lowest = key_term.masked_fill(key_term == -torch.inf, torch.inf).amin(-1, keepdim=True)
        # Also the largest weight of a row may be tiny, where it is far from the tile's keys alone.
        far = tile.nearest - (self.nearest_row + self.nearest_key.amin(-1, keepdim=True)) / 2
        exponent = -self.neg_inv_temperature.amin(0)[:, None] * far
        exponent = exponent.masked_fill(far == torch.inf, 0.0)
        return any(bool((x > SAFE).any()) for x in (largest - lowest, log_shift, exponent))

    def _weights_one_by_one(
        self, tile: PointTile, log_factor: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`weights` by one exponential each, seen from the largest of the row."""
        terms = zip(self.neg_inv_temperature, self.row, self.key, strict=True)
        for t, (factor, row, key) in enumerate(terms):
            log_a = torch.addcmul(key[:, None], tile.d, factor[:, None, None]).add_(row[..., None])
            log_a = self._floored(log_a)
            if tile.coinciding is not None:
                log_a.masked_fill_(tile.coinciding, -torch.inf)
            log_shift = log_a.amax(-1)  # -inf where all weights are 0
            log_a.sub_(_finite(log_shift)[..., None])
            if log_factor is not None:
                empty = log_shift == -torch.inf
                log_shift = torch.where(empty, log_shift, log_shift + log_factor[t])
            yield t, log_a.exp_(), log_shift

    def _floored(self, log_a: Tensor) -> Tensor:
        """In place: not below the floor, and with the keys' weights [g, r, k]."""
        if self.floor > 0:
            log_a.clamp_(min=math.log(self.floor))
        return log_a if self.log_weights is None else log_a.add_(self.log_weights[:, None])


def _finite(x: Tensor) -> Tensor:
    """Numbers with 0 in the place of -inf."""
    return x.masked_fill(x == -torch.inf, 0.0)
