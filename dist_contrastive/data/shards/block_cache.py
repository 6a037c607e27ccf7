"""Blocks of remote shards on a local disk: bounded, and shared by all processes of a machine.

A shard is fetched in blocks of equal size. A block's file is named after the whole URL, the size
of the shard and the block's number, so that shards of the same name, or a shard that has been
replaced by one of another size, never meet. It is written aside and moved into place, so that it is
whole or not there. One of a fixed number of lock files keeps two processes from fetching the same
block. Where the limit is reached the blocks that were not used for the longest time go.
"""

import contextlib
import hashlib
import os
import queue
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import Field, PositiveInt

from dist_contrastive.data.shards import remote
from dist_contrastive.errors import DataError
from dist_contrastive.settings import Settings

_STRIPES = 256
_THREADS = 4  # that fetch ahead, in each process
_MAX_EXPECTED = 64  # blocks that are being fetched ahead, or wait for it
_LATELY_S = 2.0  # for which a block that was there is taken to be there still, and in use
_MAX_SEEN = 10_000  # such blocks that are remembered
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
        self._threads: list[threading.Thread]
        self._expected: dict[str, threading.Event]
        self._seen: dict[str, float]
        self._folders: dict[tuple[str, int], str] = {}
        self._wanted: queue.SimpleQueue[tuple[str, int, int]]
        self._forget_process()

    def read(self, url: str, size: int, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file of `size` bytes; fewer where it ends.

        Raises:
            UnreadableSample, UnreachableError: as `remote.read_range`.
            DataError: the folder cannot be used.
        """
        stop = min(start + length, size)
        parts = []
        for block in self._blocks(start, stop):
            begin = block * self.block_bytes
            data_from, data_to = max(start, begin) - begin, min(stop - begin, self.block_bytes)
            parts.append(self._read_block(url, size, block, data_from, data_to))
        return b"".join(parts)

    def expect(self, url: str, size: int, start: int, length: int) -> None:
        """Begin to fetch what will be read soon, unless much is being fetched already.

        It is tried once, by threads that end with the process; what fails is met by the reader.
        """
        if self._process != os.getpid():
            self._forget_process()  # threads do not survive a fork
        for block in self._blocks(start, min(start + length, size)):
            path = self._path(url, size, block)
            if path in self._expected or self._is_here(path):
                continue
            if len(self._expected) >= _MAX_EXPECTED:
                return
            while len(self._threads) < _THREADS:
                self._threads.append(threading.Thread(target=self._fetch_ahead, daemon=True))
                self._threads[-1].start()
            self._expected[path] = threading.Event()
            self._wanted.put((url, size, block))

    def _fetch_ahead(self) -> None:
        while True:
            url, size, block = self._wanted.get()
            with contextlib.suppress(Exception):
                self._fetch(url, size, block, attempts=1)
            self._expected.pop(self._path(url, size, block)).set()

    def forget(self, url: str, size: int, start: int, length: int) -> None:
        """Drop blocks that turned out wrong."""
        for block in self._blocks(start, min(start + length, size)):
            path = self._path(url, size, block)
            self._seen.pop(path, None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _forget_process(self) -> None:
        self._process = os.getpid()
        self._threads = []
        self._expected = {}
        self._wanted = queue.SimpleQueue()
        self._seen = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("folder", "block_bytes", "limit_bytes")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _folders={})
        self._forget_process()

    def _blocks(self, start: int, stop: int) -> range:
        """Those that hold these bytes; none where the file ends before they begin."""
        return range(start // self.block_bytes, -(-stop // self.block_bytes) if stop > start else 0)

    def _path(self, url: str, size: int, block: int) -> str:
        folder = self._folders.get((url, size))
        if folder is None:
            name = hashlib.sha256(f"{url}\n{size}".encode()).hexdigest()[:32]
            folder = self._folders[url, size] = os.path.join(self.folder, name)
        return f"{folder}/{self.block_bytes}-{block:06d}"

    def _is_here(self, path: str) -> bool:
        """Whether a block is in the folder, or was there a moment ago."""
        now = time.monotonic()
        if now - self._seen.get(path, -_LATELY_S) < _LATELY_S:
            return True
        if len(self._seen) > _MAX_SEEN:
            self._seen.clear()
        try:
            os.utime(path)  # used now: others go first
        except FileNotFoundError:
            return False
        except OSError:  # it is another user's
            pass
        self._seen[path] = now
        return True

    def _read_block(self, url: str, size: int, block: int, start: int, stop: int) -> bytes:
        path = self._path(url, size, block)
        if self._process == os.getpid() and (fetched := self._expected.get(path)):
            fetched.wait()
        with contextlib.suppress(OSError):  # not there, or not usable, which fetching will tell
            self._is_here(path)
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), stop - start, start)
            if len(data) == stop - start:
                return data
        return self._fetch(url, size, block)[start:stop]

    def _fetch(self, url: str, size: int, block: int, attempts: int | None = None) -> bytes:
        """The bytes of a block, which is put into the folder."""
        path = self._path(url, size, block)
        begin = block * self.block_bytes
        length = min(self.block_bytes, size - begin)
        with self._lock(zlib.crc32(path.encode()) % _STRIPES):
            with contextlib.suppress(OSError):  # another process may have been faster
                if os.path.getsize(path) == length:
                    return Path(path).read_bytes()
            data = remote.read_range(url, begin, begin + length, size, attempts)
            self._store(path, data)
        return data

    @contextlib.contextmanager
    def _lock(self, name: int | str) -> Iterator[None]:
        """Held by one process at a time. Raises DataError where the folder does not allow it."""
        locks = self.folder / "locks"
        lock = FileLock(locks / str(name), is_singleton=False)
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise DataError(
                f"the cache of remote shards {self.folder} cannot be used ({error}); set "
                f"data.cache.folder to a folder of a local disk that may be written"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _store(self, path: str, data: bytes) -> None:
        aside = Path(f"{path}.{os.getpid()}.{threading.get_ident()}{_SUFFIX}")
        try:
            self._make_room(len(data))
            aside.parent.mkdir(exist_ok=True)
            aside.write_bytes(data)
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"blocks of remote shards cannot be kept in {self.folder} "
                    f"({error.strerror}), and are fetched whenever they are needed; make room, or "
                    f"set data.cache.folder",
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
