"""Labels of single samples, and names of classes: found in samples, joined over data sets."""

import json
import math
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dist_contrastive.errors import DataError

MISSING_CLASS = -1
_MAX_NAME = 200  # characters
_MAX_SHOWN = 20  # names in a message
_MAX_CLASSES = 100_000  # more are no classes


def class_in_json(content: bytes) -> set[tuple[int, str]]:
    """Number and name of a sample's class from JSON with "label" and "class"; empty without."""
    if b'"class"' not in content:
        return set()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):  # whoever reads the field names it
        return set()
    if not isinstance(values, dict):
        return set()
    number, name = values.get("label"), values.get("class")
    if type(number) is not int or not isinstance(name, str):
        return set()
    return {(number, name)} if number >= 0 and len(name) <= _MAX_NAME else set()


def join_classes(named: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Names of classes by number, in its order; none where the pairs contradict each other."""
    names: dict[int, str] = {}
    for number, name in named:
        if names.setdefault(number, name) != name:
            return {}
    is_unique = len(set(names.values())) == len(names) <= _MAX_CLASSES
    return dict(sorted(names.items())) if is_unique else {}


def named_classes(names: Mapping[int, str]) -> str:
    """Numbers and names of classes in one line, of many the first."""
    shown = ", ".join(f"{number} {names[number]}" for number in list(names)[:_MAX_SHOWN])
    return shown + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")


def is_missing(value: Any, num_classes: int | None = None) -> bool:
    """Whether a text or a label is none: null, NaN, blank, or -1 as a class."""
    if isinstance(value, str):
        return not value.strip()
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (num_classes is not None and value == MISSING_CLASS)


def as_class(key: str | None, value: Any, path: str, num_classes: int) -> int:
    """Number of a class. Raises: DataError, it is none of so many."""
    # A column of whole numbers and NaN holds the whole ones as 1.0 too.
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise DataError(
            f"sample {key} has label {reprlib.repr(value)} in {path!r}; classes are whole numbers "
            f"0..{num_classes - 1}, or all texts: pack such labels, or name another field"
        )
    if not 0 <= value < num_classes:
        raise DataError(
            f"sample {key} has label {int(value)}, outside 0..{num_classes - 1}; "
            f"set data.num_classes to the number of classes"
        )
    return int(value)


def as_number(key: str | None, value: Any, path: str) -> float:
    """Continuous label. Raises: DataError, it is no finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or abs(value) > sys.float_info.max:
        raise DataError(
            f"sample {key} has label {reprlib.repr(value)} in {path!r}; continuous labels are "
            f"finite numbers: pack such labels, name another field, or set data.num_classes"
        )
    return float(value)
