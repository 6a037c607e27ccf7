"""Numbers that change while a run goes on, as a function of how far it is."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator

Points = tuple[tuple[float, float], ...]


def _checked(value: Any) -> Any:
    """One sentence for whatever is wrong; pydantic would give one for each kind that it tries."""
    if not isinstance(value, list | tuple):
        return _number(value)
    if not value or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise ValueError("give a number, or points as [[0, 0], [0.5, 1]]")
    points = tuple((_number(progress), _number(number)) for progress, number in value)
    if points[-1][0] > 1 or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError("the progress of points must grow from 0 to 1, as in [[0, 1], [0.5, 0]]")
    return points


def _number(value: Any) -> float:
    """YAML reads 1e-3 as a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{value} must be a number, 0 or more")
    return number


Schedule = Annotated[float | Points, BeforeValidator(_checked)]
"""A constant, or points [progress, value] with progress from 0 to 1, as [[0, 0], [0.5, 1]]."""


def value_at(schedule: float | Sequence[tuple[float, float]], progress: float) -> float:
    """Value of a `Schedule`: linear between its points, constant before the first, after the last.

    Args:
        progress: steps done over steps of the run.
    """
    if isinstance(schedule, int | float):
        return schedule
    if progress <= schedule[0][0]:
        return schedule[0][1]
    for (begin, low), (end, high) in pairwise(schedule):
        if progress <= end:
            return low + (high - low) * (progress - begin) / (end - begin)
    return schedule[-1][1]
