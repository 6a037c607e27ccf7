"""Columns of a `datasets` data set, and the fields of samples that their values become."""

import datetime
import decimal
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_contrastive.data.packing.images import (
    channel_axis,
    channels_first,
    image_field,
    read_image,
)
from dist_contrastive.data.packing.pairs import TEXT_NAMES
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

NONE = "-"
"""Name of no column."""
_LABEL_NAMES = ("label", "labels", "target", "class", "y")

Kind = Literal["image", "bytes", "class", "integer", "text", "array", "number", "plain", "other"]

Fill = Callable[[dict[str, Any], Any, str], None]
"""Adds the value of a column to a sample; the text names its place in messages."""

LabelOf = Callable[[Any], tuple[dict[str, Any], int | None]]
"""Entries of a label for json, and its number for cls, None if it has none."""


@dataclass(frozen=True)
class Columns:
    """Role of every column; each has at most one."""

    image: str | None
    text: str | None
    label: str | None
    images: tuple[str, ...]  # further ones
    arrays: tuple[str, ...]
    details: tuple[str, ...]  # for json


def choose_columns(
    features: Mapping[str, Any],
    wanted: Mapping[str, str | None],
    dropped: Collection[str],
) -> Columns:
    """Assignment of the columns to fields.

    Args:
        features: of the data set.
        wanted: columns for "image", "text" and "label"; None finds one, "-" is none.
        dropped: columns that are left out.

    Raises:
        ConfigError: a column that is not there or cannot be what is wanted of it; several that
            could be; or one that no field can hold.
    """
    named = [*dropped, *(name for name in wanted.values() if name not in (None, NONE))]
    for name in named:
        if name not in features:
            raise ConfigError(f"there is no column {name!r}; give one of {', '.join(features)}")
    kinds = {name: kind_of(features[name]) for name in features if name not in dropped}
    image = _chosen(kinds, wanted, "image", ("image", "bytes", "array"), _only(kinds, "image"))
    text = _chosen(kinds, wanted, "text", ("text",), _texts(kinds))
    label = _chosen(kinds, wanted, "label", ("class", "integer", "text", "number"), _labels(kinds))
    rest = {name: kind for name, kind in kinds.items() if name not in (image, text, label)}
    for name, kind in rest.items():
        if kind in ("bytes", "other"):
            raise ConfigError(
                f"the column {name!r} holds {_type_name(features[name])}, for which there is no "
                f"field; leave it out with --drop {name}"
                + (f", or take it for the image with --image {name}" if kind == "bytes" else "")
            )
    if label is not None and (hidden := {"label", "class"} & rest.keys()):
        raise ConfigError(
            f"the column {min(hidden)!r} would be hidden by the label, which is taken from "
            f"{label!r}; give --label {min(hidden)} or --drop {min(hidden)}"
        )
    return Columns(
        image,
        text,
        label,
        images=tuple(name for name, kind in rest.items() if kind == "image"),
        arrays=tuple(name for name, kind in rest.items() if kind == "array"),
        details=tuple(name for name, kind in rest.items() if kind not in ("image", "array")),
    )


def kind_of(feature: Any) -> Kind:
    """Kind of values of a column."""
    import datasets
    import pyarrow as pa

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    kind = datasets.Features({"x": feature}).arrow_schema.field("x").type
    if isinstance(kind, pa.ExtensionType):  # arrays of a fixed shape
        kind = kind.storage_type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return "other" if hasattr(feature, "decode") else "image"  # audio and video have both too
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "number"
    if _is_list(kind) and _is_numeric(_leaf(kind)):
        return "array"
    return "other" if _holds_bytes(kind) or hasattr(feature, "decode") else "plain"


def array_type(feature: Any) -> Any:
    """NumPy type of a column of arrays."""
    import datasets
    import pyarrow as pa

    kind = datasets.Features({"x": feature}).arrow_schema.field("x").type
    return _leaf(
        kind.storage_type if isinstance(kind, pa.ExtensionType) else kind
    ).to_pandas_dtype()


def _only(kinds: Mapping[str, Kind], *wanted: Kind) -> list[str]:
    return [name for name, kind in kinds.items() if kind in wanted]


def _texts(kinds: Mapping[str, Kind]) -> list[str]:
    """Columns of texts with a usual name; if there are none, all of texts."""
    texts = _only(kinds, "text")
    return [name for name in texts if name.lower() in TEXT_NAMES] or texts


def _labels(kinds: Mapping[str, Kind]) -> list[str]:
    """Columns of classes; if there are none, whole numbers with a usual name."""
    numbers = [name for name in _only(kinds, "integer") if name.lower() in _LABEL_NAMES]
    return _only(kinds, "class") or numbers


def _chosen(
    kinds: Mapping[str, Kind],
    wanted: Mapping[str, str | None],
    role: str,
    fitting: Sequence[Kind],
    fallback: Sequence[str],
) -> str | None:
    name = wanted.get(role)
    if name == NONE:
        return None
    if name is not None:
        kind = kinds.get(name)
        if kind not in fitting:
            raise ConfigError(
                f"the column {name!r} cannot be the {role}: it is "
                f"{'dropped' if kind is None else f'of the kind {kind}'}; give a column of the "
                f"kind {' or '.join(fitting)}"
            )
        return name
    # Columns that are named for another role are no candidates.
    candidates = [name for name in fallback if name not in wanted.values()]
    if len(candidates) > 1:
        raise ConfigError(
            f"the columns {', '.join(candidates)} could each be the {role}; choose with --{role} "
            f"COLUMN, or --{role} {NONE} for none"
        )
    return candidates[0] if candidates else None


def _type_name(feature: Any) -> str:
    return type(feature).__name__ if hasattr(feature, "decode") else str(feature)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _leaf(kind: Any) -> Any:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if _is_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


# ---------------------------------------------------------------------------- fields


def field_makers(
    features: Mapping[str, Any], columns: Columns, image_name: str | None, verify: str
) -> dict[str, Fill]:
    """Functions that add the fields of images, texts and arrays to a sample, by column.

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
    """Function from the values of a column of labels to their entries in a sample.

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
    """Value for JSON: times as texts of ISO 8601, decimals as texts, NaN as null."""
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
    """Column name without signs that would end or change the name of a field."""
    return re.sub(r"[^a-z0-9_-]", "_", column.lower())


def _encoded(prefix: str, name: str | None, verify: str) -> Fill:
    """An image that is stored encoded: bytes, or bytes and a path, either of which may be null."""

    def fill(sample: dict[str, Any], value: Any, where: str) -> None:
        stored = value if isinstance(value, dict) else {"bytes": value, "path": None}
        if stored["bytes"] is not None:
            data = bytes(stored["bytes"])
            by_format = image_field(data, f"the image in {where}", verify)
        elif stored["path"]:
            what = f"the image {stored['path']} of {where}"
            by_format, data = read_image(Path(stored["path"]), what, verify)
        elif prefix:
            return
        else:
            raise UnreadableSample(f"there is no image in {where}")
        sample[name or prefix + by_format] = data

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
