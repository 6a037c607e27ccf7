"""Output of ranks: one file for each rank and stream, followed as it grows.

RUN/logs/JOB.rank-R.out, JOB.rank-R.err    JOB: local-DATE-TIME, or the number of a SLURM job
RUN/logs/JOB.batch.log                     of a SLURM job, before and after its ranks
"""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

_POLL_S = 0.05


def rank_log(folder: Path, job: str, rank: int | str, stream: str) -> Path:
    """The file of a rank's stream, `out` or `err`."""
    return folder / f"{job}.rank-{rank}.{stream}"


class Follower:
    """Reader of what is appended to files: whole lines, in the order of writing."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}

    def read(self, paths: Iterable[Path], to_end: bool = False) -> list[tuple[Path, str]]:
        """Text since the last call, file by file.

        Args:
            to_end: an unfinished last line too.
        """
        stats = [(path, path.stat()) for path in paths if path.exists()]
        grown = [
            (s.st_mtime_ns, path) for path, s in stats if s.st_size > self._offsets.get(path, 0)
        ]
        texts = []
        for _, path in sorted(grown):
            begin = self._offsets.get(path, 0)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read()
            if not to_end:
                data = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = begin + len(data)
            if data:
                texts.append((path, data.decode(errors="replace")))
        return texts


class Echo:
    """Thread that copies what is appended to files elsewhere, until the end of a `with`."""

    def __init__(self, paths: Callable[[], Iterable[Path]], write: Callable[[Path, str], Any]):
        self._paths, self._write = paths, write
        self._follower, self._left = Follower(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._left.set()
        self._thread.join()
        self._echo(to_end=True)

    def _run(self) -> None:
        while not self._left.wait(_POLL_S):
            self._echo()

    def _echo(self, to_end: bool = False) -> None:
        for path, text in self._follower.read(self._paths(), to_end):
            self._write(path, text)
