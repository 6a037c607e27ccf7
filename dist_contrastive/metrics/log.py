"""Rows of metrics: to metrics.jsonl, to a tracker, and to a progress bar or lines of a log.

`JsonLines` is a file of whole lines, `Ledger` one of the keys of every batch, `Display` shows rows
on a terminal or in the log, and `MetricsLog` is all of them for the rank that writes.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_contrastive.records import keep_lines, numbers_in, open_own, read_lines

_log = logging.getLogger(__name__)


class JsonLines:
    """Appends to a file of JSON lines: a line is written whole or not at all.

    A line that cannot be written, as on a full disk, is no error: one warning, and the number of
    missing lines at the end. A training does not end for want of a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_own(path, "ab")
        self._lost = 0

    def write(self, row: dict[str, Any]) -> None:
        """One line."""
        line = (json.dumps(row) + "\n").encode()
        size = self._file.seek(0, 2)
        problem = "the disk is full"
        try:
            if self._file.write(line) == len(line):
                return
        except OSError as error:
            problem = str(error)
        self._file.truncate(size)  # of a part of it
        if not self._lost:
            name = self._path.name
            _log.warning("%s is not written (%s); the training goes on without", name, problem)
        self._lost += 1

    def close(self) -> None:
        """Close the file, with a warning if lines are missing."""
        self._file.close()
        if self._lost:
            _log.warning("%s lacks %d lines", self._path, self._lost)


class Ledger:
    """Keys of this rank's rows of every step, in ledger/rank-R.jsonl.

    A step stands there once for each rank that it had: what a killed run wrote after its last
    checkpoint is removed by `forget_steps`.
    """

    def __init__(self, folder: Path, rank: int, enabled: bool) -> None:
        self._lines: JsonLines | None = None
        if enabled:
            (folder / "ledger").mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(folder / "ledger" / f"rank-{rank}.jsonl")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lines:
            self._lines.close()

    def write(self, step: int, keys: list[str]) -> None:
        """One line; step 0 is the first."""
        if self._lines:
            self._lines.write({"step": step, "keys": keys})


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Numbers in the rows of a run's metrics.jsonl that can be read and tell a step."""
    rows = map(numbers_in, read_lines(folder / "metrics.jsonl"))
    return [row for row in rows if "step" in row]


def forget_steps(folder: Path, done: int) -> None:
    """Remove lines about steps after the first `done`, which are done again, perhaps by another
    number of ranks. Called by one rank before any opens these files."""
    for path in [*folder.glob("ledger/rank-*.jsonl"), *folder.glob("skipped.jsonl")]:
        keep_lines(path, lambda row: _step(row) < done)  # they count from 0
    for path in folder.glob("metrics.jsonl"):
        keep_lines(path, lambda row: _step(row) <= done)


def _step(row: dict[str, Any]) -> float:
    """Step of a row; one that tells none is as if it were of a later step."""
    step = row.get("step")
    return step if isinstance(step, int | float) else math.inf


_LINE_S = 60.0
_SHOWN = ("loss", "lr", "samples_per_s")


class Display(Protocol):
    """Progress of a run, as a bar on stderr or as lines of the log."""

    def show(self, row: dict[str, Any]) -> None:
        """The newest row of metrics."""

    def close(self) -> None:
        """The last row has been shown."""


def display(num_steps: int, done: int) -> Display:
    """A progress bar on a terminal, lines elsewhere."""
    return _Bar(num_steps, done) if sys.stderr.isatty() else _Lines(num_steps, done)


def _text(row: dict[str, Any]) -> str:
    names = [*_SHOWN, *(name for name in row if name.startswith("eval/"))]
    return "  ".join(f"{name} {row[name]:.4g}" for name in names if name in row)


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
    """Lines for the first step, the next row, each tenth of the steps, a minute, and measures."""

    def __init__(self, num_steps: int, done: int) -> None:
        self._num_steps, self._first = num_steps, done + 1
        self._every = max(1, num_steps // 10)
        self._next, self._last_s = 0, time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        is_due = row["step"] >= self._next or time.monotonic() - self._last_s >= _LINE_S
        is_measured = any(name.startswith("eval/") for name in row)
        if is_due or is_measured or row["step"] == self._num_steps:
            _log.info("step %d/%d  %s", row["step"], self._num_steps, _text(row))
            self._last_s = time.monotonic()
            if row["step"] != self._first:
                self._next = row["step"] + self._every

    def close(self) -> None:
        pass


Tracker = Callable[[dict[str, float], int], None]
"""Takes numbers by name, and the number of steps done."""


class MetricsLog:
    """Writes rows of metrics; on ranks other than the first one it writes nothing.

    Args:
        folder: the run directory. num_steps: of the whole run. resumed_at: steps done before.
        tracker: of the first rank.
    """

    def __init__(
        self, folder: Path, num_steps: int, resumed_at: int, tracker: Tracker, enabled: bool
    ) -> None:
        self._enabled = enabled
        if enabled:
            self._lines = JsonLines(folder / "metrics.jsonl")
            self._tracker = tracker
            self._display = display(num_steps, resumed_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            self._display.close()
            self._lines.close()

    def write(self, row: dict[str, Any]) -> None:
        """One row; it holds `step` (the number of steps done) and numbers."""
        if not self._enabled:
            return
        self._lines.write(row)
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        self._tracker(numbers, row["step"])

    def show(self, row: dict[str, Any]) -> None:
        """Show one row on a terminal or in the log."""
        if self._enabled:
            self._display.show(row)
