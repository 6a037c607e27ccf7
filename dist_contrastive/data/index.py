"""The index of a folder of shards: where every sample lies, and checksums to trust it by.

It is one small file, `index.npz`, beside the tars. With it any sample is read by one seek.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.samples import decode_sample, scan_samples
from dist_contrastive.data.shard_files import ShardFiles
from dist_contrastive.errors import DataError

INDEX_NAME = "index.npz"
_VERSION = 1

_SAMPLE_FIELDS = {
    "sample_shard": np.int32,
    "sample_offset": np.int64,
    "sample_length": np.int64,
    "sample_crc32": np.uint32,
}


def index_command(folder: Path) -> str:
    """The command that (re)builds the index of a folder, for messages."""
    return f"dist-contrastive shards index {folder}"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Shards of one folder and their n samples, numbered through all shards in name order.

    Attributes:
        folder: where the tars are.
        shard_names: S file names, sorted.
        shard_bytes: int64 [S], size of each tar.
        shard_sha256: S hexadecimal checksums, as `sha256sum` prints them.
        sample_shard: int32 [n], shard number of each sample, ascending.
        sample_offset: int64 [n], first byte of the sample in its tar.
        sample_length: int64 [n], bytes of the sample, headers and padding included.
        sample_crc32: uint32 [n], checksum of these bytes.
    """

    folder: Path
    shard_names: tuple[str, ...]
    shard_bytes: NDArray[np.int64]
    shard_sha256: tuple[str, ...]
    sample_shard: NDArray[np.int32]
    sample_offset: NDArray[np.int64]
    sample_length: NDArray[np.int64]
    sample_crc32: NDArray[np.uint32]
    _files: ShardFiles = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_files", ShardFiles())

    def __len__(self) -> int:
        return len(self.sample_shard)

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Number of samples of each shard, int64 [S]."""
        return np.bincount(self.sample_shard, minlength=len(self.shard_names)).astype(np.int64)

    @classmethod
    def build(cls, folder: Path | str) -> "ShardIndex":
        """Index all `*.tar` of a folder; nothing is written.

        Raises:
            DataError: no folder, tars or samples; a tar truncated, damaged or with a key twice.
        """
        folder = Path(folder)
        names = _tar_names(folder)
        shards = [_ShardEntries.read(folder / name) for name in names]
        counts = [len(shard.offsets) for shard in shards]
        if not sum(counts):
            raise DataError(
                f"the {len(names)} shards in {folder} hold 0 samples; write tars whose members "
                "are named KEY.EXTENSION"
            )
        return cls(
            folder=folder,
            shard_names=tuple(names),
            shard_bytes=np.array([shard.size for shard in shards], np.int64),
            shard_sha256=tuple(shard.sha256 for shard in shards),
            sample_shard=np.repeat(np.arange(len(names), dtype=np.int32), counts),
            sample_offset=np.concatenate([np.array(s.offsets, np.int64) for s in shards]),
            sample_length=np.concatenate([np.array(s.lengths, np.int64) for s in shards]),
            sample_crc32=np.concatenate([np.array(s.crc32, np.uint32) for s in shards]),
        )

    def save(self) -> Path:
        """Write `index.npz` into the folder, whole or not at all, and return its path."""
        path = self.folder / INDEX_NAME
        partial = self.folder / f".{INDEX_NAME}.{os.getpid()}.partial"
        arrays = {name: getattr(self, name) for name in _SAMPLE_FIELDS}
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    version=np.int64(_VERSION),
                    shard_names=np.array(self.shard_names, np.str_),
                    shard_bytes=self.shard_bytes,
                    shard_sha256=np.array(self.shard_sha256, np.str_),
                    **arrays,
                )
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "ShardIndex":
        """Load an index and compare it with its tars.

        Args:
            path: the folder, or the index file in it.

        Raises:
            DataError: no folder, no tars, no index, an index that cannot be read, or one that
                does not fit the tars (missing, new, of another size or with other samples at
                their ends).
        """
        file = Path(path) if Path(path).suffix == ".npz" else Path(path) / INDEX_NAME
        folder = file.parent
        names = _tar_names(folder)
        if not file.is_file():
            raise DataError(
                f"{folder} has {len(names)} shards but no {file.name}; run "
                f"`{index_command(folder)}`"
            )
        index = _read_index(file)
        _check_shards(index, names)
        return index

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Read and decode one sample: `__key__` and its fields by extension.

        Args:
            only: the fields to decode, the others are left as bytes; None decodes all.

        Raises:
            IndexError: no such sample.
            DataError: the bytes are not those that were indexed, or cannot be decoded.
        """
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} is outside 0..{len(self) - 1}")
        shard = self.shard_names[self.sample_shard[sample_number]]
        return decode_sample(self.read_bytes(sample_number), str(self.folder / shard), only)

    def read_bytes(self, sample_number: int) -> bytes:
        """The part of the tar that holds a sample.

        Raises:
            DataError: the bytes are not those that were indexed.
        """
        shard = self.shard_names[self.sample_shard[sample_number]]
        offset = int(self.sample_offset[sample_number])
        length = int(self.sample_length[sample_number])
        try:
            data = self._files.read(self.folder / shard, offset, length)
        except OSError as error:
            raise DataError(
                f"shard {self.folder / shard} cannot be read ({error.strerror}); restore it, or "
                f"run `{index_command(self.folder)}` without it"
            ) from error
        expected = int(self.sample_crc32[sample_number])
        if len(data) != length or zlib.crc32(data) != expected:
            raise DataError(
                f"shard {self.folder / shard} is damaged or was changed: sample {sample_number} "
                f"at byte {offset} has {len(data)} bytes with crc32 {zlib.crc32(data):08x} but "
                f"{length} bytes with {expected:08x} were indexed; restore the shard, or run "
                f"`{index_command(self.folder)}` if it was changed on purpose"
            )
        return data


@dataclass
class _ShardEntries:
    """What the index keeps of one tar."""

    size: int
    sha256: str
    offsets: list[int]
    lengths: list[int]
    crc32: list[int]

    @classmethod
    def read(cls, path: Path) -> "_ShardEntries":
        slices = list(scan_samples(path))
        keys: set[str] = set()
        for sample in slices:
            if sample.key in keys:
                raise DataError(
                    f"shard {path} holds the key {sample.key!r} twice, again at byte "
                    f"{sample.offset}; give every sample one key and keep its members together "
                    "(`tar --sort=name`)"
                )
            keys.add(sample.key)
        digest, crc32, position = hashlib.sha256(), [], 0
        with path.open("rb") as file:
            for sample in slices:
                digest.update(file.read(sample.offset - position))
                data = file.read(sample.length)
                digest.update(data)
                crc32.append(zlib.crc32(data))
                position = sample.offset + sample.length
            while rest := file.read(1 << 20):
                digest.update(rest)
        offsets, lengths = [s.offset for s in slices], [s.length for s in slices]
        return cls(path.stat().st_size, digest.hexdigest(), offsets, lengths, crc32)


def _tar_names(folder: Path) -> list[str]:
    """Sorted names of the tars in a folder; it must have some."""
    if not folder.is_dir():
        raise DataError(f"the shard folder {folder} does not exist; give a folder that holds tars")
    names = sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        below = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
        fix = "pack some with `dist-contrastive shards pack`"
        if below:
            fix = f"give one of its folders that does: {', '.join(below[:4])}"
        raise DataError(f"{folder} holds 0 files that end in .tar; {fix}")
    return names


def _read_index(file: Path) -> ShardIndex:
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an npz file")
        with np.load(file, allow_pickle=False) as stored:
            version = int(stored["version"])
            if version != _VERSION:
                raise ValueError(f"it has format {version}, this version reads {_VERSION}")
            samples = {name: stored[name].astype(kind) for name, kind in _SAMPLE_FIELDS.items()}
            return ShardIndex(
                folder=file.parent,
                shard_names=tuple(stored["shard_names"].tolist()),
                shard_bytes=stored["shard_bytes"].astype(np.int64),
                shard_sha256=tuple(stored["shard_sha256"].tolist()),
                **samples,
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"the index {file} cannot be read ({error}); run `{index_command(file.parent)}`"
        ) from error


def _check_shards(index: ShardIndex, names: list[str]) -> None:
    """The tars must be those of the index: the same names and sizes."""
    folder, command = index.folder, index_command(index.folder)
    indexed = set(index.shard_names)
    if missing := sorted(indexed.difference(names)):
        raise DataError(
            f"shard {folder / missing[0]} is in the index but not in the folder (the index lists "
            f"{len(indexed)} shards, the folder has {len(names)}); restore it, or run `{command}`"
        )
    if new := [name for name in names if name not in indexed]:
        raise DataError(
            f"shard {folder / new[0]} is in the folder but not in the index (the folder has "
            f"{len(names)} shards, the index lists {len(indexed)}); run `{command}`"
        )
    for name, size in zip(index.shard_names, index.shard_bytes.tolist(), strict=True):
        actual = (folder / name).stat().st_size
        if actual != size:
            raise DataError(
                f"shard {folder / name} has {actual} bytes but {size} were indexed; restore it, "
                f"or run `{command}` if it was changed on purpose"
            )
    _check_ends(index)


def _check_ends(index: ShardIndex) -> None:
    """A shard replaced by another of its size shows in its first or its last sample."""
    last = np.cumsum(index.shard_samples) - 1
    first = last - index.shard_samples + 1
    for number in np.unique(np.concatenate([first, last])[np.tile(index.shard_samples > 0, 2)]):
        index.read_bytes(int(number))
    index._files.close()
