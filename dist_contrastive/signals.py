"""Signals that ask a run to stop: they only set a flag, which ranks vote on between steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_process_signals: list[int] | None = None
_ends_with_run = False


def listen() -> list[int]:
    """List of the signals received from now on, to the end of the process."""
    global _process_signals
    if _process_signals is None:
        _process_signals = []
        _install(_process_signals)
    return _process_signals


def end_with_run() -> None:
    """Let signals that come after a run, as a second Ctrl-C does, change nothing: the process is
    about to leave with the exit code of the run."""
    global _ends_with_run
    _ends_with_run = True


@contextmanager
def stop_flag() -> Iterator[list[int]]:
    """List of the signals received, on which ranks vote between steps; after `listen` it holds
    those received before, too."""
    if _process_signals is not None:
        yield _process_signals
        return
    received: list[int] = []
    before = _install(received)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _ends_with_run else handler)


def _install(received: list[int]) -> dict[signal.Signals, Any]:
    process = os.getpid()

    def note(number: int, _: Any) -> None:
        if os.getpid() == process:  # a forked data worker inherits this handler
            received.append(number)

    return {number: signal.signal(number, note) for number in STOP_SIGNALS}
