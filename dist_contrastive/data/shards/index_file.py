"""The file of an index, `index.npz`: written atomically, read without trust in what it tells."""

import errno
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import psutil
from numpy.typing import NDArray

from dist_contrastive import atomic
from dist_contrastive.data.shards.encoding import stored_array
from dist_contrastive.data.shards.index import (
    ABSENT,
    ARRAYS,
    MEMBER_TABLES,
    ShardIndex,
    index_command,
)
from dist_contrastive.data.shards.locations import folder_of, join
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.shards.storage import ShardFiles
from dist_contrastive.errors import DataError
from dist_contrastive.sentences import shown

_VERSION = 2
_CHECKED_AT_ONCE = 1 << 18  # samples
# What NumPy and `zipfile` raise for damaged files.
_DAMAGE = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, BadZipFile),
    *(AttributeError, OverflowError),
)


def save_index(index: ShardIndex, path: Path | str) -> Path:
    """Write an index atomically, and return its path.

    Shards of the folder that it is written to are named without it, so that both can move.

    Raises:
        DataError: there it cannot be written, or could not be found by its name.
    """
    path = Path(path)
    check_target(path)
    names = [_stored_name(str(path.parent), shard) for shard in index.shards]
    try:
        with atomic.open_file(path) as file:
            np.savez(
                file,
                version=np.int64(_VERSION),
                shards=np.array(names, np.str_),
                shard_sha256=np.array(index.shard_sha256, np.str_),
                fields=np.array(index.fields, np.str_),
                shard_left_out=np.array([json.dumps(x) for x in index.shard_left_out], np.str_),
                classes=np.array(json.dumps(sorted(index.classes.items())), np.str_),
                **{name: getattr(index, name) for name in ARRAYS},
            )
    except OSError as error:
        raise DataError(
            f"the index {path} cannot be written ({error.strerror}); give another place: --out "
            f"FILE.npz"
        ) from error
    return path


def check_target(path: Path) -> None:
    """Refuse a path at which no index file can be written. Raises: DataError."""
    if path.suffix != ".npz" or path.is_dir():
        raise DataError(f"{path} is no name of an index; give a file that ends in .npz")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(
            f"the index {path} cannot be written ({path.parent} is no folder that may be written "
            f"to); give another place: --out FILE.npz"
        )


def _stored_name(folder: str, shard: str) -> str:
    if is_url(shard):
        return shard
    return Path(shard).name if folder_of(shard) == folder else str(Path(shard).resolve())


def read_index(file: Path) -> bytes:
    """Content of an index file of this machine. Raises: DataError."""
    try:
        size, free = file.stat().st_size, psutil.virtual_memory().available
        if size > free // 2:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and the free memory {free}")
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"the index {file} cannot be read ({error.strerror}); allow it, or run "
            f"`{index_command(str(file.parent))}`"
        ) from error


def parse_index(data: bytes, file: str, files: ShardFiles) -> ShardIndex:
    """Index from the bytes of an index file.

    Raises:
        DataError: they hold none, or one of another version.
    """
    folder = folder_of(file)
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            version = _read_array(archive, "version").tolist()
            if version != _VERSION:
                raise ValueError(f"it has format {version}, this version reads {_VERSION}")
            arrays: dict[str, Any] = {
                name: _read_array(archive, name, t) for name, t in ARRAYS.items()
            }
            shards, sums, fields = (
                tuple(_read_array(archive, name, np.str_).tolist())
                for name in ("shards", "shard_sha256", "fields")
            )
            index = ShardIndex(
                shards=tuple(join(folder, name) for name in shards),
                shard_sha256=sums,
                fields=fields,
                files=files,
                **_notes(archive),
                **arrays,
            )
            _check_shapes(index)
            return index
    except _DAMAGE as error:
        raise DataError(
            f"the index {file} cannot be read ({shown(error)}); run `{index_command(folder)}`"
        ) from error


def _notes(archive: ZipFile) -> dict[str, Any]:
    """What older indexes lack: counts of members that are no samples, names of classes."""
    if "classes.npy" not in archive.namelist():
        return {}
    classes = dict(json.loads(str(_read_array(archive, "classes"))))
    texts = _read_array(archive, "shard_left_out", np.str_).tolist()
    counts = (dict(json.loads(text)).items() for text in texts)
    left_out = tuple(Counter({str(kind): int(n) for kind, n in pairs}) for pairs in counts)
    return {"classes": {int(n): str(x) for n, x in classes.items()}, "shard_left_out": left_out}


def _read_array(archive: ZipFile, name: str, kind: Any = None) -> NDArray[Any]:
    """Array of an index file, which holds it as it is: nothing inflates."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != ZIP_STORED:
        raise ValueError(f"its part {name} is compressed")
    array = stored_array(archive.read(entry))
    if kind is not None and not np.issubdtype(array.dtype, kind):
        raise ValueError(f"its part {name} holds {array.dtype}")
    if kind is np.str_ and array.ndim != 1:
        raise ValueError(f"its part {name} has {array.ndim} dimensions")
    return array


def _check_shapes(index: ShardIndex) -> None:
    shards, samples = len(index.shards), len(index)
    tables = [getattr(index, name).shape for name in MEMBER_TABLES]
    of_shards = (index.shard_bytes, index.shard_samples, np.array(index.shard_sha256))
    if (
        any(shape != (samples, len(index.fields)) for shape in tables)
        or any(column.shape != (shards,) for column in of_shards)
        or index.sample_offset.shape != (samples,)
        or index.shard_samples.min(initial=0) < 0
        or index.shard_samples.max(initial=0) > samples
        or index.shard_samples.sum() != samples
        or len(set(index.fields)) < len(index.fields)
        or len(set(index.shards)) < shards
    ):
        raise ValueError("its parts do not fit each other")
    limits = np.repeat(index.shard_bytes, index.shard_samples)
    for first in range(0, samples, _CHECKED_AT_ONCE):
        rows = slice(first, first + _CHECKED_AT_ONCE)
        offset, start = index.sample_offset[rows], index.member_start[rows]
        end = start.astype(np.int64) + index.member_header[rows] + index.member_size[rows]
        end[start == ABSENT] = 0
        last = end.max(axis=1, initial=0)
        if (offset < 0).any() or (last == 0).any() or (last > limits[rows] - offset).any():
            raise ValueError("it tells of samples that are not inside of their shards")
