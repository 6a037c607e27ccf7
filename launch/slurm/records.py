"""Which jobs a run has had: `jobs.jsonl` in its directory, a line for each submission."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_contrastive.errors import ConfigError

_NAME = "jobs.jsonl"


@dataclass(frozen=True)
class JobRecord:
    """A job that was submitted for a run."""

    job: str
    """Its number; of a sweep's, ARRAY_INDEX."""
    cluster: str
    submitted: str
    """Date and time."""
    folder: str
    """Of what was submitted: config, code, script."""
    logs: str
    config: str
    """The file that it trains."""
    cwd: str
    """Where it was submitted."""
    options: dict[str, Any]

    @property
    def cancelled(self) -> Path:
        """A file that keeps the job from being requeued."""
        return Path(self.folder) / f"{self.job}.cancelled"

    def log_files(self, rank: int) -> list[Path]:
        """What the job and one of its ranks wrote."""
        if self.cluster == "local":
            name = f"{self.job}_{rank}_log"
            return [Path(self.folder) / f"{name}.err", Path(self.folder) / f"{name}.out"]
        names = f"{self.job}.batch.log", *(f"{self.job}.rank-{rank}.{x}" for x in ("err", "out"))
        return [Path(self.logs) / name for name in names]


def add_record(run_dir: Path, record: JobRecord) -> None:
    """Write a line."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _NAME).open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def records(run_dir: Path) -> list[JobRecord]:
    """All submissions of a run, the last one last."""
    path = run_dir / _NAME
    lines = path.read_text().splitlines() if path.exists() else []
    return [JobRecord(**json.loads(line)) for line in lines]


def last_record(run_dir: Path) -> JobRecord:
    """That of the last submission.

    Raises:
        ConfigError: there was none.
    """
    found = records(run_dir)
    if not found:
        raise ConfigError(
            f"{run_dir} has no {_NAME}: it was not submitted; give the run directory of a run that "
            f"was, or submit one with python -m launch.slurm submit CONFIG"
        )
    return found[-1]


def find_runs(folder: Path) -> list[Path]:
    """Run directories at a folder, or below it (two levels: sweeps have theirs side by side); what
    lies in one of them, such as an export, is none."""
    patterns = (_NAME, "config.yaml")
    found = {
        p.parent for name in patterns for up in ("", "*/", "*/*/") for p in folder.glob(up + name)
    }
    return sorted(p for p in found if not found.intersection(p.parents))
