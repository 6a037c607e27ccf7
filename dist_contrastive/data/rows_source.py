"""Rows of a table, or of a data set of the library `datasets`, as a data source without packing."""

import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.packing.columns import choose_columns
from dist_contrastive.data.packing.hub import open_table
from dist_contrastive.data.packing.options import numbered_key
from dist_contrastive.data.packing.parquet import ParquetTable
from dist_contrastive.data.packing.rows import sample_maker
from dist_contrastive.data.packing.tables import Table
from dist_contrastive.data.packing.writer import encoded
from dist_contrastive.data.shards.encoding import WHITE, decode_or_explain
from dist_contrastive.data.source import Source, alternatives, in_parts
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

_SEED = 0  # of their order, as of `shards pack`
_PROBED = 64  # rows, spread evenly, that tell the fields and what a table is recognised by


class Columns(Source.Config):
    """Settings of columns of a table."""

    path: str
    image: str | None = None
    """Column of images, of their bytes, or of their paths, seen from the file's folder; null finds
    it, "-" is none."""
    text: str | None = None
    """Column of texts; null finds it, "-" is none."""
    label: str | None = None
    """Column of labels; null finds it, "-" is none."""
    drop: tuple[str, ...] = ()
    """Columns that are not read."""


class Rows(Source):
    """The rows of a table in the samples and the order that `shards pack dataset` would write, with
    its image in the field png: batches are the same, packed or not.

    Args:
        background: colour behind images that are transparent in places.

    Raises:
        ConfigError, DataError: as `pack_dataset`; no row can be read.
    """

    class Config(Columns):
        """Settings of a table."""

        name: Literal["rows"] = "rows"
        path: str
        """A folder written by `save_to_disk`; a file .parquet, .json, .jsonl, .csv, .tsv or .arrow,
        or a folder of such; or a name of the hub."""
        split: str | None = None
        """Which; null if there is one only."""
        subset: str | None = None
        """Of a data set of the hub that has several: its config."""

    def __init__(self, config: Config, background: str = WHITE) -> None:
        table = open_table(config.path, config.split, config.subset)
        count = len(table)
        self._order: Sequence[int] | NDArray[np.int64] = keyed_permutation(count, _SEED)
        self.shards, self.shard_samples = in_parts(config.path, count)
        self._begin(config, table, background)

    def _begin(self, config: Columns, table: Table, background: str) -> None:
        wanted = {"image": config.image, "text": config.text, "label": config.label}
        columns = choose_columns(table, wanted, config.drop)
        table.leave_out(config.drop)
        self._make = sample_maker(
            *(table, columns, "png", "open"), is_text_needed=False, is_numbered=True
        )
        self._path, self._background = config.path, background
        if not len(self._order):
            raise DataError(f"{config.path} has no rows; give a table that has some")
        self.fields = tuple(sorted({name for sample in self._probed for name in sample}))

    @cached_property
    def _probed(self) -> list[dict[str, bytes]]:
        """Some rows as bytes. Raises: DataError, none can be read."""
        found, problem, numbers = [], "", self._numbers_to_try()
        for number in numbers:
            try:
                sample = encoded(self._make(number))
            except UnreadableSample as error:
                problem = str(error)
                continue
            del sample["__key__"]
            found.append(sample)
        if not found:
            raise DataError(f"none of {len(numbers)} rows that were tried is read: {problem}")
        return found

    def _numbers_to_try(self) -> list[int]:
        """Rows spread evenly over the table."""
        count = len(self._order)
        return sorted({number * count // _PROBED for number in range(_PROBED)})

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """As `Source.read`."""
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} is outside 0..{len(self) - 1}")
        try:
            sample = encoded(self._make(int(self._order[sample_number])))
        except ConfigError as error:  # a value that no field can hold
            raise UnreadableSample(str(error)) from error
        key = sample.pop("__key__")
        decoded: dict[str, Any] = {"__key__": key}
        for name in sample if only is None else only:
            field = next((one for one in alternatives(name) if one in sample), None)
            if field is None:
                raise UnreadableSample(f"row {key} of {self._path} has no field {name!r}")
            decoded[name] = decode_or_explain(
                field, sample[field], key, self._path, self._background
            )
        return decoded

    def key(self, sample_number: int) -> str:
        """Key of a row: its number."""
        return numbered_key(int(self._order[sample_number]))

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the number of rows and of some, spread evenly over the table."""
        digest = hashlib.sha256(repr((len(self), self.fields)).encode())
        for sample in self._probed:
            digest.update(repr(sorted(sample.items())).encode())
        return digest.hexdigest()


class ParquetRows(Rows):
    """The rows of Parquet files in the samples that `shards pack dataset --no-shuffle` would write,
    each row group as a shard: nothing is copied, and a process has some row groups in memory.

    An epoch permutes the row groups, and then rows inside of windows, as of shards. Rows should be
    shuffled in the files.

    Args:
        background: colour behind images that are transparent in places.

    Raises:
        ConfigError, DataError: as `Rows`; a file that is no Parquet, or has other columns than the
            first.
    """

    class Config(Columns):
        """Settings of Parquet files that are read as they lie."""

        name: Literal["parquet"] = "parquet"
        path: str
        """A file .parquet, a folder of such, or a pattern, as 'data/train-*.parquet'."""
        cache_mb: PositiveInt = 1024
        """MiB of row groups that each process which reads keeps; those of two windows of its lanes
        should fit, or they are read again and again."""

    def __init__(self, config: Config, background: str = WHITE) -> None:
        self._table = ParquetTable(config.path, config.cache_mb << 20)
        self._order = range(len(self._table))
        self.shards, self.shard_samples = self._table.groups()
        self._begin(config, self._table, background)

    def _numbers_to_try(self) -> list[int]:
        """Rows of the first and the last row group that has some."""
        count = len(self._order)
        return sorted({*range(count)[: _PROBED // 2], *range(count)[-_PROBED // 2 :]})

    @property
    def fingerprint(self) -> str:
        """Checksum of what the files tell of their row groups."""
        return self._table.fingerprint
