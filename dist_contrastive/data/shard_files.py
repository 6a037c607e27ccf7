"""Open shard files: bytes at an offset, by any process that holds the index."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

_MAX_OPEN = 128  # file handles a process keeps open


class ShardFiles:
    """File handles of the shards read last. They survive a fork: `pread` shares no position."""

    def __init__(self) -> None:
        self._handles: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only where the file ends. Raises OSError."""
        handle = self._handle(path)
        data = os.pread(handle, length, offset)
        while len(data) < length and (
            more := os.pread(handle, length - len(data), offset + len(data))
        ):
            data += more
        return data

    def close(self) -> None:
        """Close all; reading opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _handle(self, path: Path) -> int:
        if path not in self._handles:
            if len(self._handles) >= _MAX_OPEN:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._handles.move_to_end(path)
        return self._handles[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": OrderedDict()}  # a spawned worker opens its own

    def __del__(self) -> None:
        self.close()
