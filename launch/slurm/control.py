"""Control of submitted runs: their state, their logs, and ending them with everything saved."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dist_contrastive.changes import changes_text, read_changes
from dist_contrastive.errors import ConfigError
from dist_contrastive.tables import format_table
from launch.logs import Follower
from launch.progress import RunProgress, newest_step, read_progress
from launch.slurm.cluster import (
    JobRecord,
    JobState,
    find_runs,
    job_state,
    job_states,
    last_record,
    records,
    slurm_output,
)

_POLL_S = 0.5
_SIGNAL_EVERY = 20  # polls
_STATE_EVERY = 10  # polls: a scheduler should not be asked often

_Cell = Callable[[RunProgress], str]


def status(run_dir: Path) -> str:
    """State of one run, of its job and of its training, line by line."""
    jobs, progress = records(run_dir), read_progress(run_dir)
    if not jobs and not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} holds no run and had no job; give a run directory")
    lines = [("run", str(run_dir))]
    if jobs:
        lines += _job_lines(jobs[-1], progress)
    lines.append(("step", f"{progress.step} of {progress.steps or '?'}{_loss(progress)}"))
    if progress.row:
        rate, step_s = progress.row.get("samples_per_s", 0.0), progress.row.get("step_s", 0.0)
        lines.append(("speed", f"{rate:.4g} samples/s, {step_s:.3g} s a step"))
    lines.append(("left", _left(progress)))
    lines += [
        ("changed", f"from step {change.step} on: {changes_text(change.settings)}")
        for change in read_changes(run_dir)
    ]
    lines.append(("saved", f"step {progress.saved}" if progress.saved else "nothing yet"))
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def _job_lines(record: JobRecord, progress: RunProgress) -> list[tuple[str, str]]:
    state = job_state(record)
    nodes = f" on {state.nodes}" if state.nodes else ""
    since = f", {state.elapsed} of {state.limit}" if state.elapsed else ""
    why = f" ({state.reason})" if state.reason and not state.nodes else ""
    lines = [("job", f"{record.job} {_state(record, state, progress)}{nodes}{since}{why}")]
    starts = Path(record.folder) / f"{record.job}.starts"
    log = record.log_files(0)[0]
    if os.path.exists(starts):  # of a record's own folder, whatever that is
        count = starts.read_text(errors="replace").rpartition(" ")[2].strip()
        lines.append(("starts", f"{count or '?'} from the same checkpoint"))
    elif state.state in ("FAILED", "CANCELLED") and not os.path.exists(log):
        lines.append(("note", f"it wrote no {log}: can nodes write there?"))
    return lines


def table(folder: Path, metrics: list[str]) -> str:
    """Table of the runs at a folder or below it.

    Args:
        metrics: names in metrics.jsonl, each a column of its last values.
    """
    columns: dict[str, _Cell] = {
        "step": lambda progress: f"{progress.step}/{progress.steps or '?'}",
        **{name: _metric(name) for name in metrics},
        "samples/s": _metric("samples_per_s"),
        "left": _left,
    }
    run_dirs = find_runs(folder)
    if not run_dirs:
        raise ConfigError(f"there are no runs in {folder}; give a folder of run directories")
    jobs = {run_dir: past[-1] for run_dir in run_dirs if (past := records(run_dir))}
    states = dict(zip(jobs, job_states(list(jobs.values())), strict=True))
    rows = []
    for run_dir in run_dirs:
        progress = read_progress(run_dir)
        job = state = "-"
        if run_dir in jobs:
            job = jobs[run_dir].job
            state = _state(jobs[run_dir], states[run_dir], progress)
        name = str(run_dir.relative_to(folder)) if run_dir != folder else str(run_dir)
        rows.append([name, job, state, *(cell(progress) for cell in columns.values())])
    return format_table(["run", "job", "state", *columns], rows)


def _metric(name: str) -> _Cell:
    return lambda progress: f"{progress.row[name]:.4g}" if name in progress.row else "-"


def _loss(progress: RunProgress) -> str:
    return f", loss {progress.row['loss']:.4g}" if "loss" in progress.row else ""


def _left(progress: RunProgress) -> str:
    if progress.left_s is None or progress.step == progress.steps:
        return "-"
    minutes, seconds = divmod(round(progress.left_s), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _state(record: JobRecord, state: JobState, progress: RunProgress) -> str:
    """SLURM's word; where it has none any more, that of the run directory."""
    if state.has_ended and os.path.exists(record.cancelled):
        return "CANCELLED"
    if state.state != "UNKNOWN":
        return state.state
    is_complete = progress.steps is not None and progress.saved == progress.steps
    return "COMPLETED" if is_complete else "ENDED"


def show_logs(run_dir: Path, rank: int, follow: bool) -> None:
    """Print the output of the last job of a run and one of its ranks, and follow it if asked to.

    Raises:
        ConfigError: there is nothing and no more to come.
    """
    record, follower = last_record(run_dir), Follower()
    files = record.log_files(rank)
    polls, ended, printed = 0, False, False
    # First what is there already, file by file; then what is added, as it comes.
    batches = [[path] for path in files]
    while True:
        if follow and polls % _STATE_EVERY == 0:
            ended = job_state(record).has_ended
        for batch in batches:
            for _, text in follower.read(batch, to_end=not follow or ended):
                sys.stdout.write(text)
                sys.stdout.flush()
                printed = True
        batches = [files]
        if not follow or ended:
            break
        polls += 1
        time.sleep(_POLL_S)
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
    state = job_state(record)
    if state.has_ended:
        return f"job {record.job} has ended already ({state.state})"
    record.cancelled.touch()
    if state.state == "PENDING":
        slurm_output("scancel", record.job)
        return f"job {record.job} is cancelled; it was waiting"
    _signal_to_stop(record)
    for poll in range(int(timeout_s / _POLL_S)):
        time.sleep(_POLL_S)
        if job_state(record).has_ended:
            step = newest_step(run_dir)
            what = f"saved step {step}" if step else "saved nothing"
            return f"job {record.job} has {what} and ended"
        if poll % _SIGNAL_EVERY == _SIGNAL_EVERY - 1:
            _signal_to_stop(record)  # in case it had no ranks yet
    _kill(record)
    return (
        f"job {record.job} did not end within {timeout_s:g} s and was ended by force; step "
        f"{newest_step(run_dir)} is saved"
    )


def _signal_to_stop(record: JobRecord) -> None:
    if record.cluster == "local":
        for process in ranks_of(record):
            process.send_signal(signal.SIGTERM)
    else:
        slurm_output("scancel", "--signal=USR2", record.job)  # to its ranks; the script goes on


def ranks_of(record: JobRecord) -> list[psutil.Process]:
    """Ranks of a job of submitit's local executor, which has a shell and a controller between."""
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
        slurm_output("scancel", record.job)
