"""How far a training is, for who watches: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_S = 60.0
_SHOWN = ("loss", "lr", "samples_per_s")


class Display(Protocol):
    """Shows rows of metrics."""

    def show(self, row: dict[str, Any]) -> None:
        """The newest one."""

    def close(self) -> None:
        """No more will come."""


def display(num_steps: int, done: int) -> Display:
    """The one that fits stderr."""
    return _Bar(num_steps, done) if sys.stderr.isatty() else _Lines(num_steps)


def _text(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {row[name]:.4g}" for name in _SHOWN if name in row)


class _Bar:
    def __init__(self, num_steps: int, done: int) -> None:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(
            *columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True)
        )
        self._task = self._progress.add_task("", total=num_steps, completed=done, text="")
        self._progress.start()

    def show(self, row: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=row["step"], text=_text(row))

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """One line now and then: for each tenth of the steps, and for each minute."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // 10)
        self._next, self._last_s = 0, time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        is_due = row["step"] >= self._next or time.monotonic() - self._last_s >= _LINE_S
        if is_due or row["step"] == self._num_steps:
            print(
                f"step {row['step']}/{self._num_steps}  {_text(row)}", file=sys.stderr, flush=True
            )
            self._next, self._last_s = row["step"] + self._every, time.monotonic()

    def close(self) -> None:
        pass
