"""Columns of a table, and the fields of samples that their values become."""

import datetime
import decimal
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.data.classes import is_missing
from dist_contrastive.data.packing.images import (
    channel_axis,
    channels_first,
    image_field,
    read_image,
)
from dist_contrastive.data.packing.tables import Kind, Table
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

NONE = "-"
"""Name of no column."""
_LABEL_NAMES = ("label", "labels", "target", "class", "y")

PATHS: tuple[Kind, ...] = ("text", "digits", "mixed")
"""Kinds of columns that may hold paths of images."""
_FITTING: dict[str, tuple[Kind, ...]] = {  # kinds of columns for each role
    "image": ("image", "bytes", "array", *PATHS),
    "text": ("text", "digits", "texts", "mixed"),
    "label": ("class", "integer", "digits", "text", "number", "mixed"),
}
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")  # pandas writes 3 as 3.0 beside blanks
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
IMAGE_NAMES = ("image", "image_path", "path", "file", "file_name", "filename", "filepath")
"""Names of columns of images, or of their paths."""
TEXT_NAMES = ("text", "caption", "captions", "sentence", "title", "description")
"""Names of columns of texts."""

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
    table: Table, wanted: Mapping[str, str | None], dropped: Collection[str]
) -> Columns:
    """Assignment of the columns to fields.

    Args:
        wanted: columns for "image", "text" and "label"; None finds one, "-" is none.
        dropped: columns that are left out.

    Raises:
        ConfigError: a column that is not there or cannot be what is wanted of it; several that
            could be; or one that no field can hold.
    """
    named = [*dropped, *(name for name in wanted.values() if name not in (None, NONE))]
    for name in named:
        if name not in table.kinds:
            raise ConfigError(f"there is no column {name!r}; give one of {', '.join(table.kinds)}")
    kinds = {name: kind for name, kind in table.kinds.items() if name not in dropped}
    image = _chosen(kinds, wanted, "image", _only(kinds, "image"))
    text = _chosen(kinds, wanted, "text", _texts(kinds))
    label = _chosen(kinds, wanted, "label", _labels(kinds))
    # Lists of texts have no field: they stay in json, from where one is drawn.
    used = (image, label, None if text and kinds[text] == "texts" else text)
    rest = {name: kind for name, kind in kinds.items() if name not in used}
    for name, kind in rest.items():
        if kind in ("bytes", "other"):
            raise ConfigError(
                f"the column {name!r} holds {table.type_name(name)}, for which there is no field; "
                f"leave it out with --drop {name}"
                + (f", or take it for the image with --image {name}" if kind == "bytes" else "")
            )
    refuse_hidden(label, rest)
    return Columns(
        image,
        text,
        label,
        images=tuple(name for name, kind in rest.items() if kind == "image"),
        arrays=tuple(name for name, kind in rest.items() if kind == "array"),
        details=tuple(name for name, kind in rest.items() if kind not in ("image", "array")),
    )


def refuse_hidden(label: str | None, others: Collection[str]) -> None:
    """Refuse other columns in whose place json has entries of the label. Raises: ConfigError."""
    if label is not None and (hidden := {"label", "class"} & set(others)):
        raise ConfigError(
            f"the column {min(hidden)!r} would be hidden by that of --label {label}; give --label "
            f"{min(hidden)}, rename it, or, with `pack dataset`, --drop {min(hidden)}"
        )


def _only(kinds: Mapping[str, Kind], *wanted: Kind) -> list[str]:
    return [name for name, kind in kinds.items() if kind in wanted]


def _texts(kinds: Mapping[str, Kind]) -> list[str]:
    """Columns of texts with a usual name; if there are none, all of texts."""
    texts = _only(kinds, "text", "digits", "texts")
    return [name for name in texts if name.lower() in TEXT_NAMES] or _only(kinds, "text")


def _labels(kinds: Mapping[str, Kind]) -> list[str]:
    """Columns of classes; if there are none, whole numbers with a usual name."""
    numbers = [name for name in _only(kinds, "integer", "digits") if name.lower() in _LABEL_NAMES]
    return _only(kinds, "class") or numbers


def _chosen(
    kinds: Mapping[str, Kind],
    wanted: Mapping[str, str | None],
    role: str,
    fallback: Sequence[str],
) -> str | None:
    name = wanted.get(role)
    if name == NONE:
        return None
    if name is not None:
        kind = kinds.get(name)
        if kind not in _FITTING[role]:
            raise ConfigError(
                f"the column {name!r} cannot be the {role}: it is "
                f"{'dropped' if kind is None else f'of the kind {kind}'}; give a column of the "
                f"kind {' or '.join(_FITTING[role])}"
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


# ---------------------------------------------------------------------------- fields


def field_makers(
    table: Table, columns: Columns, image_name: str | None, verify: str
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
        if table.kinds[columns.image] == "array":
            fill[columns.image] = _pixels(image_name or "png")
        else:
            fill[columns.image] = _encoded("", image_name, verify, table.folder)
    for name in columns.images:
        fill[name] = _encoded(f"{names[name]}.", None, verify, table.folder)
    for name in columns.arrays:
        field = "npy" if len(columns.arrays) == 1 else f"{names[name]}.npy"
        fill[name] = _array(field, table.array_type(name))
    return fill


def label_maker(table: Table, column: str) -> LabelOf:
    """Function from the values of a column of labels to their entries in a sample.

    Args:
        column: of classes, of numbers, which are classes too if all are whole, or of texts: those
            are numbers if all of them are written as numbers usually are, or else names of classes,
            which are numbered in their order.
    """
    kind = table.kinds[column]
    if kind == "number" and not all(map(_is_whole, _values(table, column))):
        return lambda value: ({"label": plain(value)}, None)
    if kind in ("integer", "number"):
        return lambda value: _whole(None if is_missing(value) else int(value))
    if kind == "class":
        names = table.class_names(column)
        return lambda value: _class(value, names)
    texts = {str(value) for value in _values(table, column) if not is_missing(value)}
    if all(map(_WHOLE.fullmatch, texts)):
        return lambda value: _whole(
            None if is_missing(value) else int(str(value).partition(".")[0])
        )
    if all(map(_NUMBER.fullmatch, texts)):
        return lambda value: ({"label": None if is_missing(value) else float(value)}, None)
    names = sorted(texts)
    numbers = {name: number for number, name in enumerate(names)}
    return lambda value: _class(None if is_missing(value) else numbers[str(value)], names)


def _is_whole(value: Any) -> bool:
    return is_missing(value) or float(value).is_integer()


def _values(table: Table, column: str) -> Iterator[Any]:
    for row in table.rows([column]):
        if isinstance(row, dict):
            yield row.get(column)


def _whole(number: int | None) -> tuple[dict[str, Any], int]:
    return {"label": number}, -1 if number is None else number


def _class(number: int | None, names: Sequence[str]) -> tuple[dict[str, Any], int]:
    if number is None or number < 0:
        return {"label": None, "class": None}, -1
    return {"label": number, "class": names[number] if number < len(names) else None}, number


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


def image_path(value: Any, where: str) -> str:
    """Path of an image, as a row of a table has it. Raises: UnreadableSample."""
    if isinstance(value, str) and value.strip():
        return value
    raise UnreadableSample(f"there is no image in {where}, but {value!r}; give the path of one")


def _field_name(column: str) -> str:
    """Column name without signs that would end or change the name of a field."""
    return re.sub(r"[^a-z0-9_-]", "_", column.lower())


def _encoded(prefix: str, name: str | None, verify: str, folder: Path) -> Fill:
    """An image that is stored encoded: bytes, a path, or both of which either may be null."""

    def fill(sample: dict[str, Any], value: Any, where: str) -> None:
        stored = value if isinstance(value, dict) else {"bytes": value, "path": None}
        if isinstance(stored["bytes"], bytes | bytearray | memoryview):
            data = bytes(stored["bytes"])
            by_format = image_field(data, f"the image in {where}", verify)
        elif prefix and not stored["path"]:
            return
        else:
            path = image_path(stored["path"] or stored["bytes"], where)
            by_format, data = read_image(folder / path, f"image {path} of {where}", verify)
        sample[name or prefix + by_format] = data

    return fill


def _pixels(name: str) -> Fill:
    """An image that is stored as an array."""

    def fill(sample: dict[str, Any], value: Any, where: str) -> None:
        if value is None:
            raise UnreadableSample(f"there is no image in {where}")
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
