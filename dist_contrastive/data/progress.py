"""Long work: several pieces at a time; how far it is, as a bar on a terminal, nothing elsewhere."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_T = TypeVar("_T")
_R = TypeVar("_R")


def shown(items: Iterable[_T], total: int | None, what: str) -> Iterator[_T]:
    """The same items, a bar on stderr counting them if that is a terminal.

    Args:
        total: how many there will be, None if that is not known.
        what: is done with them, as "packing".
    """
    console = Console(stderr=True)
    yield from track(items, what, total, console=console, disable=not sys.stderr.isatty())


def by_threads(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """What comes of each item, in order, one thread a core: for work that hashes, decodes or reads,
    which leaves the interpreter free."""
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as threads:
        try:
            yield from threads.map(work, items)
        finally:
            threads.shutdown(cancel_futures=True)
