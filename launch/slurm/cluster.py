"""Jobs of runs, and their states in SLURM, by its own commands; with and without accounting.

`jobs.jsonl` in a run directory has a line for each submission.
"""

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from dist_contrastive.errors import ConfigError, UserError
from dist_contrastive.imports import keep_trust, require_trust
from dist_contrastive.records import append_lines, read_lines
from launch.slurm.options import Options, shell_in

_log = logging.getLogger(__name__)
_JOBS = "jobs.jsonl"
_JOB = re.compile(r"\d+(_\d+)?")
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN"),
)
_FORGOTTEN = "Invalid job id"  # squeue's answer for a single job that ended a while ago
_TIMEOUT_S = 60
_SETTINGS = ("SQUEUE_", "SINFO_", "SACCT_")  # variables that change the output of the commands


@dataclass(frozen=True)
class JobRecord:
    """A job that was submitted for a run."""

    job: str
    """Its number; of a sweep's, ARRAY_INDEX."""
    cluster: str
    submitted: str
    """Date and time."""
    folder: str
    """Holds what was submitted: config, code, script."""
    logs: str
    config: str
    """The file that it trains."""
    cwd: str
    """Where it was submitted."""
    options: dict[str, Any]
    change: bool = False
    """Whether the run may go on with other settings."""

    @property
    def cancelled(self) -> Path:
        """A file that keeps the job from being requeued."""
        return Path(self.folder) / f"{self.job}.cancelled"

    def log_files(self, rank: int) -> list[Path]:
        """Output of the job and of one of its ranks."""
        if self.cluster == "local":
            name = f"{self.job}_{rank}_log"
            return [Path(self.folder) / f"{name}.err", Path(self.folder) / f"{name}.out"]
        names = f"{self.job}.batch.log", *(f"{self.job}.rank-{rank}.{x}" for x in ("err", "out"))
        return [Path(self.logs) / name for name in names]


def add_record(run_dir: Path, record: JobRecord) -> None:
    """Append a submission to those of a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    append_lines(run_dir / _JOBS, [asdict(record)])
    if shell_in(record.options):
        keep_trust(run_dir / _JOBS, json.dumps(asdict(record)))


def require_trusted_record(
    run_dir: Path, record: JobRecord, options: dict[str, Any], is_trusted: bool
) -> None:
    """Refuse shell lines in the options of a record that this user has not submitted.

    Raises:
        ConfigError: there are some, and the user does not say that they may run.
    """
    require_trust(run_dir / _JOBS, json.dumps(asdict(record)), shell_in(options), is_trusted)


def records(run_dir: Path) -> list[JobRecord]:
    """All submissions of a run, the last one last, as far as they can be read."""
    try:
        rows = read_lines(run_dir / _JOBS)
    except UserError as error:
        _log.warning("%s", error)
        return []
    known = {field.name for field in fields(JobRecord)}
    return [
        JobRecord(**{name: row[name] for name in known & row.keys()})
        for row in rows
        if _is_sound(row)
    ]


def _is_sound(row: dict[str, Any]) -> bool:
    """Whether values are what a submission writes: the job's number is given to commands."""
    texts = (row.get(field.name) for field in fields(JobRecord) if field.type is str)
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(row.get("options"), dict)
        and _JOB.fullmatch(row["job"]) is not None
        and row["cluster"] in ("slurm", "local")
    )


def known_options(record: JobRecord) -> dict[str, Any]:
    """Options of a record, without those of another version."""
    others = sorted(record.options.keys() - Options.model_fields)
    if others:
        _log.warning("%s of job %s, of another version, is left out", ", ".join(others), record.job)
    return {name: value for name, value in record.options.items() if name not in others}


def last_record(run_dir: Path) -> JobRecord:
    """The last submission of a run.

    Raises:
        ConfigError: there was none.
    """
    submitted = records(run_dir)
    if not submitted:
        raise ConfigError(
            f"{run_dir} has no {_JOBS}: it was not submitted; give the run directory of a run that "
            f"was, or submit one with python -m launch.slurm submit CONFIG"
        )
    return submitted[-1]


def find_runs(folder: Path) -> list[Path]:
    """Run directories at a folder, or below it (two levels: sweeps have theirs side by side); what
    lies in one of them, such as an export, is none."""
    patterns = (_JOBS, "config.yaml")
    folders = {
        p.parent for name in patterns for up in ("", "*/", "*/*/") for p in folder.glob(up + name)
    }
    return sorted(p for p in folders if not folders.intersection(p.parents))


@dataclass(frozen=True)
class JobState:
    """A job as SLURM sees it."""

    state: str
    """SLURM's word; UNKNOWN where it remembers the job no more, UNREACHABLE where it cannot be
    asked."""
    nodes: str = ""
    reason: str = ""
    elapsed: str = ""
    limit: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in _ENDED


@dataclass(frozen=True)
class Partition:
    """Resources of a partition."""

    nodes: int
    cpus: int
    """Of its largest node."""
    gpus: int
    """Of the node with the most."""
    limit: str
    """Time limit, as SLURM writes it."""


def require_slurm() -> None:
    """Raise ConfigError where there is no SLURM."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            "there is no sbatch on this machine; submit from a login node of a SLURM cluster, or "
            "start the config here with python -m launch.local CONFIG --ranks N"
        )


def partitions() -> dict[str, Partition]:
    """Partitions of the cluster by name; the default one has the name "" too."""
    result: dict[str, Partition] = {}
    for line in slurm_output("sinfo", "-h", "-a", "-o", "%P|%D|%c|%G|%l").splitlines():
        name, nodes, cpus, gres, limit = line.split("|")
        before = result.get(name.rstrip("*"), Partition(0, 0, 0, limit))
        partition = Partition(
            before.nodes + int(nodes),
            max(before.cpus, int(cpus.rstrip("+"))),
            max(before.gpus, _num_gpus(gres)),
            limit,
        )
        result[name.rstrip("*")] = partition
        if name.endswith("*"):
            result[""] = partition
    return result


def _num_gpus(gres: str) -> int:
    """Number of GPUs in generic resources as `gpu:a100:4(S:0-1),nvme:1`."""
    counts = [part.split("(")[0].split(":") for part in gres.split(",")]
    return sum(int(x[-1]) for x in counts if x[0] == "gpu" and x[-1].isdecimal())


def job_state(record: JobRecord) -> JobState:
    """State of one job, as `job_states` has it."""
    return job_states([record])[0]


def job_states(jobs: Sequence[JobRecord]) -> list[JobState]:
    """State of each job, as squeue has it, or else sacct, or else UNKNOWN; each asked once."""
    known = _slurm_states([record.job for record in jobs if record.cluster != "local"])
    return [
        _local_state(record.job) if record.cluster == "local" else known[record.job]
        for record in jobs
    ]


def _slurm_states(jobs: list[str]) -> dict[str, JobState]:
    if not jobs:
        return {}
    numbers = ",".join(jobs)
    squeue = _run("squeue", "-h", "-a", "-r", "-t", "all", "-j", numbers, "-o", "%i|%T|%N|%r|%M|%l")
    if squeue.returncode and _FORGOTTEN not in squeue.stderr:
        return dict.fromkeys(jobs, JobState("UNREACHABLE", reason=" ".join(squeue.stderr.split())))
    states = dict.fromkeys(jobs, JobState("UNKNOWN"))
    queued = [line.split("|") for line in squeue.stdout.splitlines()]
    for job, state, nodes, reason, elapsed, limit in queued:
        states[job] = JobState(state, nodes, "" if reason == "None" else reason, elapsed, limit)
    if forgotten := [job for job in jobs if states[job].state == "UNKNOWN"]:
        fields = "JobID,State,NodeList,Elapsed,Timelimit"
        sacct = _run("sacct", "-n", "-X", "-P", "-j", ",".join(forgotten), "-o", fields)
        for line in sacct.stdout.splitlines():
            job, state, nodes, elapsed, limit = line.split("|")
            if job in forgotten:
                states[job] = JobState(state.split(" ")[0], nodes, "", elapsed, limit)
    return states


def _local_state(job: str) -> JobState:
    """State of the process that submitit's local executor has for a job."""
    try:
        process = psutil.Process(int(job))
        is_there = "submitit" in " ".join(process.cmdline())
    except psutil.Error:
        is_there = False
    return JobState("RUNNING" if is_there else "UNKNOWN")


def slurm_output(*command: str) -> str:
    """Output of a command of SLURM.

    Raises:
        ConfigError: it fails; in its own words.
    """
    done = _run(*command)
    if done.returncode:
        raise ConfigError(
            f"{' '.join(command[:2])} failed: {' '.join(done.stderr.split())}; is this a login "
            f"node, and the cluster up?"
        )
    return done.stdout.strip()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {_TIMEOUT_S} s")
