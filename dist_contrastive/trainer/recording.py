"""What a run writes of its steps: metrics, the ledger, a profile."""

from contextlib import ExitStack
from typing import Any, Self

from dist_contrastive import collectives
from dist_contrastive.backend import Trackers
from dist_contrastive.metrics import Ledger, MetricsLog, forget_steps
from dist_contrastive.trainer.attempts import count_attempt
from dist_contrastive.trainer.describing import describe, writable
from dist_contrastive.trainer.profiling import Profiler
from dist_contrastive.trainer.start import Run


class Recorder:
    """Opens these files of a run that is about to train, and closes them.

    Raises:
        ConfigError: on all ranks: they cannot be written, or a tracker does not start.
        NoProgressError: on all ranks, see `count_attempt`.
    """

    def __init__(self, run: Run) -> None:
        config, first, rank = run.config, run.progress.step, run.backend.rank
        run_dir, train = config.run_dir, config.train
        self._run = run
        with collectives.raised_together(), writable(run_dir):
            if run.backend.is_main:
                describe(run)
                count_attempt(run)
                forget_steps(run_dir, first)
        with collectives.raised_together(), writable(run_dir), ExitStack() as opened:
            names = train.trackers if run.backend.is_main else ()
            plain = config.model_dump(mode="json")
            tracker = opened.enter_context(
                Trackers(names, run_dir, train.tracker_project, first, plain)
            )
            self._log = opened.enter_context(
                MetricsLog(run_dir, train.steps, first, tracker, run.backend.is_main)
            )
            self._ledger = opened.enter_context(Ledger(run_dir, rank, train.ledger))
            self._profiler = opened.enter_context(Profiler(run_dir, rank, train.profile_steps))
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def begin_step(self, keys: list[str]) -> None:
        """A step on these rows of this rank."""
        self._profiler.before(self._run.progress.step + 1)
        self._ledger.write(self._run.progress.step, keys)

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics."""
        self._log.write(row)
