"""Allocator of the C library in the processes of a training."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # as malloc.h numbers them
_LARGEST = 2**31 - 1
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Freed blocks stay with this process, and with those that it forks, for the next step.

    Otherwise glibc gives large ones back to the system, which fills each of their pages with zeros
    when the next step asks for them. The process holds no more than its peak; at the end it is
    given back. Variables of the user's that set the allocator go first.

    Returns:
        Whether it is set: not without glibc, and not where a variable decides.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in tunables or any(name in os.environ for name in _OWN):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # Older versions refuse a threshold above 32 MiB; no blocks outside the heap are then allowed.
    in_heap = libc.mallopt(_MMAP_THRESHOLD, _LARGEST) or libc.mallopt(_MMAP_MAX, 0)
    return bool(in_heap and libc.mallopt(_TRIM_THRESHOLD, _LARGEST))


def give_back_freed_memory() -> None:
    """Give freed blocks back to the system once, after work that needs far more than the steps."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
