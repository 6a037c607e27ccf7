"""What a run tells while it trains: metrics.jsonl, TensorBoard, and a bar or plain lines."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_contrastive.atomic import write_text

_SHOWN = ("loss", "lr", "samples_per_s")


class MetricsLog:
    """Writes rows of metrics; on ranks other than the first one it writes nothing.

    Args:
        folder: the run directory. num_steps: of the whole run.
        resumed_at: later rows, left by a run that was killed, are removed first.
    """

    def __init__(self, folder: Path, num_steps: int, resumed_at: int, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():  # a run killed after its last checkpoint did steps that are done again
            _keep_lines(path, lambda row: row["step"] <= resumed_at)
        self._file: TextIO = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        self._display = _Bar(num_steps, resumed_at) if _is_terminal() else _Lines(num_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            self._display.close()
            self._board.close()
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        """One row; it holds `step` (the number of steps done) and numbers."""
        if not self._enabled:
            return
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["step"])
        self._display.show(row)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; an unfinished last line is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Clock:
    """Time spent, and on what."""

    def __init__(self, consumed: int, device: torch.device) -> None:
        self._start = time.perf_counter()
        self._spent_s: dict[str, float] = defaultdict(float)
        self._consumed = consumed
        self._device = device

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Count the time inside under this name."""
        begin = time.perf_counter()
        yield
        self._spent_s[name] += time.perf_counter() - begin

    def rates(self, consumed: int) -> dict[str, Any]:
        """Rates since the last call."""
        now = time.perf_counter()
        elapsed_s = now - self._start
        samples_per_s = (consumed - self._consumed) / elapsed_s
        waiting = self._spent_s["data"] / elapsed_s
        self._start, self._consumed = now, consumed
        self._spent_s.clear()
        return {"consumed": consumed, "samples_per_s": samples_per_s, "data_wait": waiting}


class Ledger:
    """The keys of this rank's rows of every step, in ledger/rank-R.jsonl, if asked for.

    A step stands there once for each rank that it had: what a killed run wrote after its last
    checkpoint is removed by `forget_steps`.
    """

    def __init__(self, folder: Path, rank: int, enabled: bool) -> None:
        self._file: TextIO | None = None
        if enabled:
            (folder / "ledger").mkdir(parents=True, exist_ok=True)
            self._file = (folder / "ledger" / f"rank-{rank}.jsonl").open("a", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()

    def write(self, step: int, keys: list[str]) -> None:
        """One line; step 0 is the first."""
        if self._file:
            self._file.write(json.dumps({"step": step, "keys": keys}) + "\n")


def forget_steps(folder: Path, done: int) -> None:
    """Remove from the ledger and from skipped.jsonl the steps after the first `done`: they are done
    again, perhaps by another number of ranks. Called by one rank before any opens these."""
    for path in [*folder.glob("ledger/rank-*.jsonl"), *folder.glob("skipped.jsonl")]:
        _keep_lines(path, lambda row: row["step"] < done)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave out the other lines of a file of JSON lines, and an unfinished last one."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write_text(path, "".join(line for line in lines if keep(json.loads(line))))


def _is_terminal() -> bool:
    return sys.stderr.isatty()


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
    """One line now and then: a log file should not grow with every step."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // 10)
        self._next = 0

    def show(self, row: dict[str, Any]) -> None:
        if row["step"] >= self._next or row["step"] == self._num_steps:
            print(
                f"step {row['step']}/{self._num_steps}  {_text(row)}", file=sys.stderr, flush=True
            )
            self._next = row["step"] + self._every

    def close(self) -> None:
        pass
