"""Tables, read row by row; those of text with every value as it is written."""

import codecs
import csv
import json
import logging
import os
import re
import reprlib
import tempfile
import weakref
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from dist_contrastive.errors import ConfigError, DataError, UnreadableSample
from dist_contrastive.pack_options import TextFormat

_logger = logging.getLogger(__name__)

Row = dict[str, Any] | str
"""Values by column, or what is wrong with a row."""
Rows = Iterator[tuple[int, Row]]
Kind = Literal[
    "image",
    "bytes",
    "class",
    "integer",
    "number",
    "text",
    "digits",
    "texts",
    "array",
    "plain",
    "mixed",
    "other",
]
"""Of the values of a column; "digits" are texts of digits, "texts" lists of texts."""

TABLE_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
"""Extensions of tables of text."""

_DIGITS = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_LONGEST = 2**26  # signs of a cell or line
_MARKS = {  # at the beginning of a file; that of UTF-32 begins with one of UTF-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_HINT = ["sep=", ""]
"""First row of a table whose separator is written down for spreadsheets, as ``sep=;``."""
_UNDECODED = re.compile("[\udc80-\udcff]")
_FOREIGN = "holds bytes that are not in its encoding; give --encoding, as cp1252 or utf-16-le"
_QUOTES = "give --quotes none if quotation marks are text, or --quotes csv if they enclose cells"


class Table(ABC):
    """Rows of named values.

    Attributes:
        kinds: kind of the values of each column, in the order of the columns.
        folder: paths of images are seen from it.
    """

    kinds: dict[str, Kind]
    folder: Path

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, those that cannot be read too."""

    @abstractmethod
    def where(self, number: int) -> str:
        """Place of a row, for messages."""

    @abstractmethod
    def read(self, number: int) -> dict[str, Any]:
        """Values of a row by column. Raises: UnreadableSample."""

    @abstractmethod
    def rows(self, columns: Collection[str]) -> Iterator[dict[str, Any] | UnreadableSample]:
        """All rows in their order, with these columns at least, or what is wrong with them."""

    def leave_out(self, columns: Collection[str]) -> None:  # noqa: B027 optional
        """Read rows without some columns, if that spares work."""

    def type_name(self, column: str) -> str:
        """Type of a column, for messages."""
        return self.kinds[column]

    def class_names(self, column: str) -> list[str]:
        """Names of the classes of a column of the kind "class"."""
        raise NotImplementedError

    def array_type(self, column: str) -> Any:
        """NumPy type of a column of arrays; None is that of its values."""
        return None


class TextTable(Table):
    """Tables in files of text, one after the other.

    Each row is parsed once and kept in a temporary file, at 16 bytes of memory. Values of .csv and
    .tsv are texts, those of JSON what they are there: nothing becomes a number, a date or a missing
    value by its looks. A row that cannot be read counts, and says so when it is read.

    Args:
        files: their paths, and the names that they go by.

    Raises:
        ConfigError: a format that JSON has not.
        DataError: a file that cannot be read, is of another kind, or in which it is not clear where
            rows end; no rows.
    """

    def __init__(self, files: Mapping[Path, Path], form: TextFormat) -> None:
        self._names, self._units, self._first = list(files.values()), list[str](), list[int]()
        self.folder = self._names[0].parent
        self._rows = tempfile.TemporaryFile()  # noqa: SIM115 closed with the table
        weakref.finalize(self, self._rows.close)
        self._starts, self._lines = array("Q", [0]), array("Q")
        found: dict[str, set[Kind]] = {}
        for path, name in files.items():
            self._first.append(len(self))
            self._read_file(path, name, form, found)
        self._rows.flush()
        self.kinds = {column: _merged(kinds) for column, kinds in found.items()}
        if not len(self):
            raise DataError(f"the table {self._names[0]} has 0 rows; give 1 or more")
        if not self.kinds:
            self.read(0)  # it tells what is wrong with it
        if len(self) == 1 and {*self.kinds.values()} <= {"plain", "array", "texts"}:
            raise DataError(
                f"{self._names[0]} is one object of {', '.join(self.kinds)}; write a list of "
                f"objects, or one object a line, each with one value of every name"
            )

    def __len__(self) -> int:
        """Number of rows, those that cannot be read too."""
        return len(self._lines)

    def where(self, number: int) -> str:
        """Line and file of a row."""
        file = bisect_right(self._first, number) - 1
        return f"{self._units[file]} {self._lines[number]} of {self._names[file]}"

    def read(self, number: int) -> dict[str, Any]:
        """Values of a row by column. Any thread may call it."""
        start, stop = self._starts[number], self._starts[number + 1]
        row = json.loads(os.pread(self._rows.fileno(), stop - start, start))
        if isinstance(row, str):
            raise UnreadableSample(f"{self.where(number)} {row}")
        return row

    def rows(self, columns: Collection[str]) -> Iterator[dict[str, Any] | UnreadableSample]:
        """All rows in their order, or what is wrong with them."""
        for number in range(len(self)):
            try:
                yield self.read(number)
            except UnreadableSample as error:
                yield error

    def _read_file(
        self, path: Path, name: Path, form: TextFormat, found: dict[str, set[Kind]]
    ) -> None:
        if path.exists() and not path.is_file():  # of a pipe the end may never come
            raise DataError(f"the table {name} is no file; give {', '.join(TABLE_KINDS)}")
        try:
            encoding = _encoding(path, form.encoding)
            with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
                unit, columns, rows = _table(file, name, form)
                self._units.append(unit)
                found.update({column: found.get(column, set()) for column in columns})
                for line, row in rows:
                    self._append(line, row, form.null, found)
        except OSError as error:
            raise DataError(f"the table {name} cannot be read ({error.strerror})") from error
        except UnicodeError as error:
            raise DataError(f"{name} cannot be read ({error}); give --encoding") from error

    def _append(
        self, line: int, row: Row, null: Collection[str], found: dict[str, set[Kind]]
    ) -> None:
        if isinstance(row, dict):
            for column, value in row.items():
                if isinstance(value, str) and value in null:
                    row[column] = value = None
                kinds = found.setdefault(column, set())
                if "text" not in kinds or not isinstance(value, str):
                    kinds |= _kinds_of(value)
        self._lines.append(line)
        self._starts.append(self._starts[-1] + self._rows.write(json.dumps(row).encode()))


def _encoding(path: Path, chosen: str | None) -> str:
    name = codecs.lookup(chosen or "utf-8").name
    if not name.startswith("utf"):
        return name
    with path.open("rb") as file:
        begin = file.read(4)
    usual = "utf-8-sig" if name == "utf-8" else name
    return next((name for mark, name in _MARKS.items() if begin.startswith(mark)), usual)


def _kinds_of(value: Any) -> set[Kind]:
    """Kind of a value, none of a missing one."""
    match value:
        case None | "" | []:
            return set()
        case str():
            return {"digits" if _DIGITS.fullmatch(value) else "text"}
        case int():
            return {"integer"}
        case float():
            return {"number"}
        case list() if {str} <= set(map(type, value)) <= {str, type(None)}:
            return {"texts"}
        case list() if _holds_numbers(value):
            return {"array"}
    return {"plain"}


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_holds_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _merged(kinds: set[Kind]) -> Kind:
    if "texts" in kinds:  # what is no text beside them is a row that cannot be used
        return "texts"
    orders: list[tuple[Kind, ...]] = [("number", "integer"), ("text", "digits")]
    for order in orders:
        if kinds and kinds <= set(order):
            return next(kind for kind in order if kind in kinds)
    return "mixed" if len(kinds) > 1 else next(iter(kinds), "text")


# ---------------------------------------------------------------------------- files of text


def _table(file: TextIO, path: Path, form: TextFormat) -> tuple[str, Sequence[str], Rows]:
    """How places are counted, the columns of the header, and number and values of every row."""
    match path.suffix.lower():
        case ".csv":
            return "line", *_cells(file, path, form, ",")
        case ".tsv":
            return "line", *_cells(file, path, form, "\t")
        case ".json" | ".jsonl" | ".ndjson" if form != TextFormat(
            encoding=form.encoding, null=form.null
        ):
            raise ConfigError(
                f"{path} is JSON, without separators or a header; of {form.flags()} leave out all "
                f"but --encoding and --null"
            )
        case ".json" if file.read(64).lstrip().startswith("["):
            file.seek(0)
            return "entry", (), _entries(file, path)
        case ".json" | ".jsonl" | ".ndjson":
            file.seek(0)
            return "line", (), _objects(file, path)
    raise DataError(f"the table {path} is of no known kind; give {', '.join(TABLE_KINDS)}")


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), ""), start=1):
        if len(line) == _LONGEST:
            raise DataError(
                f"line {number} of {path} has {_LONGEST:,} signs or more; write one row a line"
            )
        yield line


def _is_foreign(text: str) -> bool:
    """Whether some bytes could not be decoded: they stay as halves of surrogates."""
    return not text.isascii() and _UNDECODED.search(text) is not None


def _objects(file: TextIO, path: Path) -> Rows:
    for number, line in enumerate(_lines(file, path), start=1):
        if line.strip():
            yield number, _object(line)


def _object(line: str) -> Row:
    if _is_foreign(line):
        return _FOREIGN
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error}); write one object a line"
    return row if isinstance(row, dict) else "is no object; write one a line"


def _entries(file: TextIO, path: Path) -> Rows:
    text = file.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the table {path} is no JSON ({error}); write a list of objects, or one object a line"
        ) from error
    if _is_foreign(text):
        raise DataError(f"the table {path} {_FOREIGN}")
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else "is no object; write a list of them"


def _cells(file: TextIO, path: Path, form: TextFormat, usual: str) -> tuple[Sequence[str], Rows]:
    """Columns and rows of a .csv or .tsv."""
    separator = form.separator or _separator(file, usual, path)
    file.seek(0)
    is_unclear = form.quotes is None and separator == "\t"
    records = _records(file, path, separator, is_unclear or form.quotes == "none")
    if is_unclear:
        records = _clear(records, path)
    rows = (cells for _, cells in records)
    first: Sequence[str] | str = form.columns or next(rows, "")
    if first == _HINT:
        first = next(rows, "")
    header = _header(first, path)
    return header, ((line, _row(header, cells, separator)) for line, cells in records)


def _separator(file: TextIO, usual: str, path: Path) -> str:
    header = re.sub('"[^"]*"', "", next(filter(str.strip, _lines(file, path)), ""))
    found = next((sign for sign in (usual, *";\t|,") if sign in header), usual)
    if found != usual:
        _logger.warning("%s: cells are separated by %r; --separator sets another", path, found)
    return found


def _records(
    file: TextIO, path: Path, separator: str, is_raw: bool
) -> Iterator[tuple[int, list[str] | str]]:
    """First line and cells of every row that has any, or what is wrong with it."""
    csv.field_size_limit(_LONGEST)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if is_raw else csv.QUOTE_MINIMAL
    reader = csv.reader(_lines(file, path), delimiter=separator, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = f"cannot be read ({error}); {_QUOTES}"
            if reader.line_num > line:  # which of these lines are rows is not known
                raise DataError(f"line {line} to {reader.line_num} of {path} {cells}") from error
        if cells:
            yield line, cells


def _clear(
    records: Iterator[tuple[int, list[str] | str]], path: Path
) -> Iterator[tuple[int, list[str] | str]]:
    """The records of a table between tabs, as long as quotation marks can only be text."""
    width, is_open = 0, False
    for line, cells in records:
        width = width or len(cells)
        is_open |= any(cell[:1] == '"' and cell.count('"') % 2 for cell in cells)
        if any(map(_is_enclosed, cells)) or (is_open and len(cells) != width):
            raise DataError(
                f"line {line} of {path} can be read in two ways ({reprlib.repr(cells)}); {_QUOTES}"
            )
        yield line, cells


def _is_enclosed(cell: str) -> bool:
    """Whether quotation marks may be signs around a cell, those inside of it doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _header(cells: Sequence[str] | str, path: Path) -> list[str]:
    text = "".join(cells)
    if (cells and isinstance(cells, str)) or "\0" in text or _is_foreign(text):
        raise DataError(f"the header of {path} {cells if isinstance(cells, str) else _FOREIGN}")
    names = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(cells)]
    if len(set(names)) < len(names):
        raise DataError(
            f"the columns of {path} are named {', '.join(names)}; give every column a name of its "
            f"own"
        )
    return names


def _row(header: Sequence[str], cells: list[str] | str, separator: str) -> Row:
    if isinstance(cells, str):
        return cells
    if len(cells) != len(header):
        return (
            f"has {len(cells)} cells but the header has {len(header)}; give every row one for each "
            f"column (cells that hold {separator!r} are written in quotation marks)"
        )
    return _FOREIGN if _is_foreign("".join(cells)) else dict(zip(header, cells, strict=True))
