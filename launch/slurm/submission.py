"""Submission of a config, or of a sweep of them, as a job of submitit."""

import itertools
import math
import os
import shlex
import shutil
import socket
import time
import uuid
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

import dist_contrastive
import launch
from dist_contrastive import config as configs
from dist_contrastive.atomic import write_text
from dist_contrastive.config import RunConfig
from dist_contrastive.errors import FINAL_EXIT_CODES, ConfigError
from dist_contrastive.imports import looked_in, names_in
from dist_contrastive.trainer.run_dir import COMMIT, code_commit, writable
from launch.slurm.cluster import JobRecord, add_record
from launch.slurm.job import Job
from launch.slurm.options import Options

_WAIT_S = 60  # for the other ranks when one has ended
_LEAD_S, _WORST = 60, 3  # SLURM's own resolution; factor on the times of a checkpoint and a step
_LONGEST_NAME = 255
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


@dataclass(frozen=True)
class Submission:
    """Runs that are one job, or one array of jobs."""

    runs: list[RunConfig]
    options: Options
    root: Path
    """Folder for jobs/ and logs/: the run directory, or that of all runs of a sweep."""
    cwd: Path
    cluster: str = "slurm"
    change: bool = False
    """Whether the runs may go on with other settings."""

    def new_folder(self) -> Path:
        """A new name for the folder of what is submitted."""
        return self.root / "jobs" / time.strftime(f"%Y%m%d-%H%M%S-{uuid.uuid4().hex[:4]}")

    @property
    def logs(self) -> Path:
        """Folder for the output of jobs."""
        return self.root / "logs"


def expand(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Runs of a sweep, every combination of `key=a,b` overrides: each one's name (empty where there
    is only one) and its overrides; of a key that is there twice the last one counts. A comma in
    run_dir, in the query of a URL or in the name of a file that is there belongs to it.

    Raises:
        ConfigError: two runs have one name, or a name is too long for a folder.

    >>> [name for name, _ in expand(["optim.lr=0.1,0.2", "seed=1", "train.steps=5,9"])]
    ['lr=0.1,steps=5', 'lr=0.1,steps=9', 'lr=0.2,steps=5', 'lr=0.2,steps=9']
    """
    choices: dict[str, list[tuple[str, str, str]]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        choices.pop(key, None)
        is_one = key == "run_dir" or "?" in value or ("," in value and os.path.exists(value))
        values = [value] if is_one else _values(value)
        choices[key] = [(key, f"{key}{equals}{one}", one) for one in values]
    swept = [key for key, values in choices.items() if len(values) > 1]
    short = {key: _short_name(key, swept) for key in swept}
    runs = []
    for combination in itertools.product(*choices.values()):
        parts = [f"{short[key]}={value}" for key, _, value in combination if key in short]
        name = ",".join(parts).replace("/", "_").replace(" ", "")
        runs.append((name, [override for _, override, _ in combination]))
    _check_names([name for name, _ in runs])
    return runs


def _check_names(names: list[str]) -> None:
    """Each run of a sweep has a folder of its own."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two runs of the sweep would be {twice}; give every value once")
    longest = max(names, key=len)
    if len(longest.encode()) > _LONGEST_NAME:
        raise ConfigError(
            f"the sweep would name a folder {longest[:60]}... of {len(longest.encode())} bytes, "
            f"above {_LONGEST_NAME}; give long values by several submissions"
        )


def _values(value: str) -> list[str]:
    """The parts between commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in value:
        if quote:
            quote = "" if char == quote else quote
        elif char in _QUOTES:
            quote = char
        depth += (not quote and char in _OPENING) - (not quote and char in _CLOSING)
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts if all(parts) else [value]


def _short_name(key: str, keys: list[str]) -> str:
    """The shortest end of a dotted key that no other one has."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other != key and other.endswith(f".{end}") for other in keys):
            return end
    return key


def lead_s(save_s: float, step_s: float) -> int:
    """Seconds before its end at which a job must get the signal to save: SLURM may be a minute
    early, so that this is what a checkpoint and a step take at worst, and a minute for all else."""
    return math.ceil(_LEAD_S + _WORST * (save_s + step_s))


def script(submission: Submission, folder: Path) -> str:
    """The batch script, as sbatch gets it."""
    executor = _slurm_executor(submission, folder)
    if len(submission.runs) > 1:
        executor.parameters["map_count"] = len(submission.runs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(submission: Submission) -> list[str]:
    """Copy the code and the configs, and submit; the numbers of the jobs, one for each run.

    Raises:
        ConfigError: the folder cannot be written, or SLURM does not take the job.
    """
    folder = submission.new_folder()
    with writable(submission.root):
        jobs = _prepare(submission, folder)
    make = _local_executor if submission.cluster == "local" else _slurm_executor
    executor = make(submission, folder)
    # A job may submit another one. submitit prints the message of sbatch, besides raising it.
    environment = clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    try:
        with environment, redirect_stderr(StringIO()), executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except FailedJobError as error:
        shutil.rmtree(folder)
        reason = " ".join(str(error).replace("sbatch: error: ", "").split())
        raise ConfigError(f"sbatch does not take the job: {reason}") from error
    for config, job in zip(submission.runs, submitted, strict=True):
        add_record(config.run_dir, _record(submission, folder, config, job.job_id))
    return [job.job_id for job in submitted]


def _prepare(submission: Submission, folder: Path) -> list[Job]:
    submission.logs.mkdir(parents=True, exist_ok=True)
    _copy_code(folder, submission.runs)
    port = _free_port() if submission.cluster == "local" else 0
    jobs = []
    for config in submission.runs:
        _check_secrets(config)
        config_dir = folder / "configs" / config.run_dir.name
        config_dir.mkdir(parents=True)
        configs.save(config, config_dir)
        jobs.append(
            Job(config_dir / "config.yaml", submission.cwd, folder, port, submission.change)
        )
    write_text(folder / "runs", "".join(f"{c.run_dir.absolute()}\n" for c in submission.runs))
    write_text(folder / "token", "Every node of the job must see this file.\n")
    return jobs


def _check_secrets(config: RunConfig) -> None:
    if configs.public(config) != config.model_dump(mode="json"):
        raise ConfigError(
            "data.train or data.test holds a password or a signature, and a job reads its config "
            "from the run directory, where none are written; copy the data to a disk, or use a "
            "protocol that takes credentials from the environment, as s3"
        )


def _copy_code(folder: Path, runs: list[RunConfig]) -> None:
    """Copy our packages to folder/code, and if configs name modules of the user's, all that lie
    where these are imported from to folder/modules: a job that waits in the queue runs the code
    that was submitted."""
    ours = [Path(str(package.__file__)).parent for package in (dist_contrastive, launch)]
    copies, names = [(path, folder / "code") for path in ours], {path.name for path in ours}
    if any(names_in(config.model_dump(mode="json")) for config in runs):
        # Backwards: of two modules of one name the first folder's is copied last.
        for place in reversed(looked_in()):
            found = [p.parent for p in place.glob("*/__init__.py") if p.parent.name not in names]
            copies += [(path, folder / "modules") for path in [*found, *place.glob("*.py")]]
    for path, target in copies:
        target.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / path.name, ignore=_NOT_COPIED, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target / path.name)
    write_text(folder / "code" / COMMIT, f"{code_commit() or ''}\n")


def _slurm_executor(submission: Submission, folder: Path) -> "_SlurmExecutor":
    options, config = submission.options, submission.runs[0]
    executor = _SlurmExecutor(folder, python=options.python_command)
    job = "%A_%a" if len(submission.runs) > 1 else "%j"
    batch = str(submission.logs / f"{job}.batch.log")
    ranks = submission.logs / f"{job}.rank-%t"
    more = {name: value == "true" or value for name, value in options.sbatch.items()}
    rank_output = [f"--output={ranks}.out", f"--error={ranks}.err", "--kill-on-bad-exit=1"]
    executor.update_parameters(
        job_name=options.name or submission.root.name,
        time=options.time_min,
        nodes=options.nodes,
        ntasks_per_node=options.tasks,
        cpus_per_task=options.cpus_per_task,
        gpus_per_node=options.gpus_per_node or None,
        mem=None if options.memory_gb is None else f"{math.ceil(options.memory_gb * 1024)}M",
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        constraint=options.constraint,
        exclusive=options.exclusive or None,
        wckey=None,
        signal_delay_s=options.signal_lead_s,
        setup=_setup(options, folder, config.train.max_stalled_starts),
        teardown=["finish $?"],
        srun_args=[*rank_output, f"--wait={_WAIT_S}", *options.srun],
        array_parallelism=options.parallel,
        additional_parameters={"requeue": True, "output": batch, "error": batch, **more},
    )
    return executor


class _SlurmExecutor(submitit.SlurmExecutor):
    """Executor that makes scripts also where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _setup(options: Options, folder: Path, max_starts: int) -> list[str]:
    """Lines of the batch script before the ranks: those of the site first."""
    source = shlex.quote(str(folder / "code" / "launch" / "slurm" / "job.sh"))
    final = " ".join(map(str, FINAL_EXIT_CODES))
    begin = ["begin", str(folder), str(max_starts), final, options.python_command, *options.srun]
    missing = f"{folder} is not there; put run_dir on a file system that all nodes share"
    return [
        *_environment(options, folder),
        # Variables of whoever submitted; those of the job are set by itself.
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT",
        f'export MASTER_ADDR="{options.address}"',
        # Since 22.05 srun does not take it from sbatch.
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}",
        f"source {source} || {{ echo {shlex.quote(missing)}; exit 64; }}",
        shlex.join(begin),
    ]


def _environment(options: Options, folder: Path) -> list[str]:
    code = shlex.quote(str(folder / "code"))
    return [
        *options.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in options.env.items()),
        # The copied code, not that in the current folder.
        f"export PYTHONSAFEPATH=1 PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _local_executor(submission: Submission, folder: Path) -> submitit.LocalExecutor:
    """submitit's executor without a cluster: processes of this machine."""
    options = submission.options
    threads = max(1, (os.cpu_count() or 1) // options.world_size)
    executor = submitit.LocalExecutor(folder, python=options.python_command)
    executor.update_parameters(
        timeout_min=options.time_min,
        tasks_per_node=options.world_size,
        gpus_per_node=options.gpus_per_node,
        signal_delay_s=options.signal_lead_s,
        setup=[
            *_environment(options, folder),
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}",
        ],
    )
    return executor


def _record(submission: Submission, folder: Path, config: RunConfig, job: str) -> JobRecord:
    return JobRecord(
        job=job,
        cluster=submission.cluster,
        submitted=time.strftime("%Y-%m-%d %H:%M:%S"),
        folder=str(folder),
        logs=str(submission.logs),
        config=str(folder / "configs" / config.run_dir.name / "config.yaml"),
        cwd=str(submission.cwd),
        options=submission.options.model_dump(mode="json"),
        change=submission.change,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
