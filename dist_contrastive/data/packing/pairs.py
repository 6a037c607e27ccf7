"""Images with texts or labels, listed in a table, as shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_contrastive.data.packing.image_files import check_image_field, read_image
from dist_contrastive.data.packing.keys import numbered_key
from dist_contrastive.data.packing.options import PackOptions, check_target
from dist_contrastive.data.packing.row_files import RowFile
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.errors import ConfigError, DataError

_IMAGE_NAMES = ("image", "image_path", "path", "file", "file_name", "filename", "filepath")
TEXT_NAMES = ("text", "caption", "captions", "sentence", "title", "description")
"""Columns that are taken for the text of a sample."""


def pack_pairs(
    table: Path | str,
    folder: Path | str,
    options: PackOptions | None = None,
    *,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    field: str | None = None,
) -> Packed:
    """Pack the images that a table names, with their texts; the images' bytes are copied.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm: the image, in the field of its true format
        txt   the text
        cls   the label, if a column is named for it
        json  all other columns of the row, the path too; "label": the label

    Args:
        table: .jsonl, one object a line; .csv or .tsv with a header. Paths of images are seen from
            its folder.
        image, text: columns; None finds one by its name, as "image" and "caption".
        label: column of whole numbers. With it, the text may be missing.
        field: for all images, whatever their formats.

    Raises:
        ConfigError: as `check_target`, `check_image_field`; columns that are not there, or not
            found by name.
        DataError: as `pack_samples`; a table that cannot be read, naming the line.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    rows = RowFile(Path(table))
    image = image or _by_name(rows, _IMAGE_NAMES, "image")
    if text is None and (label is None or any(x.lower() in TEXT_NAMES for x in rows.columns)):
        text = _by_name(rows, TEXT_NAMES, "text")
    for role, column in (("image", image), ("text", text), ("label", label)):
        if column is not None and column not in rows.columns:
            raise ConfigError(_no_column(rows, role, column))
    _check_rows(rows, image, text, label, options)

    def make(number: int) -> dict[str, Any]:
        row, where = rows.read(number), rows.where(number)
        name = _image_name(row, image, where)
        path = rows.path.parent / name
        found, data = read_image(path, f"image {name} of {where}", options.verify)
        sample: dict[str, Any] = {"__key__": numbered_key(number), field or found: data}
        if text is not None:
            sample["txt"] = _text(row.pop(text), text, where)
        if label is not None:
            sample["cls"] = row["label"] = _label(row.pop(label), label, where)
        return {**sample, "json": row}

    return pack_samples(options.order(len(rows)), make, folder, options, len(rows))


def _by_name(rows: RowFile, names: Sequence[str], role: str) -> str:
    found = [column for column in rows.columns if column.lower() in names]
    if len(found) != 1:
        raise ConfigError(_no_column(rows, role, None))
    return found[0]


def _no_column(rows: RowFile, role: str, column: str | None) -> str:
    problem = f"has no column {column!r}" if column else f"does not tell which column is the {role}"
    return f"{rows.path} {problem}; give --{role} with one of {', '.join(rows.columns)}"


def _check_rows(
    rows: RowFile, image: str, text: str | None, label: str | None, options: PackOptions
) -> None:
    """Every row, before the first image is read."""
    missing = []
    for number in range(len(rows)):
        row, where = rows.read(number), rows.where(number)
        if text is not None:
            _text(row.get(text), text, where)
        if label is not None:
            _label(row.get(label), label, where)
            if label != "label" and "label" in row:
                raise ConfigError(
                    f"{where} has a column 'label', which the one of --label {label} would hide; "
                    f"give --label label, or rename it"
                )
        name = _image_name(row, image, where)
        if not (rows.path.parent / name).is_file():
            missing.append(f"{where} names the image {name}, which is not there")
    if missing and not options.skip_unreadable:
        raise DataError(
            f"{missing[0]} ({len(missing)} of {len(rows)} rows do so); correct the paths, which "
            f"are seen from {rows.path.parent}, or leave the rows out with --skip-unreadable"
        )


def _image_name(row: dict[str, Any], column: str, where: str) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has {name!r} in the column {column!r}; give the path of an image")
    return name


def _text(value: Any, column: str, where: str) -> str:
    try:
        if isinstance(value, str) and value.encode() is not None:
            return value
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can write
        pass
    raise DataError(f"{where} has {value!r} in the column {column!r}; give a text")


def _label(value: Any, column: str, where: str) -> int:
    try:
        if isinstance(value, int | str):
            return int(value)
    except ValueError:
        pass
    raise DataError(f"{where} has {value!r} in the column {column!r}; give a whole number")
