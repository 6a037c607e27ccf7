"""Following what a job writes, and ending it with everything saved."""

import signal
import sys
import time
from pathlib import Path

import psutil

from dist_contrastive.errors import ConfigError
from launch.logs import Follower
from launch.progress import newest_step
from launch.slurm.cluster import ask, job_state
from launch.slurm.records import JobRecord, last_record

_LOOK_S = 0.5
_AGAIN_EVERY = 20  # looks
_STATE_EVERY = 10  # looks: a scheduler is not to be asked often


def show_logs(run_dir: Path, rank: int, follow: bool) -> None:
    """Print what the last job of a run and one of its ranks wrote, and what they go on to write.

    Raises:
        ConfigError: there is nothing and no more to come.
    """
    record, follower = last_record(run_dir), Follower()
    files = record.log_files(rank)
    looks, ended, printed = 0, False, False
    # What is there already comes file by file; what is added, as it comes.
    order = [[path] for path in files]
    while True:
        if follow and looks % _STATE_EVERY == 0:
            ended = job_state(record.job, record.cluster).has_ended
        for some in order:
            for _, text in follower.read(some, to_end=not follow or ended):
                sys.stdout.write(text)
                sys.stdout.flush()
                printed = True
        order = [files]
        if not follow or ended:
            break
        looks += 1
        time.sleep(_LOOK_S)
    if not printed:
        raise ConfigError(
            f"job {record.job} wrote nothing to {files[0]}; is it still waiting, or is rank {rank} "
            f"not one of its ranks?"
        )


def cancel(run_dir: Path, timeout_s: float) -> str:
    """End the job of a run: one that waits at once, one that runs when it has saved.

    Args:
        timeout_s: after which it is ended without.

    Returns:
        What was done.
    """
    record = last_record(run_dir)
    state = job_state(record.job, record.cluster)
    if state.has_ended:
        return f"job {record.job} has ended already ({state.state})"
    record.cancelled.touch()
    if state.state == "PENDING":
        ask("scancel", record.job)
        return f"job {record.job} is cancelled; it was waiting"
    _tell_to_stop(record)
    for look in range(int(timeout_s / _LOOK_S)):
        time.sleep(_LOOK_S)
        if job_state(record.job, record.cluster).has_ended:
            step = newest_step(run_dir)
            what = f"saved step {step}" if step else "saved nothing"
            return f"job {record.job} has {what} and ended"
        if look % _AGAIN_EVERY == _AGAIN_EVERY - 1:
            _tell_to_stop(record)  # for the case that it had no ranks yet
    _kill(record)
    return (
        f"job {record.job} did not end within {timeout_s:g} s and was ended by force; step "
        f"{newest_step(run_dir)} is saved"
    )


def _tell_to_stop(record: JobRecord) -> None:
    if record.cluster == "local":
        for process in ranks_of(record):
            process.send_signal(signal.SIGTERM)
    else:
        ask("scancel", "--signal=USR2", record.job)  # to its ranks; the script goes on


def ranks_of(record: JobRecord) -> list[psutil.Process]:
    """Of a job of submitit's local executor, which has a shell and a controller between."""
    try:
        below = psutil.Process(int(record.job)).children(recursive=True)
        return [p for p in below if "submitit.core._submit" in p.cmdline()]
    except psutil.NoSuchProcess:  # they have ended meanwhile
        return []


def _kill(record: JobRecord) -> None:
    if record.cluster == "local":
        for process in [psutil.Process(int(record.job)), *ranks_of(record)]:
            process.kill()
    else:
        ask("scancel", record.job)
