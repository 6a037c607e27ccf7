"""Bytes of shards, local or remote, by any process that holds the index."""

import contextlib
import os
from collections import OrderedDict
from typing import Any

from dist_contrastive.data.shards.block_cache import BlockCache
from dist_contrastive.data.shards.locations import is_url
from dist_contrastive.errors import UnreadableSample

_MAX_OPEN = 128  # file handles a process keeps open


class ShardFiles:
    """Reads shards by position. Of local ones the handles of the last are kept, which survive a
    fork: `pread` shares no position. Remote ones go through the cache."""

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
            return _read_handle(self._handle(shard), start, length)
        except OSError as error:
            raise UnreadableSample(
                f"shard {shard} cannot be read ({error.strerror}); restore it, or index its "
                f"folder again without it"
            ) from error

    def expect(self, shard: str, size: int, start: int, length: int) -> None:
        """These bytes will be read soon: fetch them meanwhile."""
        if is_url(shard):
            self._cache.expect(shard, size, start, length)
        elif hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # reading will tell
                os.posix_fadvise(self._handle(shard), start, length, os.POSIX_FADV_WILLNEED)

    def forget(self, shard: str, size: int, start: int, length: int) -> None:
        """Drop what is kept of these bytes of a remote shard, since they are not right."""
        self._cache.forget(shard, size, start, length)

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


def _read_handle(handle: int, start: int, length: int) -> bytes:
    data = os.pread(handle, length, start)
    while len(data) < length and (more := os.pread(handle, length - len(data), start + len(data))):
        data += more
    return data
