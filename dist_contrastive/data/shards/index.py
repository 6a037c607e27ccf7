"""Index of shards: place and checksum of every field of every sample.

With it a field is read by one request for its bytes, wherever the shard is.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.classes import join_classes
from dist_contrastive.data.shards.encoding import WHITE, decode_or_explain
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.shards.storage import BlockCache, ShardFiles
from dist_contrastive.data.shards.tars import member_key
from dist_contrastive.data.source import Source, alternatives
from dist_contrastive.errors import DataError, UnreadableSample

_ROWS = 1 << 20  # samples that are looked through at a time
MAX_FIELDS = 64  # of a data set; more mean that keys hold dots
_ATTEMPTS = 4  # to receive the right bytes from a server
ARRAYS = {
    "shard_bytes": np.int64,
    "shard_samples": np.int64,
    "sample_offset": np.int64,
    "sample_key": np.uint64,
    "member_start": np.uint32,
    "member_header": np.uint16,
    "member_size": np.uint32,
    "member_crc32": np.uint32,
}
MEMBER_TABLES = tuple(name for name in ARRAYS if name.startswith("member"))
ABSENT = np.iinfo(np.uint32).max  # `member_start` of a field that a sample lacks


def index_command(location: str) -> str:
    """Command that (re)builds the index of a folder or pattern, for messages."""
    return f"dist-contrastive shards index {location}"


@dataclass(frozen=True, eq=False)
class ShardIndex(Source):
    """S shards and their n samples, numbered through all of them in order.

    It takes 16 + 14 F bytes a sample, F being the number of fields; of a large index file they are
    mapped, and shared by all processes of a machine.

    Attributes:
        shards: S paths or URLs.
        shard_bytes: int64 [S], size of each tar.
        shard_sha256: S hexadecimal checksums, as `sha256sum` prints them.
        shard_samples: int64 [S], samples of each tar.
        shard_left_out: S counts of members of no sample, by kind; older indexes have none.
        fields: F names of fields, sorted: the extensions of all samples.
        sample_offset: int64 [n], first byte of the sample in its tar.
        sample_key: uint64 [n], `key_hashes` of its key; uint64 [0] in older indexes.
        member_start: uint32 [n, F], first byte of a field's headers, from that of the sample;
            `ABSENT` if the sample lacks the field.
        member_header: uint16 [n, F], bytes of these headers.
        member_size: uint32 [n, F], bytes of the field's content.
        member_crc32: uint32 [n, F], checksum of headers and content.
        classes: names of classes by number, from JSON with "label" and "class".
        files: reads them.
        background: colour behind images that are transparent in places.
    """

    class Config(Source.Config):
        """Settings of indexed shards."""

        name: Literal["shards"] = "shards"
        shards: str
        """A folder of indexed shards or its URL, an index file, or a pattern of shards."""

    shards: tuple[str, ...]
    shard_bytes: NDArray[np.int64]
    shard_sha256: tuple[str, ...]
    shard_samples: NDArray[np.int64]
    fields: tuple[str, ...]
    sample_offset: NDArray[np.int64]
    member_start: NDArray[np.uint32]
    member_header: NDArray[np.uint16]
    member_size: NDArray[np.uint32]
    member_crc32: NDArray[np.uint32]
    files: ShardFiles = field(default_factory=lambda: ShardFiles(BlockCache()), repr=False)
    background: str = WHITE
    shard_left_out: tuple[Mapping[str, int], ...] = ()
    sample_key: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    classes: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_offset)

    @property
    def has_keys(self) -> bool:
        """Whether it tells the samples' keys, as those of older versions do not."""
        return len(self.sample_key) == len(self)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal checksum of the contents of the shards, in order, wherever they lie."""
        contents = list(zip(self.shard_sha256, self.shard_samples.tolist(), strict=True))
        return hashlib.sha256(repr(contents).encode()).hexdigest()

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Numbers of the samples without a field, or without any of several alternatives."""
        columns = [self.fields.index(one) for one in alternatives(name) if one in self.fields]
        found = []
        for first in range(0, len(self), _ROWS):  # which needs little memory
            starts = self.member_start[first : first + _ROWS][:, columns]
            found.append(first + np.flatnonzero((starts == ABSENT).all(axis=1)))
        return np.concatenate([np.zeros(0, np.int64), *found])

    def field_counts(self) -> NDArray[np.int64]:
        """Number of samples of each shard that have each field, int64 [S, F]."""
        present = (self.member_start != ABSENT).astype(np.int64)
        sums = np.concatenate([np.zeros((1, len(self.fields)), np.int64), present.cumsum(axis=0)])
        return sums[self.shard_starts[1:]] - sums[self.shard_starts[:-1]]

    @property
    def left_out(self) -> Counter[str]:
        """Members of all shards that belong to no sample, by kind."""
        return sum(map(Counter, self.shard_left_out), Counter())

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Decoded sample: `__key__` and its fields by extension, as `decode_field` gives them.

        Args:
            only: the fields to read, which the sample must have; None reads what there is.

        Raises:
            IndexError: no such sample.
            UnreadableSample: it lacks one of the fields, or its bytes are not those that were
                indexed, or cannot be decoded.
            UnreachableError: the server of the shard does not answer.
        """
        contents = self.read_contents(sample_number, only)
        key = contents.pop("__key__")
        shard = self.shards[self.shard_of(sample_number)]
        decoded: dict[str, Any] = {"__key__": key}
        for name in contents if only is None else only:
            field = _first_of(name, contents)
            if field is None:
                raise UnreadableSample(
                    f"sample {key!r} of shard {shard} has no field {name!r}; pack it with one, or "
                    f"leave it out"
                )
            decoded[name] = decode_or_explain(field, contents[field], key, shard, self.background)
        return decoded

    def read_contents(
        self, sample_number: int, only: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Sample as bytes: `__key__`, and those of the fields that it has."""
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} is outside 0..{len(self) - 1}")
        wanted = self._columns(sample_number, only)
        columns = wanted or self._columns(sample_number, None)[:1]
        shard = self.shard_of(sample_number)
        start, length = self._span(sample_number, columns)
        place = self.shards[shard], int(self.shard_bytes[shard]), start, length
        if not 0 <= start <= start + length <= place[1]:
            raise UnreadableSample(
                f"sample {sample_number} is at bytes {start} to {start + length} by the index, and "
                f"{place[0]} has {place[1]}; index it again"
            )
        data, attempts = self.files.read(*place), 1
        while problem := self._problem(sample_number, columns, data):
            # What came from a server, or lies in the cache, may be bad where the shard is not.
            if attempts >= _ATTEMPTS or not is_url(self.shards[shard]):
                raise UnreadableSample(problem)
            self.files.drop(*place)
            data, attempts = self.files.read(*place), attempts + 1
        key = member_key(data[: self._member_bytes(sample_number, columns[0])])
        contents: dict[str, Any] = {"__key__": key}
        first = self._start(sample_number, columns)
        for column in wanted:
            begin = int(self.member_start[sample_number, column]) - first
            content = begin + int(self.member_header[sample_number, column])
            size = int(self.member_size[sample_number, column])
            contents[self.fields[column]] = data[content : content + size]
        return contents

    def prefetch(self, sample_number: int, only: Collection[str] | None = None) -> None:
        """Begin to fetch fields that will be read soon."""
        columns = self._columns(sample_number, only)
        if columns:
            shard = self.shard_of(sample_number)
            size, (start, length) = int(self.shard_bytes[shard]), self._span(sample_number, columns)
            if 0 <= start <= start + length <= size:
                self.files.prefetch(self.shards[shard], size, start, length)

    def key(self, sample_number: int) -> str | None:
        """Key of a sample, or None where none of its fields can be read."""
        for column in self._columns(sample_number, None):
            try:
                return self.read_contents(sample_number, (self.fields[column],))["__key__"]
            except UnreadableSample:
                continue
        return None

    def select(self, shards: Iterable[int]) -> "ShardIndex":
        """Index of some of the shards, in the given order."""
        numbers = list(shards)
        spans = [slice(*self.shard_starts[i : i + 2].tolist()) for i in numbers]
        rows: Any = np.concatenate([np.arange(s.start, s.stop) for s in spans] or [np.arange(0)])
        if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
            rows = slice(spans[0].start, spans[-1].stop)  # mapped ones stay mapped
        return replace(
            self,
            shards=tuple(self.shards[i] for i in numbers),
            shard_bytes=self.shard_bytes[numbers],
            shard_sha256=tuple(self.shard_sha256[i] for i in numbers),
            shard_samples=self.shard_samples[numbers],
            shard_left_out=tuple(x for i in numbers for x in self.shard_left_out[i : i + 1]),
            sample_offset=self.sample_offset[rows],
            sample_key=self.sample_key[rows] if self.has_keys else self.sample_key,
            **{name: getattr(self, name)[rows] for name in MEMBER_TABLES},
        )

    @cached_property
    def _column_of(self) -> dict[str, int]:
        return {name: column for column, name in enumerate(self.fields)}

    def _columns(self, number: int, only: Collection[str] | None) -> list[int]:
        """Columns of the wanted fields that a sample has, in the order of the tar."""
        start = self.member_start[number].tolist()
        if only is None:
            columns = {column for column in range(len(start)) if start[column] != ABSENT}
        else:
            columns = set()
            for name in only:
                for one in alternatives(name):
                    column = self._column_of.get(one)
                    if column is not None and start[column] != ABSENT:
                        columns.add(column)
                        break
        return sorted(columns, key=start.__getitem__)

    def _start(self, number: int, columns: Sequence[int]) -> int:
        return int(self.member_start[number, columns[0]])

    def _member_bytes(self, number: int, column: int) -> int:
        return int(self.member_header[number, column]) + int(self.member_size[number, column])

    def _span(self, number: int, columns: Sequence[int]) -> tuple[int, int]:
        """First byte in the tar and number of bytes that hold these fields."""
        first, last = self._start(number, columns), columns[-1]
        stop = int(self.member_start[number, last]) + self._member_bytes(number, last)
        return int(self.sample_offset[number]) + first, stop - first

    def _problem(self, number: int, columns: Sequence[int], data: bytes) -> str | None:
        """Sentence about the first of these fields whose bytes are wrong."""
        first = self._start(number, columns)
        for column in columns:
            begin = int(self.member_start[number, column]) - first
            length = self._member_bytes(number, column)
            part = data[begin : begin + length]
            expected = int(self.member_crc32[number, column])
            if len(part) != length or zlib.crc32(part) != expected:
                shard = self.shards[self.shard_of(number)]
                at = int(self.sample_offset[number]) + first + begin
                return (
                    f"shard {shard} is damaged or was changed: field {self.fields[column]!r} of "
                    f"sample {number} at byte {at} has {len(part)} bytes with crc32 "
                    f"{zlib.crc32(part):08x} but {length} bytes with {expected:08x} were indexed; "
                    f"restore the shard, or index it again if it was changed on purpose"
                )
        return None


def _first_of(name: str, present: Collection[str]) -> str | None:
    """Field that a name stands for among those that a sample has."""
    return next((one for one in alternatives(name) if one in present), None)


def concatenate(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """Index of all shards of several, in order; samples are numbered through.

    Raises:
        DataError: a shard is in two of them.
    """
    if len(indexes) == 1:
        return indexes[0]
    shards = [shard for index in indexes for shard in index.shards]
    if repeated := [shard for shard, count in Counter(shards).items() if count > 1]:
        raise DataError(f"shard {repeated[0]} is given twice; name every shard in one source only")
    fields = tuple(sorted({name for index in indexes for name in index.fields}))
    left_out = tuple(x for index in indexes for x in index.shard_left_out)
    others = ARRAYS.keys() - {*MEMBER_TABLES}
    joined = {name: np.concatenate([getattr(x, name) for x in indexes]) for name in others}
    if not all(index.has_keys for index in indexes):
        joined["sample_key"] = np.zeros(0, np.uint64)
    joined |= {name: _concatenated(indexes, name, fields) for name in MEMBER_TABLES}
    return replace(
        indexes[0],
        shards=tuple(shards),
        shard_sha256=tuple(x for index in indexes for x in index.shard_sha256),
        shard_left_out=left_out if len(left_out) == len(shards) else (),
        fields=fields,
        classes=join_classes(pair for index in indexes for pair in index.classes.items()),
        **dict[str, Any](joined),
    )


def _concatenated(
    indexes: Sequence[ShardIndex], name: str, fields: tuple[str, ...]
) -> NDArray[Any]:
    """Member tables with one column for each field of any index."""
    absent = ABSENT if name == "member_start" else 0
    shape = sum(len(index) for index in indexes), len(fields)
    table, row = np.full(shape, absent, ARRAYS[name]), 0
    for index in indexes:
        columns = [fields.index(x) for x in index.fields]
        table[row : row + len(index), columns] = getattr(index, name)
        row += len(index)
    return table
