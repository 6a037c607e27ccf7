"""Bytes of shards: local ones by `pread`, remote ones through a cache of blocks on a local disk."""

import contextlib
import functools
import hashlib
import io
import logging
import os
import queue
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from pydantic import Field, PositiveInt

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.errors import DataError, UnreadableSample
from dist_contrastive.settings import Count, Settings

_logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes read at once
_MAX_OPEN = 128  # file handles of a process
_NUM_LOCKS = 256  # lock files, shared by all blocks
_THREADS = 4  # that prefetch, in each process
_MAX_PENDING = 64  # blocks that are being prefetched, or wait for it
_RECENT_S = 2.0  # seconds for which a block is assumed to be in the folder still, and in use
_MAX_RECENT = 10_000  # such blocks
_EVICT_TO = 0.9  # share of the limit that is left after an eviction
_SUFFIX = ".partial"
_STALE_S = 3600  # seconds after which a partial file was left by a process that died


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dist_contrastive" / "shards"


@functools.cache
def _folder_name(url: str, size: int) -> str:
    """Folder of the blocks of a file, inside the cache."""
    return hashlib.sha256(f"{url}\n{size}".encode()).hexdigest()[:32]


class BlockCache:
    """Least-recently-used cache of blocks of remote files, shared by all processes of a machine.

    A block's file is named by the URL, the size of the shard and the block's number, so that shards
    of one name, or a shard replaced by one of another size, never meet. It is written under another
    name and renamed, so that it is whole or not there. One of a fixed number of lock files keeps
    two processes from fetching the same block.

    By hand: of 8 shards of 125 MiB the first batch fetches 128 MiB in blocks, and all 1,004 MiB by
    fsspec's caches of whole files (8 s instead of 1 at 1 Gbit/s; benchmarks/block_cache.py).
    """

    class Config(Settings):
        """Settings of the cache of remote shards."""

        folder: Path = Field(default_factory=_default_folder)
        """Folder on a local disk, which processes and runs may share."""
        limit_mb: PositiveInt = 16_384
        """Most MiB that it may hold."""
        block_mb: Count = 4
        """MiB of one request."""

    def __init__(self, config: Config | None = None) -> None:
        config = config or self.Config()
        self.folder = config.folder
        self.block_bytes = config.block_mb << 20
        self.limit_bytes = max(config.limit_mb << 20, 2 * self.block_bytes)
        self._start_process()

    def _start_process(self) -> None:
        """State of one process: threads do not survive a fork."""
        self._process = os.getpid()
        self._threads: list[threading.Thread] = []
        self._pending: dict[str, threading.Event] = {}
        self._queue: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
        self._recent: dict[str, float] = {}
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "block_bytes", "limit_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()

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
            first, last = max(start, begin) - begin, min(stop - begin, self.block_bytes)
            parts.append(self._read_block(url, size, block, first, last))
        return b"".join(parts)

    def prefetch(self, url: str, size: int, start: int, length: int) -> None:
        """Begin to fetch blocks in threads, unless many are pending.

        One attempt each, by threads that end with the process: a reader meets what fails.
        """
        if self._process != os.getpid():
            self._start_process()
        for block in self._blocks(start, min(start + length, size)):
            path = self._path(url, size, block)
            if path in self._pending or self._is_present(path):
                continue
            if len(self._pending) >= _MAX_PENDING:
                return
            while len(self._threads) < _THREADS:
                self._threads.append(threading.Thread(target=self._prefetch_forever, daemon=True))
                self._threads[-1].start()
            self._pending[path] = threading.Event()
            self._queue.put((url, size, block))

    def _prefetch_forever(self) -> None:
        while True:
            url, size, block = self._queue.get()
            with contextlib.suppress(Exception):
                self._fetch(url, size, block, attempts=1)
            self._pending.pop(self._path(url, size, block)).set()

    def drop(self, url: str, size: int, start: int, length: int) -> None:
        """Delete blocks whose bytes are wrong."""
        for block in self._blocks(start, min(start + length, size)):
            path = self._path(url, size, block)
            self._recent.pop(path, None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _blocks(self, start: int, stop: int) -> range:
        """Numbers of the blocks of a range of bytes; none beyond the end of the file."""
        return range(start // self.block_bytes, -(-stop // self.block_bytes) if stop > start else 0)

    def _path(self, url: str, size: int, block: int) -> str:
        return f"{self.folder}/{_folder_name(url, size)}/{self.block_bytes}-{block:06d}"

    def _is_present(self, path: str) -> bool:
        """Whether a block is in the folder, or was a moment ago; marks it as used."""
        now = time.monotonic()
        if now - self._recent.get(path, -_RECENT_S) < _RECENT_S:
            return True
        if len(self._recent) > _MAX_RECENT:
            self._recent.clear()
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError:  # it is another user's
            pass
        self._recent[path] = now
        return True

    def _read_block(self, url: str, size: int, block: int, start: int, stop: int) -> bytes:
        path = self._path(url, size, block)
        if self._process == os.getpid() and (fetched := self._pending.get(path)):
            fetched.wait()
        with contextlib.suppress(OSError):  # not there, or not usable: it is fetched below
            self._is_present(path)
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), stop - start, start)
            if len(data) == stop - start:
                return data
        return self._fetch(url, size, block)[start:stop]

    def _fetch(self, url: str, size: int, block: int, attempts: int | None = None) -> bytes:
        """Bytes of a block, which is stored in the folder."""
        path = self._path(url, size, block)
        begin = block * self.block_bytes
        length = min(self.block_bytes, size - begin)
        with self._lock(zlib.crc32(path.encode()) % _NUM_LOCKS):
            with contextlib.suppress(OSError):  # another process may have been faster
                if os.path.getsize(path) == length:
                    return Path(path).read_bytes()
            data = remote.read_range(url, begin, begin + length, size, attempts)
            self._store(path, data)
        return data

    @contextlib.contextmanager
    def _lock(self, name: int | str) -> Iterator[None]:
        """Lock among processes. Raises DataError where the folder does not allow it."""
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
        partial = Path(f"{path}.{os.getpid()}.{threading.get_ident()}{_SUFFIX}")
        try:
            self._reserve(len(data))
            partial.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not self._has_warned:
                self._has_warned = True
                _logger.warning(
                    "blocks of remote shards cannot be kept in %s (%s), and are fetched whenever "
                    "they are needed; make room, or set data.cache.folder",
                    self.folder,
                    error.strerror,
                )

    def _reserve(self, length: int) -> None:
        """Count `length` bytes more, evicting blocks beyond the limit."""
        usage = self.folder / "usage"
        with self._lock("usage"):
            try:
                used = int(usage.read_text())
            except (FileNotFoundError, ValueError):
                used = self.limit_bytes  # unknown: count them
            if used + length > self.limit_bytes:
                used = self._evict(self.limit_bytes - length)
            usage.write_text(str(used + length))

    def _evict(self, most: int) -> int:
        """Bytes left after deleting the least recently used blocks, if they exceed `most`."""
        blocks = []
        for path in self.folder.glob("*/*-*"):
            with contextlib.suppress(FileNotFoundError):  # just renamed
                status = path.stat()
                blocks.append((status.st_mtime_ns, status.st_size, path))
        used = sum(length for _, length, _ in blocks)
        if used > most:
            stale = time.time_ns() - _STALE_S * 10**9
            for used_at, length, path in sorted(blocks):
                if used <= _EVICT_TO * most:
                    break
                if path.suffix != _SUFFIX or used_at < stale:  # it may be being written
                    path.unlink(missing_ok=True)  # a process that has it open reads on
                    used -= length
        return used


@contextlib.contextmanager
def temporary_cache() -> Iterator[BlockCache.Config]:
    """Empty cache that is deleted after use, where temporary files lie (TMPDIR).

    For commands that must see what a server holds now: blocks of an earlier run may be of a shard
    that has since been replaced by one of its size.
    """
    with tempfile.TemporaryDirectory(prefix="dist_contrastive-") as folder:
        yield BlockCache.Config(folder=Path(folder))


class ShardFiles:
    """Random access to shards. Handles of local ones stay open and survive a fork: `pread` shares
    no position."""

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache
        self._handles: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, size: int, start: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only where the file ends.

        Args:
            shard: path or URL. size: bytes that it is known to have.

        Raises:
            UnreadableSample: it is not there or cannot be read.
            UnreachableError: its server does not answer.
        """
        if is_url(shard):
            return self._cache.read(shard, size, start, length)
        try:
            return _pread(self._handle(shard), start, length)
        except OSError as error:
            raise UnreadableSample(
                f"shard {shard} cannot be read ({error.strerror}); restore it, or index its "
                f"folder again without it"
            ) from error

    def prefetch(self, shard: str, size: int, start: int, length: int) -> None:
        """Begin to fetch bytes that will be read soon."""
        if is_url(shard):
            self._cache.prefetch(shard, size, start, length)
        elif hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a reader meets it
                os.posix_fadvise(self._handle(shard), start, length, os.POSIX_FADV_WILLNEED)

    def drop(self, shard: str, size: int, start: int, length: int) -> None:
        """Delete cached bytes of a remote shard that are wrong."""
        self._cache.drop(shard, size, start, length)

    def close(self) -> None:
        """Close all handles; reading opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _handle(self, shard: str) -> int:
        if shard not in self._handles:
            if len(self._handles) >= _MAX_OPEN:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"_cache": self._cache, "_handles": OrderedDict()}  # spawned workers open their own

    def __del__(self) -> None:
        self.close()


def _pread(handle: int, start: int, length: int) -> bytes:
    data = os.pread(handle, length, start)
    while len(data) < length and (more := os.pread(handle, length - len(data), start + len(data))):
        data += more
    return data


@contextlib.contextmanager
def open_shard(shard: str, files: ShardFiles) -> Iterator[tuple[BinaryIO, int]]:
    """Shard as a file, and its size in bytes.

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
    """Remote shard as a file, for `tarfile`."""

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
