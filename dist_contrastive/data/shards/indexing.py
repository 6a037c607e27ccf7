"""Making the index of tars, whoever wrote them, wherever they lie."""

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_contrastive.data.progress import by_threads
from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.block_cache import BlockCache
from dist_contrastive.data.shards.files import ShardFiles
from dist_contrastive.data.shards.index import ABSENT, ShardIndex, concatenate
from dist_contrastive.data.shards.index_file import (
    check_ends,
    check_target,
    load_index,
    parse_index,
    save_index,
)
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    find_shards,
    folder_of,
    is_pattern,
    is_url,
)
from dist_contrastive.data.shards.tars import SampleSlice, scan_samples
from dist_contrastive.data.shards.temporary_cache import temporary_cache
from dist_contrastive.errors import DataError

_CHUNK = 1 << 20  # bytes read at once
_MAX_FIELDS = 64  # of a data set; more mean that keys hold dots

Progress = Callable[[Iterator[Any], int], Iterator[Any]]
"""Shows how far an iterator of so many items is."""


def index_folder(
    location: Path | str,
    out: Path | str | None = None,
    *,
    full: bool = False,
    progress: Progress = lambda items, _: items,
) -> ShardIndex:
    """Index tars and save the index. What an index at that place tells of tars that have not
    changed since is taken over.

    Args:
        location: a folder, a pattern, or a URL of either.
        out: where to write; None: `index.npz` in the folder, which must then be one and local.
        full: read all tars, changed or not.
        progress: told of each shard.

    Raises:
        DataError: no shards or samples; a tar truncated, damaged or with a key twice; nowhere to
            write.
    """
    location = str(location) if is_url(str(location)) else str(Path(location))
    shards = find_shards(location)
    target = Path(out) if out is not None else _place(location, shards)
    check_target(target)
    with temporary_cache() as cache:  # what the server holds now, not what was kept of it
        files = ShardFiles(BlockCache(cache))
        known = {} if full else _unchanged(target, files)
        new = [shard for shard in shards if shard not in known]
        for part in progress(_index_all(new, files), len(new)):
            known[part.shards[0]] = part
        index = concatenate([known[shard] for shard in shards])
        _check_samples(index, location)
        save_index(index, target)
    return load_index(target)


def build_index(location: Path | str) -> ShardIndex:
    """The index of the tars of a folder; nothing is read from an older one, nothing is written.

    Raises:
        DataError: as `index_folder`.
    """
    shards = find_shards(str(location))
    index = concatenate(list(_index_all(shards, ShardFiles(BlockCache()))))
    _check_samples(index, str(location))
    return index


def index_shard(shard: str, files: ShardFiles, *, unique_keys: bool = True) -> ShardIndex:
    """The index of one tar.

    Args:
        unique_keys: refuse a key that it holds twice.

    Raises:
        DataError: it cannot be opened, is truncated, damaged, or holds a key twice.
    """
    with open_shard(shard, files) as (file, size):
        samples = list(scan_samples(file, shard))
        if unique_keys:
            _check_keys(samples, shard)
        fields = sorted({member.field for sample in samples for member in sample.members})
        if len(fields) > _MAX_FIELDS:
            raise DataError(
                f"shard {shard} has {len(fields)} different fields ({fields[0]!r}, {fields[1]!r}, "
                f"...), more than {_MAX_FIELDS}: what follows the first dot of a file name is its "
                f"field; name members KEY.EXTENSION with keys that hold no dots"
            )
        tables, digest = _member_tables(samples, fields, shard), hashlib.sha256()
        _read_checksums(file, samples, fields, tables["member_crc32"], digest)
    return ShardIndex(
        shards=(shard,),
        shard_bytes=np.array([size], np.int64),
        shard_sha256=(digest.hexdigest(),),
        shard_samples=np.array([len(samples)], np.int64),
        fields=tuple(fields),
        sample_offset=np.array([sample.offset for sample in samples], np.int64),
        files=files,
        **tables,
    )


@contextmanager
def open_shard(shard: str, files: ShardFiles) -> Iterator[tuple[BinaryIO, int]]:
    """A shard as a file, and its size in bytes.

    Raises:
        DataError: it is not there, may not be read, or its server does not tell its size.
    """
    if not is_url(shard):
        try:
            file = open(shard, "rb")  # noqa: SIM115  # what fails below is not the opening
        except OSError as error:
            raise DataError(
                f"shard {shard} cannot be read ({error.strerror}); restore it, or leave it out"
            ) from error
        with file:
            yield file, os.fstat(file.fileno()).st_size
        return
    size = remote.size(shard)
    if size is None:
        raise DataError(f"the server of {shard} does not tell its size; use one that does")
    yield io.BufferedReader(_RemoteFile(shard, size, files), _CHUNK), size


class _RemoteFile(io.RawIOBase):
    """A remote shard as a file, for `tarfile`."""

    def __init__(self, shard: str, size: int, files: ShardFiles) -> None:
        self._shard, self._size, self._files, self._at = shard, size, files, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._files.read(self._shard, self._size, self._at, length)
        self._at += length
        return length


def _place(location: str, shards: Sequence[str]) -> Path:
    folders = {folder_of(shard) for shard in shards}
    if len(folders) == 1 and not is_url(location):
        folder = Path(folders.pop())
        if not is_pattern(location) or len(find_shards(str(folder))) == len(shards):
            return folder / INDEX_NAME
    raise DataError(
        f"{location} is not one whole folder of this machine, so its index has no place of its "
        f"own; say where to write it: --out FILE.npz"
    )


def _unchanged(file: Path, files: ShardFiles) -> dict[str, ShardIndex]:
    """The parts of an index file that still fit their tars, by shard."""
    try:
        index = parse_index(file.read_bytes(), str(file), files)
        written = file.stat().st_mtime_ns
    except (OSError, DataError):
        return {}
    found = {}
    for number, shard in enumerate(index.shards):
        part = index.select([number])
        try:
            if _has_changed(part, written):
                continue
            check_ends(part, [0])
        except (DataError, OSError):
            continue
        found[shard] = _without_unused_fields(part)
    return found


def _has_changed(part: ShardIndex, written_ns: int) -> bool:
    shard, size = part.shards[0], int(part.shard_bytes[0])
    if is_url(shard):
        return remote.size(shard) != size
    status = os.stat(shard)
    return status.st_size != size or status.st_mtime_ns >= written_ns


def _without_unused_fields(part: ShardIndex) -> ShardIndex:
    """As `index_shard` makes it: an index of many shards has the fields of all of them."""
    used = np.flatnonzero(part.field_counts()[0])
    tables = {
        name: getattr(part, name)[:, used]
        for name in ("member_start", "member_header", "member_size", "member_crc32")
    }
    return replace(part, fields=tuple(part.fields[i] for i in used), **tables)


def _index_all(shards: Sequence[str], files: ShardFiles) -> Iterator[ShardIndex]:
    return by_threads(lambda shard: index_shard(shard, files), shards)


def _check_samples(index: ShardIndex, location: str) -> None:
    if not len(index):
        raise DataError(
            f"the {len(index.shards)} shards in {location} hold 0 samples; write tars whose "
            f"members are named KEY.EXTENSION"
        )
    if len(index.fields) > _MAX_FIELDS:
        raise DataError(
            f"the shards in {location} have {len(index.fields)} different fields, more than "
            f"{_MAX_FIELDS}; name members KEY.EXTENSION with keys that hold no dots"
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
) -> None:
    """Fill in the checksum of every member, and digest the whole tar, in one pass."""
    columns = {name: column for column, name in enumerate(fields)}
    at = 0
    file.seek(0)
    for row, sample in enumerate(samples):
        for member in sample.members:
            for chunk in _chunks(file, member.start - at):
                digest.update(chunk)
            value = 0
            for chunk in _chunks(file, member.header + member.size):
                digest.update(chunk)
                value = zlib.crc32(chunk, value)
            crc32[row, columns[member.field]] = value
            at = member.start + member.header + member.size
    while chunk := file.read(_CHUNK):
        digest.update(chunk)


def _chunks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0 and (chunk := file.read(min(length, _CHUNK))):
        yield chunk
        length -= len(chunk)
