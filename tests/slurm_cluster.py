"""A real SLURM of several emulated nodes on this machine, and what tests ask of it."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import wait_for

from launch.slurm.__main__ import main
from launch.slurm.cluster import last_record

SCRIPTS = Path(__file__).parent / "slurm"


@contextmanager
def cluster(nodes: int = 3, **settings: str) -> Iterator["Cluster"]:
    """Started, with this process as a login node of it; see slurm/up.sh for the settings."""
    if shutil.which("slurmctld") is None and not Path("/usr/sbin/slurmctld").exists():
        pytest.skip("there is no SLURM here; `make slurm` installs Debian's packages (as root)")
    folder = tempfile.mkdtemp(prefix="emu", dir="/tmp")  # sockets allow for short paths only
    before = dict(os.environ)
    up = [SCRIPTS / "up.sh", folder, str(nodes)]
    started = subprocess.run(up, env={**before, **settings}, capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        os.environ |= _environment(Path(folder)) | {"OMP_NUM_THREADS": "1"}
        yield Cluster(Path(folder))
    finally:
        os.environ.clear()
        os.environ.update(before)
        down = subprocess.run([SCRIPTS / "down.sh", folder], capture_output=True, text=True)
    assert down.returncode == 0, down.stdout + down.stderr
    shutil.rmtree(folder)


def _environment(folder: Path) -> dict[str, str]:
    told = subprocess.run(
        ["bash", "-c", f". {folder}/env.sh; env -0"], check=True, capture_output=True, text=True
    )
    return dict(line.split("=", 1) for line in told.stdout.split("\0") if "=" in line)


class Cluster:
    """Commands of SLURM, and of the machines that its nodes are played by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, run_dir: Path) -> str:
        """SLURM's word for the last job of a run."""
        job = last_record(run_dir).job
        return self.ask("squeue", "-h", "-a", "-t", "all", "-j", job, "-o", "%T")

    def restarts(self, run_dir: Path) -> int:
        """How often its last job was requeued."""
        told = self.ask("scontrol", "show", "job", last_record(run_dir).job)
        return int(re.findall(r"Restarts=(\d+)", told)[0])

    def await_state(self, run_dir: Path, state: str, timeout_s: float = 300) -> None:
        """Until its last job has that state."""
        wait_for(lambda: self.state(run_dir) == state, timeout_s, lambda: self.story(run_dir))

    def await_step(self, run_dir: Path, step: int, timeout_s: float = 300) -> None:
        """Until a run has a row of metrics of that step or a later one."""
        wait_for(lambda: last_step(run_dir) >= step, timeout_s, lambda: self.story(run_dir))

    def story(self, run_dir: Path) -> str:
        """All that its jobs wrote, for a failure."""
        record = last_record(run_dir)
        texts = [f"{p.name}: {p.read_text()}" for p in record.log_files(0) if p.exists()]
        return "\n".join([self.state(run_dir), *texts])


def submit(*arguments: str | Path) -> None:
    """`python -m launch.slurm submit`, without the doctor."""
    assert main(["submit", *map(str, arguments), "--no-doctor"]) == 0


def last_step(run_dir: Path) -> int:
    """Of the last whole row of metrics."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0
