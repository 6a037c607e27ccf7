"""Images with texts or labels, listed in a table, as shards; tables of text read row by row."""

import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dist_contrastive.data.packing.images import check_image_field, read_image
from dist_contrastive.data.packing.options import PackOptions, check_target, numbered_key
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.errors import ConfigError, DataError

_IMAGE_NAMES = ("image", "image_path", "path", "file", "file_name", "filename", "filepath")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
TEXT_NAMES = ("text", "caption", "captions", "sentence", "title", "description")
"""Names of columns of texts."""


class RowFile:
    """Rows of a table, in about 20 bytes of memory a row. Every row is parsed once to begin with.

    Attributes:
        path: of the file.
        columns: their names; of .jsonl, all that any row has.

    Raises:
        DataError: no such file, another kind of file, no rows, or a line that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kind = path.suffix.lower()
        self._starts, self._stops, self._lines = array("Q"), array("Q"), array("L")
        names: dict[str, None] = {}
        if self._kind not in (*_JSON_LINES, *_DELIMITERS):
            raise DataError(f"the table {path} is of no known kind; give .jsonl, .csv or .tsv")
        try:
            with path.open("rb") as file:
                self._header = [] if self._kind in _JSON_LINES else self._read_header(file)
                for row in self._scan(file):
                    names.update(dict.fromkeys(row))
        except OSError as error:
            raise DataError(f"the table {path} cannot be read ({error.strerror})") from error
        self.columns = tuple(names) or tuple(self._header)
        if not self._starts:
            raise DataError(f"the table {path} has 0 rows; give 1 or more")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, number: int) -> str:
        """Line of a row, for messages."""
        return f"line {self._lines[number]} of {self.path}"

    def read(self, number: int) -> dict[str, Any]:
        """Values of a row by column; of .csv and .tsv all are texts. Any thread may call it."""
        start, stop = self._starts[number], self._stops[number]
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start).decode("utf-8-sig" if start == 0 else "utf-8")
        if self._kind in _JSON_LINES:
            return json.loads(text)
        cells = next(self._cells(io.StringIO(text, newline="")))
        return dict(zip(self._header, cells, strict=True))

    def _read_header(self, file: BinaryIO) -> list[str]:
        header: list[str] = next((cells for _, _, _, cells in self._records(file)), [])
        file.seek(0)
        if len(set(header)) < len(header) or not all(header):
            raise DataError(
                f"the columns of {self.path} are named {', '.join(header)}; give every column a "
                f"name of its own"
            )
        return header

    def _scan(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        records = self._objects(file) if self._kind in _JSON_LINES else self._rows(file)
        for start, stop, line, row in records:
            self._starts.append(start)
            self._stops.append(stop)
            self._lines.append(line)
            yield row

    def _objects(self, file: BinaryIO) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
        stop = 0
        for line, data in enumerate(file, start=1):
            start, stop = stop, stop + len(data)
            if not data.strip():
                continue
            try:
                row = json.loads(data.decode("utf-8-sig" if start == 0 else "utf-8"))
            except ValueError as error:
                raise DataError(
                    f"line {line} of {self.path} is no JSON ({error}); write one object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"line {line} of {self.path} is no object; write one a line")
            yield start, stop, line, row

    def _rows(self, file: BinaryIO) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
        records = self._records(file)
        next(records, None)
        for start, stop, line, cells in records:
            if len(cells) != len(self._header):
                raise DataError(
                    f"line {line} of {self.path} has {len(cells)} cells but the header has "
                    f"{len(self._header)}; give every row one for each column"
                )
            yield start, stop, line, dict(zip(self._header, cells, strict=True))

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, int, int, list[str]]]:
        """First byte, end, first line and cells of every row that has any, the header's too."""
        stop = line = 0

        def lines() -> Iterator[str]:
            nonlocal stop, line
            for data in file:
                text = data.decode("utf-8-sig" if stop == 0 else "utf-8")
                stop, line = stop + len(data), line + 1
                yield text

        start, first = 0, 1
        try:
            for cells in self._cells(lines()):
                if cells:
                    yield start, stop, first, cells
                start, first = stop, line + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"line {line} of {self.path} cannot be read ({error})") from error

    def _cells(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=_DELIMITERS[self._kind], strict=True)


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
        by_format, data = read_image(path, f"image {name} of {where}", options.verify)
        sample: dict[str, Any] = {"__key__": numbered_key(number), field or by_format: data}
        if text is not None:
            sample["txt"] = _text(row.pop(text), text, where)
        if label is not None:
            sample["cls"] = row["label"] = _label(row.pop(label), label, where)
        return {**sample, "json": row}

    return pack_samples(options.order(len(rows)), make, folder, options, len(rows))


def _by_name(rows: RowFile, names: Sequence[str], role: str) -> str:
    columns = [column for column in rows.columns if column.lower() in names]
    if len(columns) != 1:
        raise ConfigError(_no_column(rows, role, None))
    return columns[0]


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
