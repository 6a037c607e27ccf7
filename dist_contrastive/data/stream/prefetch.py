"""Items made ready ahead by a thread: while one is used the next are already being made."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, NamedTuple, TypeVar

_T = TypeVar("_T")


class _Item(NamedTuple, Generic[_T]):
    value: _T


class _Error(NamedTuple):
    error: BaseException


def ahead(items: Iterator[_T], depth: int) -> Generator[_T]:
    """The same items, of which a thread makes up to `depth` before they are asked for.

    The first one is made by the caller, in whose thread processes may be forked. An error is raised
    where the item would have come. Closing it ends the thread, after the item that it is making.
    """
    first = next(items, None)
    if first is None:
        return
    # The one that the thread holds when the queue is full is one more.
    made: queue.Queue[_Item[_T] | _Error | None] = queue.Queue(max(1, depth - 1))
    stopped = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made, stopped), daemon=True)
    thread.start()
    try:
        yield first
        while (item := made.get()) is not None:
            if isinstance(item, _Error):
                raise item.error
            yield item.value
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                made.get(timeout=0.05)


def _make(
    items: Iterator[_T],
    made: "queue.Queue[_Item[_T] | _Error | None]",
    stopped: threading.Event,
) -> None:
    try:
        for item in items:
            made.put(_Item(item))
            if stopped.is_set():
                return
        made.put(None)
    except BaseException as error:  # all that may end a thread is the caller's
        made.put(_Error(error))
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
