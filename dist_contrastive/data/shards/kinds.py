"""Decoded values in words: what kind they are of, and how their sizes vary."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

_MAX_NAMES = 8  # of the values in an object


def kinds(values: Sequence[Any]) -> list[str]:
    """In words what values there are, as "image uint8 3 x 180..500 x 240"; one, if all are of one
    kind.

    Args:
        values: as `decode_field` returns them.
    """
    groups: dict[str, list[Any]] = {}
    for value in values:
        groups.setdefault(_kind(value), []).append(value)
    found = []
    for kind, members in groups.items():
        share = f" ({len(members)} of {len(values)})" if len(groups) > 1 else ""
        found.append(kind + _details(members) + share)
    return found


def _kind(value: Any) -> str:
    match value:
        case Tensor():
            return "image " + str(value.dtype).removeprefix("torch.")
        case np.ndarray():
            return f"array {value.dtype}" + ("" if value.ndim else " (a single number)")
        case bool() | None:
            return "null" if value is None else "truth value"
        case int():
            return "whole number"
        case float():
            return "number"
        case str():
            return "text"
        case bytes():
            return "bytes, not decoded"
        case dict():
            return "object"
        case list():
            return "list"
    return type(value).__name__


def _details(values: Sequence[Any]) -> str:
    """The sizes of values of one kind."""
    first = values[0]
    if isinstance(first, dict):
        return f": {_names(values)}"
    if isinstance(first, str | list):
        what = "characters" if isinstance(first, str) else "values"
        return f" of {_range([len(value) for value in values])} {what}"
    if isinstance(first, int | float) and not isinstance(first, bool):
        return f" {_range(values)}"
    if isinstance(first, Tensor | np.ndarray):
        shapes = sorted({tuple(value.shape) for value in values}, key=lambda shape: len(shape))
        ranks = {len(shape) for shape in shapes}
        if len(ranks) > 1:
            return f" of {_range(sorted(ranks))} dimensions"
        return "".join(
            f"{' x' if axis else ''} {_range(sides)}"
            for axis, sides in enumerate(zip(*shapes, strict=True))
        )
    return ""


def _names(objects: Sequence[Mapping[str, Any]]) -> str:
    """The values in JSON objects: name and type, and whether all have it."""
    kinds: dict[str, Counter[str]] = {}
    for one in objects:
        for name, value in one.items():
            kinds.setdefault(name, Counter())[_type(value)] += 1
    told = [
        f"{name} {'|'.join(kinds[name])}"
        + ("" if kinds[name].total() == len(objects) else f" (in {kinds[name].total()})")
        for name in sorted(kinds)
    ]
    more = f" and {len(told) - _MAX_NAMES} more" if len(told) > _MAX_NAMES else ""
    return ", ".join(told[:_MAX_NAMES]) + more


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _range(numbers: Iterable[float]) -> str:
    numbers = list(numbers)
    low, high = min(numbers), max(numbers)
    return f"{low:,g}" if low == high else f"{low:,g}..{high:,g}"
