"""The index of shards: where every field of every sample lies, and checksums to trust it by.

With it a field is read by one request for its bytes, wherever the shard is.
"""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.shards.block_cache import BlockCache
from dist_contrastive.data.shards.encoding import decode_or_explain
from dist_contrastive.data.shards.files import ShardFiles
from dist_contrastive.data.shards.locations import is_url
from dist_contrastive.data.shards.tars import member_key
from dist_contrastive.errors import DataError, UnreadableSample

_ATTEMPTS = 4  # that a server has to send the right bytes
ABSENT = np.iinfo(np.uint32).max  # `member_start` of a field that a sample lacks


def index_command(location: str) -> str:
    """The command that (re)builds the index of a folder or pattern, for messages."""
    return f"dist-contrastive shards index {location}"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """S shards and their n samples, numbered through all of them in order.

    It takes 8 + 14 F bytes of memory a sample, F being the number of fields.

    Attributes:
        shards: S paths or URLs.
        shard_bytes: int64 [S], size of each tar.
        shard_sha256: S hexadecimal checksums, as `sha256sum` prints them.
        shard_samples: int64 [S], samples of each tar.
        fields: F names of fields, sorted: the extensions of all samples.
        sample_offset: int64 [n], first byte of the sample in its tar.
        member_start: uint32 [n, F], first byte of a field's headers, from that of the sample;
            `ABSENT` if the sample lacks the field.
        member_header: uint16 [n, F], bytes of these headers.
        member_size: uint32 [n, F], bytes of the field's content.
        member_crc32: uint32 [n, F], checksum of headers and content.
        files: reads them.
    """

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

    def __len__(self) -> int:
        return len(self.sample_offset)

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """Number of the first sample of each shard, then n: int64 [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)

    @cached_property
    def _starts(self) -> list[int]:
        return self.shard_starts.tolist()  # in a list a number is found many times faster

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal checksum of what the shards hold, in order, wherever they lie."""
        told = zip(self.shard_sha256, self.shard_samples.tolist(), strict=True)
        return hashlib.sha256(repr(list(told)).encode()).hexdigest()

    def shard_of(self, sample_number: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect_right(self._starts, sample_number) - 1

    def field_counts(self) -> NDArray[np.int64]:
        """How many samples of each shard have each field, int64 [S, F]."""
        present = (self.member_start != ABSENT).astype(np.int64)
        sums = np.concatenate([np.zeros((1, len(self.fields)), np.int64), present.cumsum(axis=0)])
        return sums[self.shard_starts[1:]] - sums[self.shard_starts[:-1]]

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Read and decode one sample: `__key__` and its fields by extension, as `decode_field`.

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
        for name in only or ():
            if name not in contents:
                raise UnreadableSample(
                    f"sample {key!r} of shard {shard} has no field {name!r}; pack it with one, or "
                    f"leave it out"
                )
        decoded = {name: decode_or_explain(name, x, key, shard) for name, x in contents.items()}
        return {"__key__": key, **decoded}

    def read_contents(
        self, sample_number: int, only: Collection[str] | None = None
    ) -> dict[str, Any]:
        """`read` without decoding: `__key__`, and those of the fields that it has, as bytes."""
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} is outside 0..{len(self) - 1}")
        columns = self._columns(sample_number, only) or self._columns(sample_number, None)[:1]
        shard = self.shard_of(sample_number)
        start, length = self._span(sample_number, columns)
        place = self.shards[shard], int(self.shard_bytes[shard]), start, length
        data, attempts = self.files.read(*place), 1
        while problem := self._problem(sample_number, columns, data):
            # What came from a server, or lies in the cache, may be bad where the shard is not.
            if attempts >= _ATTEMPTS or not is_url(self.shards[shard]):
                raise UnreadableSample(problem)
            self.files.forget(*place)
            data, attempts = self.files.read(*place), attempts + 1
        found: dict[str, Any] = {"__key__": self._key(sample_number, columns[0], data)}
        first = self._start(sample_number, columns)
        for column in columns:
            name = self.fields[column]
            if only is None or name in only:
                begin = int(self.member_start[sample_number, column]) - first
                content = begin + int(self.member_header[sample_number, column])
                found[name] = data[content : content + int(self.member_size[sample_number, column])]
        return found

    def expect(self, sample_number: int, only: Collection[str] | None = None) -> None:
        """These fields will be read soon: fetch them meanwhile, if they lie far."""
        columns = self._columns(sample_number, only)
        if columns:
            shard = self.shard_of(sample_number)
            size = int(self.shard_bytes[shard])
            self.files.expect(self.shards[shard], size, *self._span(sample_number, columns))

    def key(self, sample_number: int) -> str | None:
        """The key of a sample, or None where none of its fields can be read."""
        for column in self._columns(sample_number, None):
            try:
                return self.read_contents(sample_number, (self.fields[column],))["__key__"]
            except UnreadableSample:
                continue
        return None

    def select(self, shards: Iterable[int]) -> "ShardIndex":
        """The index of some of the shards, in the given order."""
        numbers = list(shards)
        spans = [slice(*self.shard_starts[i : i + 2]) for i in numbers]
        rows = np.concatenate([np.arange(s.start, s.stop) for s in spans] or [np.arange(0)])
        return ShardIndex(
            shards=tuple(self.shards[i] for i in numbers),
            shard_bytes=self.shard_bytes[numbers],
            shard_sha256=tuple(self.shard_sha256[i] for i in numbers),
            shard_samples=self.shard_samples[numbers],
            fields=self.fields,
            sample_offset=self.sample_offset[rows],
            member_start=self.member_start[rows],
            member_header=self.member_header[rows],
            member_size=self.member_size[rows],
            member_crc32=self.member_crc32[rows],
            files=self.files,
        )

    def _columns(self, number: int, only: Collection[str] | None) -> list[int]:
        """Columns of the wanted fields that a sample has, in the order of the tar."""
        start = self.member_start[number].tolist()
        wanted = [
            column
            for column, name in enumerate(self.fields)
            if start[column] != ABSENT and (only is None or name in only)
        ]
        return sorted(wanted, key=start.__getitem__)

    def _start(self, number: int, columns: Sequence[int]) -> int:
        return int(self.member_start[number, columns[0]])

    def _member_bytes(self, number: int, column: int) -> int:
        return int(self.member_header[number, column]) + int(self.member_size[number, column])

    def _span(self, number: int, columns: Sequence[int]) -> tuple[int, int]:
        """First byte in the tar and number of bytes that hold these fields."""
        first, last = self._start(number, columns), columns[-1]
        stop = int(self.member_start[number, last]) + self._member_bytes(number, last)
        return int(self.sample_offset[number]) + first, stop - first

    def _key(self, number: int, column: int, data: bytes) -> str:
        return member_key(data[: self._member_bytes(number, column)])

    def _problem(self, number: int, columns: Sequence[int], data: bytes) -> str | None:
        """What is wrong with the bytes of these fields."""
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


def concatenate(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index of all shards of several, in order; samples are numbered through.

    Raises:
        DataError: a shard is in two of them.
    """
    if len(indexes) == 1:
        return indexes[0]
    shards = [shard for index in indexes for shard in index.shards]
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise DataError(f"shard {twice} is given twice; name every shard in one source only")
    fields = tuple(sorted({name for index in indexes for name in index.fields}))
    starts = [_aligned(index, index.member_start, fields, ABSENT) for index in indexes]
    headers, sizes, checksums = (
        np.concatenate([_aligned(index, getattr(index, name), fields, 0) for index in indexes])
        for name in ("member_header", "member_size", "member_crc32")
    )
    return ShardIndex(
        shards=tuple(shards),
        shard_bytes=np.concatenate([index.shard_bytes for index in indexes]),
        shard_sha256=tuple(x for index in indexes for x in index.shard_sha256),
        shard_samples=np.concatenate([index.shard_samples for index in indexes]),
        fields=fields,
        sample_offset=np.concatenate([index.sample_offset for index in indexes]),
        member_start=np.concatenate(starts),
        member_header=headers,
        member_size=sizes,
        member_crc32=checksums,
        files=indexes[0].files,
    )


def _aligned(
    index: ShardIndex, table: NDArray[Any], fields: tuple[str, ...], absent: int
) -> NDArray[Any]:
    """The columns of a member table under other field names, of which its own are a part."""
    wide = np.full((len(table), len(fields)), absent, table.dtype)
    wide[:, [fields.index(name) for name in index.fields]] = table
    return wide
