"""Blocks of remote shards on a local disk: bounded, and shared by all processes of a machine.

A shard is fetched in blocks of equal size. A block's file is named after the whole URL, the size
of the shard and the block's number, so that shards of the same name, or a shard that has been
replaced by one of another size, never meet. It is written aside and moved into place, so that it is
whole or not there. One of a fixed number of lock files keeps two processes from fetching the same
block. Where the limit is reached the blocks that were not used for the longest time go.
"""

import errno
import hashlib
import os
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import Field, PositiveInt

from dist_contrastive.data.shards import remote
from dist_contrastive.settings import Settings

_STRIPES = 256
_THREADS = 4  # that fetch ahead, in each process
_MAX_EXPECTED = 64  # blocks that are being fetched ahead, or wait for it
_KEPT = 0.9  # of the limit is left when room is made
_SUFFIX = ".partial"
_STALE_S = 3600  # after which a file that is being written was left by a process that died


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dist_contrastive" / "shards"


class CacheSettings(Settings):
    """Where blocks of remote shards are kept, and how many."""

    folder: Path = Field(default_factory=_default_folder)
    """On a local disk; processes of a machine may share it, and so may runs."""
    limit_mb: PositiveInt = 16_384
    """MiB that it may hold."""
    block_mb: PositiveInt = 4
    """MiB that are asked for at once."""


class BlockCache:
    """Reads remote files through a folder of their blocks."""

    def __init__(self, settings: CacheSettings | None = None) -> None:
        settings = settings or CacheSettings()
        self.folder = settings.folder
        self.block_bytes = settings.block_mb << 20
        self.limit_bytes = max(settings.limit_mb << 20, 2 * self.block_bytes)
        self._threads: ThreadPoolExecutor | None
        self._expected: dict[Path, Future[bytes]]
        self._forget_process()

    def read(self, url: str, size: int, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file of `size` bytes; fewer where it ends.

        Raises:
            UnreadableSample, UnreachableError: as `remote.read_range`.
        """
        stop = min(start + length, size)
        parts = []
        for block in self._blocks(start, stop):
            begin = block * self.block_bytes
            data_from, data_to = max(start, begin) - begin, min(stop - begin, self.block_bytes)
            parts.append(self._read_block(url, size, block, data_from, data_to))
        return b"".join(parts)

    def expect(self, url: str, size: int, start: int, length: int) -> None:
        """Begin to fetch what will be read soon, unless much is being fetched already."""
        if self._process != os.getpid():
            self._forget_process()  # threads do not survive a fork
        for path in [path for path, fetched in self._expected.items() if fetched.done()]:
            if self._expected[path].exception() is None:
                del self._expected[path]
        for block in self._blocks(start, min(start + length, size)):
            path = self._path(url, size, block)
            if path in self._expected or path.exists():
                continue
            if len(self._expected) >= _MAX_EXPECTED:
                return
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
            self._expected[path] = self._threads.submit(self._fetch, url, size, block, False)

    def forget(self, url: str, size: int, start: int, length: int) -> bool:
        """Drop blocks that turned out wrong; whether there were any."""
        found = False
        for block in self._blocks(start, min(start + length, size)):
            try:
                self._path(url, size, block).unlink()
                found = True
            except FileNotFoundError:
                pass
        return found

    def _forget_process(self) -> None:
        self._process = os.getpid()
        self._threads = None
        self._expected = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("folder", "block_bytes", "limit_bytes")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_process()

    def _blocks(self, start: int, stop: int) -> range:
        """Those that hold these bytes; none where the file ends before they begin."""
        return range(start // self.block_bytes, -(-stop // self.block_bytes) if stop > start else 0)

    def _path(self, url: str, size: int, block: int) -> Path:
        shard = hashlib.sha256(f"{url}\n{size}".encode()).hexdigest()[:32]
        return self.folder / shard / f"{self.block_bytes}-{block:06d}"

    def _read_block(self, url: str, size: int, block: int, start: int, stop: int) -> bytes:
        path = self._path(url, size, block)
        if self._process == os.getpid() and (fetched := self._expected.pop(path, None)):
            fetched.result()
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), stop - start, start)
                os.utime(file.fileno())  # used now: others go first
            if len(data) == stop - start:
                return data
        except FileNotFoundError:
            pass
        return self._fetch(url, size, block, True)[start:stop]

    def _fetch(self, url: str, size: int, block: int, keep: bool) -> bytes:
        """Put a block into the folder; its bytes, or none if they need not be kept in memory."""
        path = self._path(url, size, block)
        begin = block * self.block_bytes
        length = min(self.block_bytes, size - begin)
        with self._lock(str(int(path.parent.name, 16) + block)):
            try:  # another process may have been faster
                if path.stat().st_size == length:
                    return path.read_bytes() if keep else b""
            except FileNotFoundError:
                pass
            data = remote.read_range(url, begin, begin + length, size)
            self._store(path, data)
        return data if keep else b""

    def _lock(self, name: str) -> FileLock:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        number = name if name == "usage" else f"{int(name) % _STRIPES:03d}"
        return FileLock(locks / number, is_singleton=False)

    def _store(self, path: Path, data: bytes) -> None:
        aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{_SUFFIX}")
        try:
            self._make_room(len(data))
            path.parent.mkdir(exist_ok=True)
            aside.write_bytes(data)
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the disk of {self.folder} is full: blocks of remote shards are fetched again "
                    f"whenever they are needed; set data.cache.limit_mb below what is free",
                    stacklevel=2,
                )

    def _make_room(self, length: int) -> None:
        """Count `length` bytes more, after deleting the oldest blocks if there are too many."""
        usage = self.folder / "usage"
        with self._lock("usage"):
            try:
                used = int(usage.read_text())
            except (FileNotFoundError, ValueError):
                used = self.limit_bytes  # not known: count them
            if used + length > self.limit_bytes:
                used = self._delete_oldest(self.limit_bytes - length)
            usage.write_text(str(used + length))

    def _delete_oldest(self, most: int) -> int:
        """Delete blocks if they are more than `most` bytes; the bytes that are left."""
        found = []
        for path in self.folder.glob("*/*-*"):
            try:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
            except FileNotFoundError:  # just moved into place
                pass
        used = sum(length for _, length, _ in found)
        if used > most:
            stale = time.time_ns() - _STALE_S * 10**9
            for used_at, length, path in sorted(found):
                if used <= _KEPT * most:
                    break
                if path.suffix != _SUFFIX or used_at < stale:  # it may be being written
                    path.unlink(missing_ok=True)  # a process that has it open reads on
                    used -= length
        return used
