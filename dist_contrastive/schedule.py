"""Numbers that change while a run goes on, as a function of how far it is."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator

Points = tuple[tuple[float, float], ...]


def _checked(value: Any) -> Any:
    """One sentence for whatever is wrong; pydantic would give one for each kind that it tries."""
    points = value if isinstance(value, list | tuple) else [[0, value]]
    if not points or not all(isinstance(p, list | tuple) and len(p) == 2 for p in points):
        raise ValueError("give a number, or points as [[0, 0], [0.5, 1]]")
    for progress, number in points:
        if not _is_number(progress) or not 0 <= progress <= 1:
            raise ValueError(f"progress {progress} of a point must be a number from 0 to 1")
        if not _is_number(number) or not 0 <= number < math.inf:
            raise ValueError(f"{number} must be a number, 0 or more")
    if any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError("the progress of points must grow, as in [[0, 1], [0.5, 0]]")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Schedule = Annotated[float | Points, BeforeValidator(_checked)]
"""A constant, or points [progress, value] with progress from 0 to 1, as [[0, 0], [0.5, 1]]."""


def value_at(schedule: float | Sequence[tuple[float, float]], progress: float) -> float:
    """Value of a `Schedule`: linear between its points, constant before the first, after the last.

    Args:
        progress: steps done over steps of the run.
    """
    if isinstance(schedule, int | float):
        return float(schedule)
    if progress <= schedule[0][0]:
        return schedule[0][1]
    for (begin, low), (end, high) in pairwise(schedule):
        if progress <= end:
            return low + (high - low) * (progress - begin) / (end - begin)
    return schedule[-1][1]
