"""Indexes loaded, and made of tars, whoever wrote them, wherever they lie."""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_contrastive.data.classes import class_in_json, join_classes
from dist_contrastive.data.keys import key_hashes
from dist_contrastive.data.progress import map_in_threads
from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.index import (
    ABSENT,
    MEMBER_TABLES,
    ShardIndex,
    concatenate,
    index_command,
)
from dist_contrastive.data.shards.index_file import (
    check_target,
    parse_index,
    read_index,
    save_index,
)
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    counted,
    find_shards,
    folder_of,
    is_pattern,
)
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.shards.storage import BlockCache, ShardFiles, open_shard, temporary_cache
from dist_contrastive.data.shards.tars import SampleSlice, scan_samples
from dist_contrastive.errors import DataError, UnreadableSample

_CHUNK = 1 << 20  # bytes read at once
_MAX_JSON = 64 << 10  # bytes in which the name of a class is looked for
_MAX_FIELDS = 64  # of a data set; more mean that keys hold dots

Progress = Callable[[Iterator[Any], int], Iterator[Any]]
"""Wraps an iterator of so many items, to show its progress."""


def load_index(location: Path | str, cache: BlockCache.Config | None = None) -> ShardIndex:
    """Load an index and compare it with its tars.

    Local tars must have the sizes that were indexed, and where one is newer than the index its
    first and last samples must be those that were indexed too. Of remote tars nothing is asked
    here: what is read of them later is compared with the index.

    Args:
        location: a folder or its URL, with `index.npz` beside the tars; an index file or its URL;
            or a pattern of shards whose folders have an index, as `data/train-{000..099}.tar`.
        cache: of remote shards.

    Raises:
        DataError: no folder, tars or index; an index that cannot be read, or that does not fit the
            tars.
        UnreachableError: the server does not answer.
    """
    location = str(location) if is_url(str(location)) else str(Path(location))
    files = ShardFiles(BlockCache(cache))
    if is_pattern(location):
        return _load_pattern(location, files)
    file = location if location.endswith(".npz") else f"{location.rstrip('/')}/{INDEX_NAME}"
    index = _read_index(file, location, files)
    if not is_url(file):
        _check_local(index, Path(file))
    return index


def _load_pattern(pattern: str, files: ShardFiles) -> ShardIndex:
    """Index of the shards that a pattern names, from the indexes beside them."""
    parts = []
    for folder, group in groupby(find_shards(pattern), folder_of):
        file = f"{folder}/{INDEX_NAME}"
        index = _read_index(file, pattern, files)
        known = {shard: number for number, shard in enumerate(index.shards)}
        names = list(group)
        if unknown := [name for name in names if name not in known]:
            raise DataError(
                f"shard {unknown[0]} of the pattern {pattern} is not in the index {file} "
                f"({len(unknown)} are not); run `{index_command(folder)}`"
            )
        part = index.select(known[name] for name in names)
        if not is_url(file):
            _check_shards(part, Path(file))
        parts.append(part)
    return concatenate(parts)


def _read_index(file: str, location: str, files: ShardFiles) -> ShardIndex:
    if is_url(file):
        try:
            data = remote.read_all(file)
        except UnreadableSample as error:
            raise DataError(
                f"{location} has no {INDEX_NAME} ({error}); run `{index_command(location)} --out "
                f"FILE`, and give FILE, or put it there"
            ) from error
    else:
        if not os.path.isfile(file):
            folder = folder_of(file)
            count = len(find_shards(folder))
            raise DataError(
                f"{folder} has {count} shards but no {Path(file).name}; run "
                f"`{index_command(folder)}`"
            )
        return parse_index(read_index(Path(file)), file, files)
    return parse_index(data, file, files)


def _check_local(index: ShardIndex, file: Path) -> None:
    """Refuse an index of a folder that lacks some of its tars."""
    if file.name == INDEX_NAME and all(folder_of(s) == str(file.parent) for s in index.shards):
        shards, command = find_shards(str(file.parent)), index_command(str(file.parent))
        indexed = set(index.shards)
        if new := [shard for shard in shards if shard not in indexed]:
            raise DataError(
                f"shard {new[0]} is in the folder but not in the index (the folder has "
                f"{len(shards)} shards, the index lists {len(indexed)}); run `{command}`"
            )
    _check_shards(index, file)


def _check_shards(index: ShardIndex, file: Path) -> None:
    command, written = index_command(str(file.parent)), file.stat().st_mtime_ns
    newer = []
    for number, (shard, size) in enumerate(zip(index.shards, index.shard_bytes, strict=True)):
        if is_url(shard):
            continue
        try:
            status = os.stat(shard)
        except OSError as error:
            raise DataError(
                f"shard {shard} is in the index but cannot be found ({error.strerror}; the index "
                f"lists {len(index.shards)} shards); restore it, or run `{command}`"
            ) from error
        is_newer = status.st_mtime_ns > written
        if not os.access(shard, os.R_OK):
            raise DataError(f"shard {shard} may not be read; allow it, or index the others alone")
        if status.st_size != size:
            age = ": the index is older than it" if is_newer else ""
            raise DataError(
                f"shard {shard} has {status.st_size} bytes but {size} were indexed{age}; restore "
                f"it, or run `{command}` if it was changed on purpose"
            )
        if is_newer:
            newer.append(number)
    try:
        check_ends(index, newer)
    except UnreadableSample as error:
        raise DataError(f"the index {file} is older than its tar: {error}") from error


def check_ends(index: ShardIndex, shards: list[int]) -> None:
    """Read the first and last sample of shards, which differ where one was replaced.

    Raises:
        UnreadableSample: they are not as indexed.
    """
    for number in shards:
        first, stop = index.shard_starts[number : number + 2].tolist()
        for sample in sorted({first, stop - 1}) if stop > first else ():
            index.read_contents(sample)
    index.files.close()


# ---------------------------------------------------------------------------- making


def index_folder(
    location: Path | str,
    out: Path | str | None = None,
    *,
    full: bool = False,
    progress: Progress = lambda items, _: items,
    classes: Mapping[int, str] | None = None,
) -> ShardIndex:
    """Index tars and save the index; entries of tars that have not changed since are reused.

    Args:
        location: a folder, a pattern, or a URL of either.
        out: where to write; None: `index.npz` in the folder, which must then be one and local.
        full: read all tars, changed or not.
        progress: wraps the iterator over shards.
        classes: names of classes by number, besides those that the samples tell.

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
        named = [*index.classes.items(), *(classes or {}).items()]
        index = replace(index, classes=join_classes(named))
        _check_samples(index, location)
        save_index(index, target)
    return load_index(target)


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
        if len(fields) > _MAX_FIELDS:
            raise DataError(
                f"shard {shard} has {len(fields)} different fields ({fields[0]!r}, {fields[1]!r}, "
                f"...), more than {_MAX_FIELDS}: what follows the first dot of a file name is its "
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
    """Entries of an index file that still fit their tars, by shard."""
    try:
        index = parse_index(read_index(file), str(file), files)
        written = file.stat().st_mtime_ns
    except (OSError, DataError):
        return {}
    unchanged = {}
    if not (index.shard_left_out and index.has_keys):  # an older one, which lacks them
        return {}
    for number, shard in enumerate(index.shards):
        part = index.select([number])
        try:
            if _has_changed(part, written):
                continue
            check_ends(part, [0])
        except (DataError, OSError):
            continue
        unchanged[shard] = _without_unused_fields(part)
    return unchanged


def _has_changed(part: ShardIndex, written_ns: int) -> bool:
    shard, size = part.shards[0], int(part.shard_bytes[0])
    if is_url(shard):
        return remote.size(shard) != size
    status = os.stat(shard)
    return status.st_size != size or status.st_mtime_ns >= written_ns


def _without_unused_fields(part: ShardIndex) -> ShardIndex:
    """Index of one shard as `index_shard` makes it, without the fields of other shards."""
    used = np.flatnonzero(part.field_counts()[0])
    tables = {name: getattr(part, name)[:, used] for name in MEMBER_TABLES}
    return replace(part, fields=tuple(part.fields[i] for i in used), **tables)


def _index_all(shards: Sequence[str], files: ShardFiles) -> Iterator[ShardIndex]:
    return map_in_threads(lambda shard: index_shard(shard, files), shards)


def _check_samples(index: ShardIndex, location: str) -> None:
    if not len(index):
        held = f", but {counted(index.left_out)}" if index.left_out else ""
        raise DataError(
            f"the {len(index.shards)} shards in {location} hold 0 samples{held}; write tars whose "
            f"members are files named KEY.EXTENSION"
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
