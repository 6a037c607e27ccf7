"""Rows of Parquet files by their number, a row group at a time, without a copy of the files."""

import glob
import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.packing.hub import DatasetTable, stored_images
from dist_contrastive.errors import DataError


class ParquetTable(DatasetTable):
    """Rows of Parquet files, numbered through them in the order of their names.

    Files are opened by the process that reads, without threads: a fork copies none of either.

    Args:
        location: a file, a folder, or a pattern.
        cache_bytes: of row groups, as Arrow has them, that are kept.

    Raises:
        DataError: no files; one that is no Parquet, or has other columns than the first.
    """

    def __init__(self, location: str, cache_bytes: int) -> None:
        import datasets

        self._files = _files_of(location)
        self._limit, self._left_out = cache_bytes, frozenset[str]()
        self._starts, self._group_of = [0], list[tuple[int, int]]()
        digest = hashlib.sha256()
        self._states = [_state(path) for path in self._files]
        for number, path in enumerate(self._files):
            with _opened(path) as file:
                if number == 0:
                    self._schema = file.schema_arrow
                elif not file.schema_arrow.equals(self._schema):
                    raise DataError(
                        f"{path} has other columns than {self._files[0]}; give files of one kind"
                    )
                digest.update(repr((path.name, self._states[number][0])).encode())
                for group in range(file.metadata.num_row_groups):
                    about = file.metadata.row_group(group)
                    digest.update(repr(about.to_dict()).encode())
                    self._group_of.append((number, group))
                    self._starts.append(self._starts[-1] + about.num_rows)
        self.fingerprint = digest.hexdigest()
        features = stored_images(datasets.Features.from_arrow_schema(self._schema))
        self._describe(features, self._files[0].parent)
        self._forget()

    def groups(self) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Names of the row groups, and their numbers of rows."""
        names = (f"{self._files[file]}[row group {group}]" for file, group in self._group_of)
        return tuple(names), np.diff(self._starts)

    def __len__(self) -> int:
        """Number of rows."""
        return self._starts[-1]

    def read(self, number: int) -> dict[str, Any]:
        """Values of a row by column. Raises: DataError, its file has changed."""
        place = bisect_right(self._starts, number) - 1
        row: dict[str, Any] = (
            self._group(place).slice(number - self._starts[place], 1).to_pylist()[0]
        )
        return row

    def rows(self, columns: Collection[str]) -> Iterator[dict[str, Any]]:
        """All rows in their order."""
        return ({name: self.read(n)[name] for name in columns} for n in range(len(self)))

    def leave_out(self, columns: Collection[str]) -> None:
        """Read row groups without some columns."""
        self._left_out |= {*columns}
        self._forget()

    def _group(self, place: int) -> Any:
        if self._process != os.getpid():
            self._forget()
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        number, group = self._group_of[place]
        path = self._files[number]
        if _state(path) != self._states[number]:
            raise DataError(
                f"{path} has changed since it was opened; start again when it is as it should be"
            )
        names = [name for name in self._schema.names if name not in self._left_out]
        with _opened(path) as file:
            table = file.read_row_group(group, columns=names, use_threads=False)
        while self._kept and self._held + table.nbytes > self._limit:
            self._held -= self._kept.popitem(last=False)[1].nbytes
        self._kept[place] = table
        self._held += table.nbytes
        return table

    def _forget(self) -> None:
        self._process, self._held = os.getpid(), 0
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_held": 0}


def _files_of(location: str) -> list[Path]:
    path = Path(location)
    names = [location] if path.is_file() else sorted(glob.glob(location))
    if path.is_dir():
        names = sorted(glob.glob(f"{glob.escape(location)}/*.parquet"))
    if not names:
        raise DataError(f"{location} names no Parquet files; give a file, a folder or a pattern")
    return list(map(Path, names))


def _state(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it") from error
    return status.st_size, status.st_mtime_ns


def _opened(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); restore it") from error
