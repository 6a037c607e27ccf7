"""Exponentials of the same numbers at several temperatures, from few exponentials.

Where a temperature divides another, as in (0.01, 0.02, 0.05, 0.1, 0.2), its exponential is a power
of the other's, and a product costs a tenth of an exponential.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

_LARGEST_POWER = 64  # the relative error of a power is that of its base times the exponent


class Powers:
    """How ``exp(-x/t)`` at some temperatures t follow from each other.

    Args:
        temperatures: all above 0, in any order.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
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
        """``exp(slope[t] * x)`` for every temperature: its number and [g, ...]; not to be changed.

        Args:
            x: [g, ...]. slope: [T, g], proportional to 1/t.
        """
        for base, exponents in self._of_base.items():
            factor = slope[base].reshape(-1, *[1] * (x.dim() - 1))
            known = {1: (x * factor).exp_()}
            for exponent in sorted(exponents):
                power = _power(known, exponent)
                for number in exponents[exponent]:
                    yield number, power


def _power(known: dict[int, Tensor], exponent: int) -> Tensor:
    """x ** exponent from the powers that are known, with few products; it is known then, too."""
    if exponent not in known:
        nearest = max(k for k in known if k < exponent)
        if 2 * nearest < exponent:
            nearest = exponent // 2
        known[exponent] = _power(known, nearest) * _power(known, exponent - nearest)
    return known[exponent]
