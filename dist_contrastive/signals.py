"""Signals that ask a run to stop: they only set a flag, which ranks vote on between steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def stop_flag() -> Iterator[list[int]]:
    """A list that holds the signals received; ranks agree about it between steps."""
    received: list[int] = []
    process = os.getpid()

    def note(number: int, _: Any) -> None:
        if os.getpid() == process:  # a forked data worker inherits this handler
            received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
