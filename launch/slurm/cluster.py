"""What SLURM says, by its own commands; with and without accounting."""

import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from dist_contrastive.errors import ConfigError

_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN"),
)
_FORGOTTEN = "Invalid job id"  # so squeue says of a job that ended a while ago
_TIMEOUT_S = 60


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
    """What a partition has."""

    nodes: int
    cpus: int
    """Of its largest node."""
    gpus: int
    """Of the node with the most."""
    limit: str
    """Of time, as SLURM writes it."""


def require_slurm() -> None:
    """Raise ConfigError where there is no SLURM."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            "there is no sbatch on this machine; submit from a login node of a SLURM cluster, or "
            "start the config here with python -m launch.local CONFIG --ranks N"
        )


def partitions() -> dict[str, Partition]:
    """Those of the cluster; the one that jobs go to by default has the name "" too."""
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "-h", "-a", "-o", "%P|%D|%c|%G|%l").splitlines():
        name, nodes, cpus, gres, limit = line.split("|")
        before = found.get(name.rstrip("*"), Partition(0, 0, 0, limit))
        now = Partition(
            before.nodes + int(nodes),
            max(before.cpus, int(cpus.rstrip("+"))),
            max(before.gpus, _gpus(gres)),
            limit,
        )
        found[name.rstrip("*")] = now
        if name.endswith("*"):
            found[""] = now
    return found


def _gpus(gres: str) -> int:
    """Of `gpu:a100:4(S:0-1),nvme:1`."""
    counts = [part.split("(")[0].split(":") for part in gres.split(",")]
    return sum(int(x[-1]) for x in counts if x[0] == "gpu" and x[-1].isdecimal())


def job_state(job: str, cluster: str = "slurm") -> JobState:
    """Of a job, as squeue has it, or else sacct, or else UNKNOWN."""
    if cluster == "local":
        return _local_state(job)
    asked = _run("squeue", "-h", "-a", "-t", "all", "-j", job, "-o", "%T|%N|%r|%M|%l")
    if asked.returncode and _FORGOTTEN not in asked.stderr:
        return JobState("UNREACHABLE", reason=" ".join(asked.stderr.split()))
    if told := asked.stdout.strip():
        state, nodes, reason, elapsed, limit = told.splitlines()[0].split("|")
        return JobState(state, nodes, "" if reason == "None" else reason, elapsed, limit)
    fields = "State,NodeList,Elapsed,Timelimit"
    if told := _run("sacct", "-n", "-X", "-P", "-j", job, "-o", fields).stdout.strip():
        state, nodes, elapsed, limit = told.splitlines()[0].split("|")
        return JobState(state.split(" ")[0], nodes, "", elapsed, limit)
    return JobState("UNKNOWN")


def _local_state(job: str) -> JobState:
    """Of the process that submitit's local executor has for a job."""
    try:
        process = psutil.Process(int(job))
        is_there = "submitit" in " ".join(process.cmdline())
    except psutil.Error:
        is_there = False
    return JobState("RUNNING" if is_there else "UNKNOWN")


def ask(*command: str) -> str:
    """What a command of SLURM prints.

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
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=_plain()
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {_TIMEOUT_S} s")


def _plain() -> dict[str, str]:
    """This environment without settings that would change what these commands print."""
    return {
        k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SINFO_", "SACCT_"))
    }
