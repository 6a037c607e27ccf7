"""Exponentials of the same numbers at several temperatures, from few exponentials.

Where a temperature divides another, as in (0.01, 0.02, 0.05, 0.1, 0.2), its exponential is a power
of the other's, and a product costs a tenth of an exponential.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_LARGEST_POWER = 64  # the relative error of a power is that of its base times the exponent


class Scratch:
    """Memory by name that is used again and again: to allocate an array costs a CPU more than to
    fill it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, name: str, x: Tensor) -> Tensor:
        """An array of the shape of x, whose numbers are whatever was left in it."""
        held = self._held.get(name)
        if held is None or held.numel() < x.numel() or held.dtype != x.dtype:
            self._held[name] = held = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        return held[: x.numel()].view(x.shape)


class Powers:
    """How ``exp(-x/t)`` at some temperatures t follow from each other.

    Args:
        temperatures: all above 0, in any order.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
        self.scratch = Scratch()
        self._of_base: dict[int, dict[int, list[int]]] = {}
        """Number of a temperature -> exponent -> numbers of the temperatures it is for."""
        for number in sorted(range(len(temperatures)), key=lambda i: -temperatures[i]):
            base, exponent = self._find_base(temperatures, number)
            self._of_base.setdefault(base, {}).setdefault(exponent, []).append(number)

    def _find_base(self, temperatures: Sequence[float], number: int) -> tuple[int, int]:
        for base in self._of_base:
            ratio = temperatures[base] / temperatures[number]
            if round(ratio) <= _LARGEST_POWER and abs(ratio - round(ratio)) < 1e-9 * ratio:
                return base, round(ratio)
        return number, 1

    def exponentials(self, x: Tensor, slope: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``exp(slope[t] * x)`` for every temperature: its number and [g, ...], which is not to be
        changed, and is overwritten by the next call.

        Args:
            x: [g, ...], overwritten. slope: [T, g], proportional to 1/t.
        """
        *_, last = self._of_base
        for base, exponents in self._of_base.items():
            factor = slope[base].reshape(-1, *[1] * (x.dim() - 1))
            out = x if base == last else self.scratch.like("power 1", x)
            known = {1: torch.mul(x, factor, out=out).exp_()}
            for exponent in sorted(exponents):
                power = self._power(known, exponent)
                for number in exponents[exponent]:
                    yield number, power

    def _power(self, known: dict[int, Tensor], exponent: int) -> Tensor:
        """x ** exponent from the powers that are known, with few products; then it is known too."""
        if exponent not in known:
            nearest = max(k for k in known if k < exponent)
            if 2 * nearest < exponent:
                nearest = exponent // 2
            factors = self._power(known, nearest), self._power(known, exponent - nearest)
            out = self.scratch.like(f"power {exponent}", known[1])
            known[exponent] = torch.mul(*factors, out=out)
        return known[exponent]
