"""Records of the steps of a run: metrics, the ledger, a profile."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from dist_contrastive import collectives
from dist_contrastive.backend import Trackers
from dist_contrastive.changes import record_changes
from dist_contrastive.metrics import Ledger, MetricsLog, forget_steps
from dist_contrastive.trainer.run import Run
from dist_contrastive.trainer.run_dir import count_attempt, describe, writable


class Profiler:
    """Profile of some steps on every rank, profile/rank-R.json, for chrome://tracing or Perfetto.

    Args:
        steps: first and last step, 1 is the first of the run; None: no step.
    """

    def __init__(self, run_dir: Path, rank: int, steps: tuple[int, int] | None) -> None:
        self._steps, self._path = steps, run_dir / "profile" / f"rank-{rank}.json"
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def begin_step(self, step: int) -> None:
        """Start before the first of the steps, write after the last one.

        Collectives: a gather of objects when the profile is written.
        """
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and first <= step <= last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.__enter__()
        elif self._profile is not None and step > last:
            self._write(self._profile)
            self._profile = None

    def _write(self, finished: profile) -> None:
        finished.__exit__(None, None, None)
        with collectives.raised_together(), writable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self._path))


class Recorder:
    """Metrics, ledger and profile of a run that trains. Made by `open`; a context manager."""

    def __init__(
        self, run: Run, metrics: MetricsLog, ledger: Ledger, profiler: Profiler, files: ExitStack
    ) -> None:
        self._run, self._files = run, files
        self._metrics, self._ledger, self._profiler = metrics, ledger, profiler

    @classmethod
    def open(cls, run: Run) -> Self:
        """Describe the run in its directory, and open the files for its steps.

        Raises:
            ConfigError: on all ranks: they cannot be written, or a tracker does not start.
            NoProgressError: on all ranks: it was started too often without progress.

        Collectives: two gathers of objects.
        """
        config, first, rank = run.config, run.progress.step, run.backend.rank
        run_dir, train = config.run_dir, config.train
        with collectives.raised_together(), writable(run_dir):
            if run.backend.is_main:
                record_changes(run_dir, first, run.changes)
                describe(config, run.backend, run.data.sources, run.modules.names())
                count_attempt(config, first, is_changed=bool(run.changes))
                forget_steps(run_dir, first)
        with collectives.raised_together(), writable(run_dir), ExitStack() as files:
            trackers = files.enter_context(
                Trackers(
                    train.trackers if run.backend.is_main else (),
                    run_dir,
                    train.tracker_project,
                    first,
                    config.model_dump(mode="json"),
                )
            )
            metrics = files.enter_context(
                MetricsLog(run_dir, train.steps, first, trackers, run.backend.is_main)
            )
            ledger = files.enter_context(Ledger(run_dir, rank, train.ledger))
            profiler = files.enter_context(Profiler(run_dir, rank, train.profile_steps))
            return cls(run, metrics, ledger, profiler, files.pop_all())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    def begin_step(self, keys: list[str]) -> None:
        """Record the keys of this rank's rows of the step that begins."""
        self._profiler.begin_step(self._run.progress.step + 1)
        self._ledger.write(self._run.progress.step, keys)

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of metrics as progress."""
        self._metrics.show(row)

    def write(self, row: dict[str, Any]) -> None:
        """Record a row of metrics."""
        self._metrics.write(row)
