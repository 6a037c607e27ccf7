"""A profile of some steps, for chrome://tracing or Perfetto."""

from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from dist_contrastive import collectives
from dist_contrastive.trainer.describing import writable


class Profiler:
    """Profiles the steps `first` to `last` (1 is the first of the run) on every rank, into
    profile/rank-R.json in the run directory; None: no step.
    """

    def __init__(self, run_dir: Path, rank: int, steps: tuple[int, int] | None) -> None:
        self._steps, self._path = steps, run_dir / "profile" / f"rank-{rank}.json"
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def before(self, step: int) -> None:
        """Called before every step, on all ranks."""
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
