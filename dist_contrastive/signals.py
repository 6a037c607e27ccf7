"""Signals that ask a run to stop: they only set a flag, which ranks vote on between steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_all_along: list[int] | None = None


def listen() -> list[int]:
    """A list that gets the signals received from now on, to the end of the process."""
    global _all_along
    if _all_along is None:
        _all_along = []
        _install(_all_along)
    return _all_along


@contextmanager
def stop_flag() -> Iterator[list[int]]:
    """A list that holds the signals received; ranks agree about it between steps. Where the process
    has listened all along it holds those received before, too."""
    if _all_along is not None:
        yield _all_along
        return
    received: list[int] = []
    before = _install(received)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _install(received: list[int]) -> dict[signal.Signals, Any]:
    process = os.getpid()

    def note(number: int, _: Any) -> None:
        if os.getpid() == process:  # a forked data worker inherits this handler
            received.append(number)

    return {number: signal.signal(number, note) for number in STOP_SIGNALS}
