"""Checks before a job is submitted."""

from collections.abc import Iterator
from pathlib import Path

from dist_contrastive import config as configs
from dist_contrastive import trainer
from dist_contrastive.config import RunConfig
from dist_contrastive.errors import ConfigError
from dist_contrastive.trainer.checks import Finding, examine
from launch.progress import read_progress
from launch.slurm.cluster import JobRecord, Partition, job_state, partitions, records
from launch.slurm.options import Options, minutes

_MARKS = {
    "%": "SLURM replaces it in names of files, as %j by the number of the job",
    "\\": "SLURM leaves it out of names of files",
    ":": "the copied code would not be found, since Python's path is separated by it",
}
_PROCESSES = 2  # for the doctor: a login node is no place for many


def check_cluster(options: Options) -> None:
    """Raise ConfigError for what the cluster does not have, and would let wait for ever; one of
    several partitions that has it is enough."""
    known = partitions()
    wanted = [name.strip() for name in (options.partition or "").split(",")]
    for name in wanted:
        if not name and len(wanted) > 1:
            raise ConfigError(
                f"--partition {options.partition}: a name is missing; write one,other"
            )
        if name not in known:
            names = ", ".join(sorted(n for n in known if n))
            raise ConfigError(
                f"--partition {name} is unknown; this cluster has {names}"
                if name
                else f"this cluster has no default partition; give --partition, one of {names}"
            )
    problems = [_lack(options, name, known[name]) for name in wanted]
    if all(problems):
        raise ConfigError("; ".join(filter(None, problems)))


def _lack(options: Options, name: str, has: Partition) -> str | None:
    """What a partition does not have, as a sentence."""
    where = f"partition {name}" if name else "the default partition"
    largest, cpus = f"the largest node of {where}", options.tasks * (options.cpus_per_task or 1)
    for flag, value, most, owner, what in (
        ("--nodes", options.nodes, has.nodes, where, "nodes"),
        ("--gpus-per-node", options.gpus_per_node, has.gpus, largest, "GPUs"),
        ("ranks of a node x --cpus-per-task =", cpus, has.cpus, largest, "CPUs"),
    ):
        if value > most:
            return f"{flag} {value}: {owner} has {most} {what}; ask for {most} or fewer"
    if has.limit[:1].isdecimal() and options.time_min > minutes(has.limit):  # else it is infinite
        return (
            f"--time {options.time}: {where} allows {has.limit}; ask for that or less, a run that "
            f"needs longer is requeued"
        )
    return None


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder whose name means something else in a job."""
    for mark, meaning in _MARKS.items():
        if mark in str(folder):
            raise ConfigError(
                f"run_dir={folder} holds a {mark}, and {meaning}; choose a run_dir without it"
            )


def check_lead(lead_s: int, options: Options) -> None:
    """Raise ConfigError where a job would get the signal to save before it has begun."""
    if lead_s >= options.time_min * 60:
        raise ConfigError(
            f"--time {options.time}: a job gets the signal to save {lead_s} s before its end, "
            f"which leaves no time to train; give it more, or a shorter --signal-lead-s"
        )


def check_runs(runs: list[RunConfig], world_size: int, change: bool) -> None:
    """Raise ConfigError for a config that cannot start on so many ranks, or whose run directory has
    a job already."""
    for config in runs:
        trainer.check(config, world_size, change)
        for record in records(config.run_dir)[-1:]:
            state = job_state(record)
            if not state.has_ended:
                raise ConfigError(
                    f"{config.run_dir} has job {record.job} already ({state.state}); wait for it, "
                    f"cancel it with python -m launch.slurm cancel {config.run_dir}, or choose "
                    f"another run_dir"
                )


def measured_s(run_dir: Path) -> tuple[float, float] | None:
    """Seconds of a checkpoint and of a step of this run, if it has had both."""
    row = read_progress(run_dir).row
    return (row["save_s"], row["step_s"]) if {"save_s", "step_s"} <= row.keys() else None


def examined(config: RunConfig, world_size: int, change: bool) -> Iterator[Finding]:
    """Findings of `doctor`, as long as they are fine.

    Args:
        change: the run may go on with other settings.

    Raises:
        ConfigError: one is not.
    """
    for finding in examine(config, world_size, _PROCESSES, change):
        if not finding.is_fine:
            raise ConfigError(f"doctor, {finding.part}: {finding.text}")
        yield finding


def current_config(run_dir: Path, record: JobRecord, is_trusted: bool) -> tuple[RunConfig, bool]:
    """Config with which a run goes on, and whether changes of it are still to come.

    It is that of the run directory, if the run has begun since the last submission and some of its
    settings have changed, or else what was submitted.

    Args:
        is_trusted: the code that they name may run.
    """
    ours, theirs = run_dir / "config.yaml", Path(record.config)
    has_begun = ours.is_file() and (
        not theirs.is_file() or ours.stat().st_mtime > theirs.stat().st_mtime
    )
    if has_begun and not theirs.is_file():
        return configs.load_run(run_dir, is_trusted=is_trusted), False
    submitted = configs.load_run(theirs.parent, is_trusted=is_trusted)
    submitted = submitted.model_copy(update={"run_dir": run_dir})
    if not has_begun:
        return submitted, record.change
    current = configs.load_run(run_dir, is_trusted=is_trusted)
    return current if configs.changed(submitted, current) else submitted, False
