"""Allocator of the C library in the processes of a training."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
_LARGEST = 2**31 - 1
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Freed blocks stay with this process, and with those that it forks, for the next step.

    Otherwise glibc gives large ones back to the system, which fills each of their pages with zeros
    when the next step asks for them. The process holds no more than its peak; at the end it is
    given back. Variables of the user's that set the allocator go first.

    Returns:
        Whether it is set: not without glibc, and not where a variable decides.
    """
    if any(name in os.environ for name in _OWN):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(which, _LARGEST) for which in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
