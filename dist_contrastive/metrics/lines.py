"""Files of JSON lines."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from dist_contrastive.atomic import write_text


class JsonLines:
    """Appends to a file of JSON lines: a line is written whole or not at all.

    Where it cannot be written, as on a full disk, that is said once, and no error: a training does
    not end for want of a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
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
            told = f"{self._path.name} is not written ({problem}); the training goes on without"
            print(told, file=sys.stderr, flush=True)
        self._lost += 1

    def close(self) -> None:
        """Say how many lines are missing, if any are."""
        self._file.close()
        if self._lost:
            print(f"{self._path} lacks {self._lost} lines", file=sys.stderr, flush=True)


class Ledger:
    """The keys of this rank's rows of every step, in ledger/rank-R.jsonl, if asked for.

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
    """The rows of a run's metrics.jsonl; an unfinished last line is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_steps(folder: Path, done: int) -> None:
    """Remove what tells of steps after the first `done`: they are done again, perhaps by another
    number of ranks. Called by one rank before any opens these files."""
    for path in [*folder.glob("ledger/rank-*.jsonl"), *folder.glob("skipped.jsonl")]:
        _keep_lines(path, lambda row: row["step"] < done)  # they count from 0
    for path in folder.glob("metrics.jsonl"):
        _keep_lines(path, lambda row: row["step"] <= done)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave out the other lines, and an unfinished last one."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if keep(json.loads(line))]
    if kept != lines:
        write_text(path, "".join(kept))
