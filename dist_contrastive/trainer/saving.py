"""Checkpoints of a run: written in turn or in the background, scored, retried after failures."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from dist_contrastive import checkpoint, collectives
from dist_contrastive.checkpoint import Keep, Progress
from dist_contrastive.errors import ConfigError, NonFiniteError, StorageError
from dist_contrastive.trainer.run import Run


class Saver:
    """Checkpoints of a run; every method is called on all ranks alike.

    One that cannot be written in the middle of a training is logged, and the next one is tried; at
    the end, or where the run is to stop, that is an error.

    Collectives: in `save` and `save_last`, those of the engine's state, and gathers of objects.
    """

    def __init__(self, run: Run) -> None:
        train = run.config.train
        self._run, self._best, self._in_background = run, train.keep_best, train.async_save
        self._root = run.config.run_dir / "checkpoints"
        self._keep = Keep(
            train.keep_last, train.keep_every, self._best.mode if self._best else None
        )
        self._scores: list[float] = []  # since the previous checkpoint
        self._writer = ThreadPoolExecutor(1)
        self._pending: tuple[Progress, Future[Path]] | None = None
        self._begun_s, self._save_s = 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._writer.shutdown(wait=True)

    def observe(self, row: dict[str, Any]) -> None:
        """Add a row of metrics to the score of the next checkpoint.

        Raises:
            ConfigError: it lacks the metric of `train.keep_best`.
        """
        if self._best is None:
            return
        if self._best.metric.startswith(("eval/", "online/")) and self._best.metric not in row:
            return  # it is measured now and then
        if self._best.metric not in row:
            raise ConfigError(
                f"train.keep_best.metric={self._best.metric} is not measured; choose one of "
                f"{', '.join(row)}"
            )
        self._scores.append(row[self._best.metric])

    def timing(self) -> dict[str, float]:
        """Seconds that the last checkpoint took, from its begin until it was whole."""
        return {"save_s": self._save_s} if self._save_s else {}

    def save(self) -> None:
        """Write a checkpoint; a failure is only logged.

        Raises:
            NonFiniteError: the weights hold NaN or infinity; nothing is written.
        """
        self._finish()
        self._begin()
        if not self._in_background:
            self._finish()

    def save_last(self) -> None:
        """Wait for the checkpoint that is being written, and write the steps since.

        Raises:
            StorageError: it could not be written.
        """
        problem = self._finish()
        if self._run.progress != self._run.saved:
            self._begin()
            problem = self._finish()
        if problem is None:
            return
        saved = self._run.saved
        usable = f"that of step {saved.step} is whole" if saved.step else "there is none before it"
        raise StorageError(f"{problem}; {usable}; make room and start again")

    def _begin(self) -> None:
        run, score = self._run, None
        self._begun_s = time.perf_counter()
        weights, state = run.engine.weights(), run.optimizer_state()
        with collectives.raised_together():
            _check_weights(weights, run.progress.step)
        if self._scores:
            score, self._scores = math.fsum(self._scores) / len(self._scores), []
        arguments = (self._root, run.progress, weights, state, self._keep, score)
        if run.backend.is_main:
            self._pending = run.progress, self._writer.submit(self._write, *arguments)
        else:
            self._pending = run.progress, Future()

    def _write(self, *arguments: Any) -> Path:
        folder = checkpoint.save(*arguments)
        self._save_s = time.perf_counter() - self._begun_s
        return folder

    def _finish(self) -> str | None:
        """Wait for the checkpoint that is being written; the reason if it could not be."""
        if self._pending is None:
            return None
        progress, written = self._pending
        self._pending = None
        problem = None
        with collectives.raised_together():
            if self._run.backend.is_main:
                try:
                    written.result()
                except OSError as error:
                    problem = f"the checkpoint of step {progress.step} is not written: {error}"
        problem = collectives.gather_objects(problem)[0]
        if problem is None:
            self._run.saved = progress
        else:
            self._run.warning(problem)
        return problem


def _check_weights(weights: dict[str, Tensor], step: int) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NonFiniteError(
                f"step {step}: {name} holds NaN or infinity, and is not saved; go on from the "
                f"checkpoint before with a lower optim.lr and --change"
            )
