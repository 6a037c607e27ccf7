"""Progress of a run, from its directory alone; quick, since nothing here imports torch."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_contrastive.errors import ConfigError
from dist_contrastive.records import numbers_in, rows_in
from dist_contrastive.yaml_files import read_yaml

_TAIL = 1 << 16  # bytes, of many rows of metrics
_MOST = 2**53  # steps
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run as its directory shows it."""

    steps: int | None
    """Steps of the whole run; None before it has begun."""
    saved: int
    """Step of the newest checkpoint."""
    row: dict[str, Any]
    """The last row of metrics; empty before there is one."""

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max(self.saved, int(self.row.get("step", 0)))

    @property
    def left_s(self) -> float | None:
        """Seconds for the remaining steps, if they take as long as the last ones."""
        if self.steps is None or "step_s" not in self.row:
            return None
        return (self.steps - self.step) * float(self.row["step_s"])


def read_progress(run_dir: Path) -> RunProgress:
    """Progress of a run, be it running, ended or not begun."""
    return RunProgress(_steps(run_dir), newest_step(run_dir), _last_row(run_dir))


def _steps(run_dir: Path) -> int | None:
    config = run_dir / "config.yaml"
    if not config.exists():
        return None
    try:
        steps = read_yaml(config).value["train"]["steps"]
    except (ConfigError, KeyError, TypeError):
        steps = None
    if type(steps) is int and 0 < steps < _MOST:
        return steps
    _log.warning("%s tells no train.steps: it is damaged, or of another version", config)
    return None


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    names = (p.name.removeprefix("step-") for p in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _last_row(run_dir: Path) -> dict[str, Any]:
    """Numbers of the last row of metrics.jsonl that can be read."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            rows = rows_in(file.read())
    except OSError:
        return {}
    return numbers_in(rows[-1]) if rows else {}
