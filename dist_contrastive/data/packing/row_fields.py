"""From the values of a row of a `datasets` data set to the fields of a sample."""

import datetime
import decimal
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.data.packing.columns import Columns, array_type, kind_of
from dist_contrastive.data.packing.image_files import (
    channel_axis,
    channels_first,
    image_field,
    read_image,
)
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

Fill = Callable[[dict[str, Any], Any, str], None]
"""Adds the value of a column to a sample; the text says where it is from."""

LabelOf = Callable[[Any], tuple[dict[str, Any], int | None]]
"""What json tells about a label, and its number for cls, None if it is none."""


def field_makers(
    features: Mapping[str, Any], columns: Columns, image_name: str | None, verify: str
) -> dict[str, Fill]:
    """What adds the fields of images, texts and arrays to a sample, by column.

    Args:
        image_name: field of the image; None is one by its format.
        verify: see `image_field`.

    Raises:
        ConfigError: two columns would have one field.
    """
    names = {name: _field_name(name) for name in (*columns.images, *columns.arrays)}
    if len(set(names.values())) < len(names):
        raise ConfigError(
            f"the columns {', '.join(names)} would have the fields {', '.join(names.values())}, "
            f"of which two are equal; rename one, or leave it out with --drop"
        )
    fill: dict[str, Fill] = {}
    if columns.image is not None:
        if kind_of(features[columns.image]) == "array":
            fill[columns.image] = _pixels(image_name or "png")
        else:
            fill[columns.image] = _encoded("", image_name, verify)
    for name in columns.images:
        fill[name] = _encoded(f"{names[name]}.", None, verify)
    for name in columns.arrays:
        field = "npy" if len(columns.arrays) == 1 else f"{names[name]}.npy"
        fill[name] = _array(field, array_type(features[name]))
    if columns.text is not None:
        fill[columns.text] = _text
    return fill


def label_maker(data: Any, column: str) -> LabelOf:
    """What tells about the labels of a data set.

    Args:
        data: `datasets.Dataset`.
        column: of classes, of whole or other numbers, or of texts, which become classes.
    """
    kind = kind_of(data.features[column])
    if kind == "number":
        return lambda value: ({"label": plain(value)}, None)
    if kind == "integer":
        return lambda value: ({"label": value}, -1 if value is None else value)
    if kind == "class":
        names = data.features[column].names
    else:
        names = sorted(name for name in data.unique(column) if name is not None)
    numbers = {name: number for number, name in enumerate(names)}

    def label_of(value: Any) -> tuple[dict[str, Any], int]:
        number = numbers[value] if isinstance(value, str) else value
        if number is None or number < 0:
            return {"label": None, "class": None}, -1
        name = names[number] if number < len(names) else None
        return {"label": number, "class": name}, number

    return label_of


def plain(value: Any) -> Any:
    """A value as JSON has it: times as texts of ISO 8601, decimals as texts, NaN as null."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    return value


def _field_name(column: str) -> str:
    """A column's name without what would end or change the name of a field."""
    return re.sub(r"[^a-z0-9_-]", "_", column.lower())


def _encoded(prefix: str, name: str | None, verify: str) -> Fill:
    """An image that is stored encoded: bytes, or bytes and a path, either of which may be null."""

    def fill(sample: dict[str, Any], value: Any, where: str) -> None:
        stored = value if isinstance(value, dict) else {"bytes": value, "path": None}
        if stored["bytes"] is not None:
            data = bytes(stored["bytes"])
            found = image_field(data, f"the image in {where}", verify)
        elif stored["path"]:
            what = f"the image {stored['path']} of {where}"
            found, data = read_image(Path(stored["path"]), what, verify)
        elif prefix:
            return
        else:
            raise UnreadableSample(f"there is no image in {where}")
        sample[name or prefix + found] = data

    return fill


def _pixels(name: str) -> Fill:
    """An image that is stored as an array."""

    def fill(sample: dict[str, Any], value: Any, where: str) -> None:
        pixels = _as_array(value, None, where)
        if (
            pixels.dtype.kind not in "iu"
            or pixels.min(initial=0) < 0
            or pixels.max(initial=0) > 255
        ):
            raise DataError(
                f"the image in {where} has the type {pixels.dtype} and values from {pixels.min()} "
                f"to {pixels.max()}; give whole numbers from 0 to 255, or take it as an array: "
                f"--image -"
            )
        axis = channel_axis(pixels.shape, f"the pixels in {where}")
        sample[name] = channels_first(pixels.astype(np.uint8), axis)

    return fill


def _array(name: str, dtype: Any) -> Fill:
    def fill(sample: dict[str, Any], value: Any, where: str) -> None:
        if value is not None:
            sample[name] = _as_array(value, dtype, where)

    return fill


def _as_array(value: Any, dtype: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{where} is no array of numbers ({error}); leave the column out with --drop"
        ) from error


def _text(sample: dict[str, Any], value: Any, where: str) -> None:
    if value is not None:
        sample["txt"] = value
