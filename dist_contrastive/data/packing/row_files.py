"""Tables of text, .jsonl, .csv and .tsv, of which any row is read by its place in the file."""

import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dist_contrastive.errors import DataError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")


class RowFile:
    """The rows of a table; about 20 bytes of memory a row. Every row is parsed once to begin with.

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
        """The line of a row, for messages."""
        return f"line {self._lines[number]} of {self.path}"

    def read(self, number: int) -> dict[str, Any]:
        """One row: values by column; of .csv and .tsv all are texts. Any thread may call it."""
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
