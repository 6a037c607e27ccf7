"""Exponentials of the same numbers at several temperatures, from few exponentials.

Where a temperature divides another, as in (0.01, 0.02, 0.05, 0.1, 0.2), its exponential is a power
of the other's, and a product costs a tenth of an exponential.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
