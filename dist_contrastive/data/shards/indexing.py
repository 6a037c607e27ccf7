"""Indexes loaded, and made of tars, whoever wrote them, wherever they lie."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.data.progress import map_in_processes, map_in_threads
from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.index import (
    MAX_FIELDS,
    MEMBER_TABLES,
    ShardIndex,
    concatenate,
    index_command,
)
from dist_contrastive.data.shards.index_file import (
    IndexWriter,
    check_target,
    parse_index,
    read_index,
)
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    counted,
    find_shards,
    folder_of,
    is_pattern,
)
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.shards.scan import index_shard
from dist_contrastive.data.shards.storage import BlockCache, ShardFiles, temporary_cache
from dist_contrastive.errors import DataError, UnreadableSample

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
    workers: int | None = None,
    reuse: Sequence[Path | str] = (),
    progress: Progress = lambda items, _: items,
    classes: Mapping[int, str] | None = None,
) -> ShardIndex:
    """Index tars and save the index; entries of tars that have not changed since are reused.

    The file is the same however it was made; no more than some tars' entries are in memory.

    Args:
        location: a folder, a pattern, or a URL of either.
        out: where to write; None: `index.npz` in the folder, which must then be one and local.
        full: read all tars, changed or not.
        workers: processes that read tars; None: threads of this one, as many as CPUs.
        reuse: index files of some of the tars, whose entries are taken too: so that several
            machines may read a part each.
        progress: wraps the iterator over shards.
        classes: names of classes by number, besides those that the samples tell.

    Raises:
        DataError: no shards or samples; a tar truncated, damaged or with a key twice; nowhere to
            write; an index file to reuse that cannot be read.
    """
    location = str(location) if is_url(str(location)) else str(Path(location))
    shards = find_shards(location)
    target = Path(out) if out is not None else _place(location, shards)
    check_target(target)
    with temporary_cache() as cache:  # what the server holds now, not what was kept of it
        files = ShardFiles(BlockCache(cache))
        known = {} if full else _unchanged(shards, target, reuse, files)
        new = [shard for shard in shards if shard not in known]
        with IndexWriter(target) as writer, closing(_index_all(new, files, workers)) as made:
            read = iter(progress(made, len(new)))
            for shard in shards:
                part = known[shard]() if shard in known else next(read)
                writer.add(replace(part, shards=(shard,)))
            next(read, None)  # a bar ends after its last item
            _check_samples(writer, location)
            writer.save(classes or {})
    return load_index(target)


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


def _unchanged(
    shards: Sequence[str], target: Path, reuse: Sequence[Path | str], files: ShardFiles
) -> dict[str, Callable[[], ShardIndex]]:
    """Makers of the entries of index files that still fit their tars, by shard."""
    unchanged: dict[str, Callable[[], ShardIndex]] = {}
    wanted = {_resolved(shard): shard for shard in shards}
    for file in [target, *map(Path, reuse)]:
        try:
            index = parse_index(read_index(file), str(file), files)
            written = file.stat().st_mtime_ns
        except (OSError, DataError):
            if file != target:
                raise
            continue
        if not (index.shard_left_out and index.has_keys):  # an older one, which lacks them
            continue
        for number, name in enumerate(index.shards):
            shard = wanted.get(_resolved(name))
            if shard is not None and _is_unchanged(index, number, written):
                unchanged[shard] = partial(_entry, index, number)
    return unchanged


def _resolved(shard: str) -> str:
    return shard if is_url(shard) else os.path.realpath(shard)


def _entry(index: ShardIndex, number: int) -> ShardIndex:
    return _without_unused_fields(index.select([number]))


def _is_unchanged(index: ShardIndex, number: int, written_ns: int) -> bool:
    part = index.select([number])
    try:
        if _has_changed(part, written_ns):
            return False
        check_ends(part, [0])
    except (DataError, OSError):
        return False
    return True


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


def _index_all(
    shards: Sequence[str], files: ShardFiles, workers: int | None
) -> Generator[ShardIndex, None, None]:
    if workers is None or len(shards) < 2:
        return map_in_threads(lambda shard: index_shard(shard, files), shards)
    return map_in_processes(partial(index_shard, files=files), shards, workers)


def _check_samples(writer: IndexWriter, location: str) -> None:
    if not writer.samples:
        held = f", but {counted(writer.left_out)}" if writer.left_out else ""
        raise DataError(
            f"the {len(writer.shards)} shards in {location} hold 0 samples{held}; write tars whose "
            f"members are files named KEY.EXTENSION"
        )
    if len(writer.fields) > MAX_FIELDS:
        raise DataError(
            f"the shards in {location} have {len(writer.fields)} different fields, more than "
            f"{MAX_FIELDS}; name members KEY.EXTENSION with keys that hold no dots"
        )
