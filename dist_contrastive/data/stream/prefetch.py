"""Items made ready ahead by a thread: while one is used the next are already being made."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Self, TypeVar

_T = TypeVar("_T")

_LOOK_S = 0.1  # how often a waiting caller looks whether it should stop
_LEAVE_S = 5.0  # how long closing waits for an item that is being made


class _Item(NamedTuple, Generic[_T]):
    value: _T


class Prefetcher(Generic[_T]):
    """The same items in their order, of which a thread makes up to `depth` ahead.

    The first one is made by the caller, in whose thread processes may be forked. A context manager:
    at its end the thread ends too, after the item that it is making, and closes the iterator. What
    waits for long is left behind.
    """

    def __init__(self, items: Iterator[_T], depth: int) -> None:
        self._items = items
        # The one that the thread holds while there is no room is one more.
        self._made: queue.Queue[_Item[_T] | BaseException] = queue.Queue(max(1, depth - 1))
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def get(self, stop: Callable[[], bool] = lambda: False) -> _T | None:
        """The next item; None after the last one, or if `stop` becomes true while it is awaited.

        Raises: what the iterator raised in the place of this item.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._make, daemon=True)
            first = next(self._items, None)
            self._thread.start()
            return first
        while not stop():
            with contextlib.suppress(queue.Empty):
                made = self._made.get(timeout=_LOOK_S)
                if isinstance(made, _Item):
                    return made.value
                self._made.put(made)  # it is the last, however often it is asked for
                if isinstance(made, StopIteration):
                    return None
                raise made
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread is None or not self._thread.is_alive():
            _close(self._items)
            return
        deadline = time.monotonic() + _LEAVE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # it may wait for room
                self._made.get_nowait()
            self._thread.join(_LOOK_S / 10)

    def _make(self) -> None:
        try:
            for item in self._items:
                self._made.put(_Item(item))
                if self._stopped.is_set():
                    break
            else:
                self._made.put(StopIteration())
        except BaseException as error:  # all that may end a thread is the caller's
            self._made.put(error)
        finally:
            _close(self._items)


def _close(items: Iterator[_T]) -> None:
    end = getattr(items, "close", None)
    if end is not None:
        end()
