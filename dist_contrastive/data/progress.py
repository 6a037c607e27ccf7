"""How far long work is: a bar on a terminal, nothing elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_T = TypeVar("_T")


def shown(items: Iterable[_T], total: int | None, what: str) -> Iterator[_T]:
    """The same items, a bar on stderr counting them if that is a terminal.

    Args:
        total: how many there will be, None if that is not known.
        what: is done with them, as "packing".
    """
    console = Console(stderr=True)
    yield from track(items, what, total, console=console, disable=not sys.stderr.isatty())
