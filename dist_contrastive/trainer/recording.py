"""Records of the steps of a run: metrics, the ledger, a profile."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from dist_contrastive import collectives
from dist_contrastive import config as configs
from dist_contrastive.backend import Trackers
from dist_contrastive.changes import record_changes
from dist_contrastive.errors import CollapseError
from dist_contrastive.metrics import GEOMETRY_ROWS, Ledger, MetricsLog, forget_steps
from dist_contrastive.tasks import ImageTask
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
            self._path.unlink(missing_ok=True)  # it is not written through a link
            finished.export_chrome_trace(str(self._path))


COLLAPSE = "collapse"
_COUNTS = {"rows_with_positives": "row with a positive", "valid_triplets": "triplet"}


class Doubts:
    """Signs in the rows of metrics that a run learns nothing; each is told once."""

    _ROWS, _PATIENCE = 10, 0.1  # rows that must agree; part of a run before they count as collapse
    _STD, _RANK, _DIMS = 0.05, 2.0, 16  # below the first two, the second of so many dimensions

    def __init__(self, run: Run) -> None:
        self._warn, self._loss_tells = run.warning, run.task.loss_tells
        self._steps, data = run.config.train.steps, run.config.data
        # By labels the partners are all samples of a class, none of them before the others.
        self._partners = not run.config.task.uses_labels
        self._chance = 1 / min(data.global_batch_size, GEOMETRY_ROWS)
        self._on_collapse = run.config.evaluate.on_collapse
        head = run.task.head if isinstance(run.task, ImageTask) else None
        if head is not None and not any(p.requires_grad for p in head.parameters()):
            self._on_collapse = "ignore"  # nothing is made of these embeddings
        self._dims = 0 if head is None else head.dim
        self._rows: deque[dict[str, Any]] = deque(maxlen=self._ROWS)
        self._warned: set[str] = set()

    def observe(self, row: dict[str, Any]) -> None:
        """The newest row; the last one of a run decides also where there are few.

        Raises:
            CollapseError: on all ranks: embeddings have collapsed, and that is to stop the run.

        Collectives: a maximum over ranks, if it is.
        """
        self._rows.append(row)
        collapsed = None
        is_last = row["step"] >= self._steps
        if len(self._rows) == self._ROWS or (is_last and len(self._rows) > 1):
            for what, sentence in self._signs(row["step"] / self._steps):
                if what == COLLAPSE and self._on_collapse == "stop":
                    collapsed = sentence
                elif what not in self._warned:
                    self._warned.add(what)
                    self._warn(sentence)
        if self._on_collapse == "stop" and collectives.max_over_ranks(collapsed is not None):
            raise CollapseError(collapsed or "embeddings have collapsed; see the first rank")

    def _signs(self, progress: float) -> Iterator[tuple[str, str]]:
        """What each is about, and the sentence."""
        for name, what in _COUNTS.items():
            if all(row.get(name) == 0 for row in self._rows):
                yield (
                    name,
                    f"no batch whose metrics were logged has a {what}, so nothing is learned; set "
                    f"data.balance or a larger data.global_batch_size, or give more views",
                )
                return
        is_due = progress >= self._PATIENCE and self._on_collapse != "ignore"
        if is_due and (sentence := self._collapse()):
            yield COLLAPSE, sentence
            return
        values = [row["loss"] for row in self._rows]
        if self._loss_tells and max(values) - min(values) <= 1e-6 * max(map(abs, values)):
            yield (
                "loss",
                f"the loss stays at {values[-1]:g}, so nothing is learned; look at optim.lr, at "
                f"what the loss compares, and at grad_norm in metrics.jsonl",
            )

    def _collapse(self) -> str | None:
        """Of complete collapse, of one onto a line, or of partners that are not found."""
        std, rank, recall = (
            [row.get(name, math.inf) for row in self._rows]
            for name in ("embedding_std", "effective_rank", "recall_at_1")
        )
        if _stays_below(self._STD, std):
            return (
                f"embeddings have collapsed: they are nearly the same for all samples "
                f"(embedding_std is {std[-1]:.2g}; 1 is evenly spread), so nothing is learned; "
                f"look at optim.lr, and whether the loss has negatives or another term against it"
            )
        if self._partners and self._dims >= self._DIMS and _stays_below(self._RANK, rank):
            return (
                f"embeddings have collapsed onto a line (effective_rank is {rank[-1]:.2g} of "
                f"{self._dims}), so nothing is learned; look at optim.lr, and whether the loss has "
                f"negatives or another term against it"
            )
        found = sum(min(x, 1.0) for x in recall) / len(recall)
        if self._partners and found <= 1.5 * self._chance < 0.1:
            return (
                f"samples find their partners no oftener than by chance (recall_at_1 is "
                f"{found:.2g}), so nothing is learned yet; look at optim.lr, at the "
                f"temperature, and whether pairs belong together"
            )
        return None


def _stays_below(limit: float, values: list[float]) -> bool:
    """Whether all are below the limit and do not grow; networks may begin there."""
    half = len(values) // 2
    return max(values) < limit and sum(values[-half:]) <= 1.1 * sum(values[:half])


class Recorder:
    """Metrics, ledger and profile of a run that trains. Made by `open`; a context manager."""

    def __init__(
        self,
        run: Run,
        trackers: Trackers,
        metrics: MetricsLog,
        ledger: Ledger,
        profiler: Profiler,
        files: ExitStack,
    ) -> None:
        self._run, self._trackers, self._files = run, trackers, files
        self._doubts = Doubts(run)
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
                describe(config, run.backend, run.data, run.modules.names())
                count_attempt(config, first, is_changed=bool(run.changes))
                forget_steps(run_dir, first)
        with collectives.raised_together(), writable(run_dir), ExitStack() as files:
            trackers = files.enter_context(
                Trackers(
                    train.trackers if run.backend.is_main else (),
                    run_dir,
                    train.tracker_project,
                    first,
                    configs.public(config),
                )
            )
            metrics = files.enter_context(
                MetricsLog(run_dir, train.steps, first, trackers, run.backend.is_main)
            )
            ledger = files.enter_context(Ledger(run_dir, rank, train.ledger))
            profiler = files.enter_context(Profiler(run_dir, rank, train.profile_steps))
            return cls(run, trackers, metrics, ledger, profiler, files.pop_all())

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

    def write(self, row: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        """Record a row of metrics, its pictures, and what there is to say of it.

        Raises:
            CollapseError: as `Doubts.observe`.
        """
        self._metrics.write(row)
        self._trackers.show(pictures, row["step"])
        self._doubts.observe(row)
