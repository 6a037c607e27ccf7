"""Numbers that change while a run goes on, as a function of how far it is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeFloat

Point = tuple[Annotated[float, Field(ge=0, le=1)], NonNegativeFloat]


def _ordered(points: tuple[Point, ...]) -> tuple[Point, ...]:
    if any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError("the first numbers of a schedule's points must grow: [[0, 1], [0.5, 0]]")
    return points


Schedule = (
    NonNegativeFloat | Annotated[tuple[Point, ...], Field(min_length=1), AfterValidator(_ordered)]
)
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


def is_zero(schedule: float | Sequence[tuple[float, float]]) -> bool:
    """Whether the value is 0 all the time."""
    return isinstance(schedule, int | float) and schedule == 0
