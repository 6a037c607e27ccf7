"""The file of an index, `index.npz`: written atomically, read without trust in what it tells.

Its arrays lie in it as they are in memory. Those of a large file are mapped, not read: all
processes of a machine share them, and what is never used is never read. Then the checks of a
sample's place come when it is read.
"""

import contextlib
import io
import json
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from dist_contrastive import atomic
from dist_contrastive.data.classes import join_classes
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
_COPIED = 1 << 20  # bytes at a time
_MAPPED = 1 << 26  # bytes of a file from which on it is mapped
_LOCAL_HEADER = 30  # bytes of what stands before a member of a zip file, without its name
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
    with IndexWriter(Path(path)) as writer:
        writer.add(index)
        writer.save(index.classes)
    return Path(path)


class IndexWriter:
    """Writer of an index file from the indexes of its parts, one after the other.

    Only names and counts of shards are in memory. The file is that of
    ``np.savez(file, **arrays of concatenate(parts))``, byte for byte. A context manager.

    Attributes:
        shards, fields, samples, left_out: of all parts so far.

    Raises:
        DataError: there it cannot be written, or could not be found by its name; a shard is in two
            parts.
    """

    def __init__(self, path: Path) -> None:
        check_target(path)
        self._path = path
        self.shards: list[str] = []
        self.fields: set[str] = set()
        self.samples = 0
        self._sums: list[str] = []
        self._left_out: list[Mapping[str, int]] = []
        self._classes = set[tuple[int, str]]()
        self._parts: list[tuple[int, tuple[str, ...]]] = []  # samples and fields of each
        self._has_keys = True
        self._stack = contextlib.ExitStack()
        with self._explained():
            self._columns = {
                name: self._stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
                for name in ARRAYS
            }

    @property
    def left_out(self) -> Counter[str]:
        """Members that belong to no sample, by kind."""
        return sum(map(Counter, self._left_out), Counter())

    def add(self, part: ShardIndex) -> None:
        """Take over the shards of an index, behind those before."""
        self.shards += part.shards
        self._sums += part.shard_sha256
        self._left_out += part.shard_left_out
        self._classes |= {*part.classes.items()}
        self.fields |= {*part.fields}
        self.samples += len(part)
        self._parts.append((len(part), part.fields))
        self._has_keys &= part.has_keys
        with self._explained():
            for name, file in self._columns.items():
                for rows in _in_blocks(getattr(part, name)):
                    file.write(np.ascontiguousarray(rows, ARRAYS[name]).data)

    def save(self, classes: Mapping[int, str]) -> None:
        """Write the file, with these names of classes besides those of the parts."""
        if repeated := [shard for shard, count in Counter(self.shards).items() if count > 1]:
            raise DataError(f"shard {repeated[0]} is given twice; name every shard once")
        names = [_stored_name(str(self._path.parent), shard) for shard in self.shards]
        named = join_classes([*join_classes(self._classes).items(), *classes.items()])
        left_out = self._left_out if len(self._left_out) == len(names) else []
        heads = {
            "version": np.int64(_VERSION),
            "shards": np.array(names, np.str_),
            "shard_sha256": np.array(self._sums, np.str_),
            "fields": np.array(sorted(self.fields), np.str_),
            "shard_left_out": np.array([json.dumps(x) for x in left_out], np.str_),
            "classes": np.array(json.dumps(sorted(named.items())), np.str_),
        }
        with (
            self._explained(),
            atomic.open_file(self._path) as file,
            ZipFile(file, "w", ZIP_STORED, allowZip64=True) as archive,
        ):
            for name, array in heads.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            for name in ARRAYS:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    self._write_column(name, member)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _write_column(self, name: str, member: IO[bytes]) -> None:
        """One array of all parts, with a column for each field of any of them."""
        kind, fields = np.dtype(ARRAYS[name]), sorted(self.fields)
        shape: tuple[int, ...] = (self.samples,)
        if name.startswith("shard"):
            shape = (len(self.shards),)
        elif name == "sample_key" and not self._has_keys:
            shape = (0,)
        elif name in MEMBER_TABLES:
            shape = (self.samples, len(fields))
        header = {"descr": kind.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        file = self._columns[name]
        file.seek(0)
        if len(shape) == 1:
            if shape[0]:
                shutil.copyfileobj(file, member, _COPIED)
            return
        absent = ABSENT if name == "member_start" else 0
        for samples, own in self._parts:
            columns = [fields.index(one) for one in own]
            for first in range(0, samples, _CHECKED_AT_ONCE):
                count = min(samples - first, _CHECKED_AT_ONCE)
                table = np.full((count, len(fields)), absent, kind)
                held = file.read(count * len(own) * kind.itemsize)
                table[:, columns] = np.frombuffer(held, kind).reshape(count, len(own))
                member.write(table.data)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the index {self._path} cannot be written ({error.strerror}); give another place: "
                f"--out FILE.npz"
            ) from error


def _in_blocks(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for first in range(0, len(rows), _CHECKED_AT_ONCE):
        yield rows[first : first + _CHECKED_AT_ONCE]


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


class _Mapped(mmap.mmap):
    """A file in memory that `zipfile` can read."""

    def seekable(self) -> bool:
        return True


def read_index(file: Path) -> bytes | mmap.mmap:
    """Content of an index file of this machine, mapped if it is large. Raises: DataError."""
    try:
        if file.is_file() and file.stat().st_size >= _MAPPED:
            with file.open("rb") as opened:
                return _Mapped(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"the index {file} cannot be read ({error.strerror}); allow it, or run "
            f"`{index_command(str(file.parent))}`"
        ) from error


def parse_index(data: bytes | mmap.mmap, file: str, files: ShardFiles) -> ShardIndex:
    """Index from the bytes of an index file, or from such a file that is mapped.

    Raises:
        DataError: they hold none, or one of another version.
    """
    folder = folder_of(file)
    try:
        stream: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        with ZipFile(stream) as archive:
            version = _read_array(archive, "version").tolist()
            if version != _VERSION:
                raise ValueError(f"it has format {version}, this version reads {_VERSION}")
            arrays: dict[str, Any] = {
                name: _read_array(archive, name, t, None if isinstance(data, bytes) else data)
                for name, t in ARRAYS.items()
                if name != "sample_key" or "sample_key.npy" in archive.namelist()
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
            if isinstance(data, bytes):
                _check_places(index)
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


def _read_array(
    archive: ZipFile, name: str, kind: Any = None, mapped: mmap.mmap | None = None
) -> NDArray[Any]:
    """Array of an index file, which holds it as it is: nothing inflates.

    Args:
        mapped: the file, in which the array stays.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != ZIP_STORED:
        raise ValueError(f"its part {name} is compressed")
    array = stored_array(archive.read(entry) if mapped is None else _inside(mapped, entry))
    if kind is not None and not np.issubdtype(array.dtype, kind):
        raise ValueError(f"its part {name} holds {array.dtype}")
    if kind is np.str_ and array.ndim != 1:
        raise ValueError(f"its part {name} has {array.ndim} dimensions")
    return array


def _inside(mapped: mmap.mmap, entry: ZipInfo) -> memoryview:
    """Bytes of a member, where they lie in the file."""
    at = entry.header_offset
    header = mapped[at : at + _LOCAL_HEADER]
    lengths = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))  # of name and extras
    begin = at + _LOCAL_HEADER + sum(lengths)
    if header[:4] != b"PK\x03\x04" or begin + entry.file_size > len(mapped):
        raise ValueError(f"its part {entry.filename} is not inside of it")
    return memoryview(mapped)[begin : begin + entry.file_size]


def _check_shapes(index: ShardIndex) -> None:
    shards, samples = len(index.shards), len(index)
    tables = [getattr(index, name).shape for name in MEMBER_TABLES]
    of_shards = (index.shard_bytes, index.shard_samples, np.array(index.shard_sha256))
    if (
        any(shape != (samples, len(index.fields)) for shape in tables)
        or any(column.shape != (shards,) for column in of_shards)
        or index.sample_offset.shape != (samples,)
        or index.sample_key.shape not in ((samples,), (0,))
        or index.shard_samples.min(initial=0) < 0
        or index.shard_samples.max(initial=0) > samples
        or index.shard_samples.sum() != samples
        or len(set(index.fields)) < len(index.fields)
        or len(set(index.shards)) < shards
    ):
        raise ValueError("its parts do not fit each other")


def _check_places(index: ShardIndex) -> None:
    samples = len(index)
    limits = np.repeat(index.shard_bytes, index.shard_samples)
    for first in range(0, samples, _CHECKED_AT_ONCE):
        rows = slice(first, first + _CHECKED_AT_ONCE)
        offset, start = index.sample_offset[rows], index.member_start[rows]
        end = start.astype(np.int64) + index.member_header[rows] + index.member_size[rows]
        end[start == ABSENT] = 0
        last = end.max(axis=1, initial=0)
        if (offset < 0).any() or (last == 0).any() or (last > limits[rows] - offset).any():
            raise ValueError("it tells of samples that are not inside of their shards")
