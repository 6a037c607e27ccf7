"""The index as a file, `index.npz`: written whole, read with its tars compared."""

import contextlib
import io
import os
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.block_cache import BlockCache, CacheSettings
from dist_contrastive.data.shards.files import ShardFiles
from dist_contrastive.data.shards.index import ShardIndex, concatenate, index_command
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    find_shards,
    folder_of,
    is_pattern,
    is_url,
    join,
)
from dist_contrastive.errors import DataError, UnreadableSample

_VERSION = 2
# What `zipfile` says of damage.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)
_ARRAYS = {
    "shard_bytes": np.int64,
    "shard_samples": np.int64,
    "sample_offset": np.int64,
    "member_start": np.uint32,
    "member_header": np.uint16,
    "member_size": np.uint32,
    "member_crc32": np.uint32,
}


def save_index(index: ShardIndex, path: Path | str) -> Path:
    """Write an index, whole or not at all, and return its path.

    Shards of the folder that it is written to are named without it, so that both can move.

    Raises:
        DataError: there it cannot be written, or could not be found by its name.
    """
    path = Path(path)
    check_target(path)
    names = [_name_from(str(path.parent), shard) for shard in index.shards]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                version=np.int64(_VERSION),
                shards=np.array(names, np.str_),
                shard_sha256=np.array(index.shard_sha256, np.str_),
                fields=np.array(index.fields, np.str_),
                **{name: getattr(index, name) for name in _ARRAYS},
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(
            f"the index {path} cannot be written ({error.strerror}); give another place: --out "
            f"FILE.npz"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def check_target(path: Path) -> None:
    """Refuse a place for an index file that cannot be one. Raises DataError."""
    if path.suffix != ".npz" or path.is_dir():
        raise DataError(f"{path} is no name of an index; give a file that ends in .npz")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(
            f"the index {path} cannot be written ({path.parent} is no folder that may be written "
            f"to); give another place: --out FILE.npz"
        )


def _name_from(folder: str, shard: str) -> str:
    if is_url(shard):
        return shard
    return Path(shard).name if folder_of(shard) == folder else str(Path(shard).resolve())


def load_index(location: Path | str, cache: CacheSettings | None = None) -> ShardIndex:
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
    """The part of the indexes beside the shards that a pattern names."""
    found = []
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
        found.append(part)
    return concatenate(found)


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
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise DataError(
                f"the index {file} cannot be read ({error.strerror}); allow it"
            ) from error
    return parse_index(data, file, files)


def parse_index(data: bytes, file: str, files: ShardFiles) -> ShardIndex:
    """The index that the bytes of an index file hold.

    Raises:
        DataError: they hold none, or one of another version.
    """
    folder = folder_of(file)
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):
            raise ValueError("it is not an npz file")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            version = int(stored["version"])
            if version != _VERSION:
                raise ValueError(f"it has format {version}, this version reads {_VERSION}")
            arrays: dict[str, Any] = {name: stored[name].astype(t) for name, t in _ARRAYS.items()}
            index = ShardIndex(
                shards=tuple(join(folder, name) for name in stored["shards"].tolist()),
                shard_sha256=tuple(stored["shard_sha256"].tolist()),
                fields=tuple(stored["fields"].tolist()),
                files=files,
                **arrays,
            )
            _check_shapes(index)
            return index
    except _DAMAGE as error:
        raise DataError(
            f"the index {file} cannot be read ({error}); run `{index_command(folder)}`"
        ) from error


def _check_shapes(index: ShardIndex) -> None:
    shards, samples = len(index.shards), len(index)
    tables = [getattr(index, name).shape for name in _ARRAYS if name.startswith("member")]
    of_shards = (index.shard_bytes, index.shard_samples, index.shard_sha256)
    if (
        any(shape != (samples, len(index.fields)) for shape in tables)
        or any(len(column) != shards for column in of_shards)
        or index.shard_samples.sum() != samples
    ):
        raise ValueError("its parts do not fit each other")


def _check_local(index: ShardIndex, file: Path) -> None:
    """The tars of the folder must be those of the index, if it is the index of the folder."""
    if file.name == INDEX_NAME and all(folder_of(s) == str(file.parent) for s in index.shards):
        found, command = find_shards(str(file.parent)), index_command(str(file.parent))
        indexed = set(index.shards)
        if new := [shard for shard in found if shard not in indexed]:
            raise DataError(
                f"shard {new[0]} is in the folder but not in the index (the folder has "
                f"{len(found)} shards, the index lists {len(indexed)}); run `{command}`"
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
    """A shard replaced by another of its size shows in its first or its last sample.

    Raises:
        UnreadableSample: there one was.
    """
    for number in shards:
        first, stop = index.shard_starts[number : number + 2].tolist()
        for sample in sorted({first, stop - 1}) if stop > first else ():
            index.read_contents(sample)
    index.files.close()
