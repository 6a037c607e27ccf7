"""Index of one tar, which is read once from one end to the other."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from dist_contrastive.data.classes import class_in_json, join_classes
from dist_contrastive.data.keys import key_hashes
from dist_contrastive.data.shards.index import ABSENT, MAX_FIELDS, ShardIndex
from dist_contrastive.data.shards.storage import ShardFiles, open_shard
from dist_contrastive.data.shards.tars import SampleSlice, scan_samples
from dist_contrastive.errors import DataError

_CHUNK = 1 << 20  # bytes read at once
_MAX_JSON = 64 << 10  # bytes in which the name of a class is looked for


def index_shard(shard: str, files: ShardFiles, *, unique_keys: bool = True) -> ShardIndex:
    """Index of one tar.

    Args:
        unique_keys: refuse a key that it holds twice.

    Raises:
        DataError: it cannot be opened, is truncated, damaged, or holds a key twice.
    """
    with open_shard(shard, files) as (file, size):
        left_out = Counter[str]()
        samples = list(scan_samples(file, shard, left_out))
        if unique_keys:
            _check_keys(samples, shard)
        fields = sorted({member.field for sample in samples for member in sample.members})
        if len(fields) > MAX_FIELDS:
            raise DataError(
                f"shard {shard} has {len(fields)} different fields ({fields[0]!r}, {fields[1]!r}, "
                f"...), more than {MAX_FIELDS}: what follows the first dot of a file name is its "
                f"field; name members KEY.EXTENSION with keys that hold no dots"
            )
        tables, digest = _member_tables(samples, fields, shard), hashlib.sha256()
        classes = _read_checksums(file, samples, fields, tables["member_crc32"], digest)
    return ShardIndex(
        shards=(shard,),
        shard_bytes=np.array([size], np.int64),
        shard_sha256=(digest.hexdigest(),),
        shard_samples=np.array([len(samples)], np.int64),
        shard_left_out=(left_out,),
        fields=tuple(fields),
        classes=join_classes(classes),
        sample_offset=np.array([sample.offset for sample in samples], np.int64),
        sample_key=key_hashes([sample.key for sample in samples]),
        files=files,
        **tables,
    )


def _check_keys(samples: Sequence[SampleSlice], shard: str) -> None:
    keys: set[str] = set()
    for sample in samples:
        if sample.key in keys:
            raise DataError(
                f"shard {shard} holds the key {sample.key!r} twice, again at byte "
                f"{sample.offset}; give every sample one key and keep its members together "
                "(`tar --sort=name`)"
            )
        keys.add(sample.key)


def _member_tables(
    samples: Sequence[SampleSlice], fields: Sequence[str], shard: str
) -> dict[str, Any]:
    shape = len(samples), len(fields)
    start = np.full(shape, ABSENT, np.uint32)
    header, size, crc32 = (np.zeros(shape, t) for t in (np.uint16, np.uint32, np.uint32))
    columns = {name: column for column, name in enumerate(fields)}
    for row, sample in enumerate(samples):
        for member in sample.members:
            place = row, columns[member.field]
            relative = member.start - sample.offset
            if max(relative, member.size) >= ABSENT or member.header > np.iinfo(np.uint16).max:
                raise DataError(
                    f"sample {sample.key!r} of shard {shard} spans more than 4 GiB, or names of "
                    f"64 KiB; make samples smaller"
                )
            start[place], header[place], size[place] = relative, member.header, member.size
    return {
        "member_start": start,
        "member_header": header,
        "member_size": size,
        "member_crc32": crc32,
    }


def _read_checksums(
    file: BinaryIO, samples: Sequence[SampleSlice], fields: Sequence[str], crc32: Any, digest: Any
) -> set[tuple[int, str]]:
    """Checksum of every member, and digest of the whole tar, in one pass; numbers and names of
    classes."""
    columns = {name: column for column, name in enumerate(fields)}
    at, classes = 0, set[tuple[int, str]]()
    file.seek(0)
    for row, sample in enumerate(samples):
        for member in sample.members:
            for chunk in _chunks(file, member.start - at):
                digest.update(chunk)
            value, content = 0, b""
            for chunk in _chunks(file, member.header + member.size):
                digest.update(chunk)
                value, content = zlib.crc32(chunk, value), chunk
            if member.field == "json" and member.size <= _MAX_JSON:  # it came as one chunk
                classes |= class_in_json(content[member.header :])
            crc32[row, columns[member.field]] = value
            at = member.start + member.header + member.size
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return classes


def _chunks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0 and (chunk := file.read(min(length, _CHUNK))):
        yield chunk
        length -= len(chunk)
