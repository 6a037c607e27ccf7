"""Progress of a run, from its directory alone; quick, since nothing here imports torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TAIL = 1 << 16  # bytes, of many rows of metrics


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
    config = run_dir / "config.yaml"
    steps = yaml.safe_load(config.read_text())["train"]["steps"] if config.exists() else None
    return RunProgress(steps, newest_step(run_dir), _last_row(run_dir / "metrics.jsonl"))


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    names = (p.name.removeprefix("step-") for p in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _last_row(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else {}
