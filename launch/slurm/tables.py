"""What there is to see of runs, from their directories and from SLURM."""

from collections.abc import Callable
from pathlib import Path

from dist_contrastive.errors import ConfigError
from launch.progress import RunProgress, read_progress
from launch.slurm.cluster import JobState, job_state
from launch.slurm.records import JobRecord, find_runs, records

_Cell = Callable[[RunProgress], str]


def status(run_dir: Path) -> str:
    """All that is known of one run, line by line."""
    found, seen = records(run_dir), read_progress(run_dir)
    if not found and seen.steps is None:
        raise ConfigError(f"{run_dir} holds no run and had no job; give a run directory")
    lines = [("run", str(run_dir))]
    if found:
        lines += _of_job(found[-1], seen)
    lines.append(("step", f"{seen.step} of {seen.steps or '?'}{_loss(seen)}"))
    if seen.row:
        rate, step_s = seen.row.get("samples_per_s", 0.0), seen.row.get("step_s", 0.0)
        lines.append(("speed", f"{rate:.4g} samples/s, {step_s:.3g} s a step"))
    lines.append(("left", _left(seen)))
    lines.append(("saved", f"step {seen.saved}" if seen.saved else "nothing yet"))
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def _of_job(record: JobRecord, seen: RunProgress) -> list[tuple[str, str]]:
    state = job_state(record.job, record.cluster)
    where = f" on {state.nodes}" if state.nodes else ""
    since = f", {state.elapsed} of {state.limit}" if state.elapsed else ""
    why = f" ({state.reason})" if state.reason and not state.nodes else ""
    lines = [("job", f"{record.job} {_state(record, state, seen)}{where}{since}{why}")]
    starts = Path(record.folder) / f"{record.job}.starts"
    log = record.log_files(0)[0]
    if starts.exists():
        lines.append(("starts", f"{starts.read_text().split()[1]} from the same checkpoint"))
    elif state.state in ("FAILED", "CANCELLED") and not log.exists():
        lines.append(("note", f"it wrote no {log}: can nodes write there?"))
    return lines


def table(folder: Path, metrics: list[str]) -> str:
    """A line for each run at a folder or below it.

    Args:
        metrics: names in metrics.jsonl, each a column of its last values.
    """
    columns: dict[str, _Cell] = {
        "step": lambda seen: f"{seen.step}/{seen.steps or '?'}",
        **{name: _metric(name) for name in metrics},
        "samples/s": _metric("samples_per_s"),
        "left": _left,
    }
    rows = [["run", "job", "state", *columns]]
    for run_dir in find_runs(folder):
        found, seen = records(run_dir)[-1:], read_progress(run_dir)
        job = found[0].job if found else "-"
        state = _state(found[0], job_state(found[0].job, found[0].cluster), seen) if found else "-"
        name = str(run_dir.relative_to(folder)) if run_dir != folder else str(run_dir)
        rows.append([name, job, state, *(cell(seen) for cell in columns.values())])
    if len(rows) == 1:
        raise ConfigError(f"there are no runs in {folder}; give a folder of run directories")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _metric(name: str) -> _Cell:
    return lambda seen: f"{seen.row[name]:.4g}" if name in seen.row else "-"


def _loss(seen: RunProgress) -> str:
    return f", loss {seen.row['loss']:.4g}" if "loss" in seen.row else ""


def _left(seen: RunProgress) -> str:
    if seen.left_s is None or seen.step == seen.steps:
        return "-"
    minutes, seconds = divmod(round(seen.left_s), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _state(record: JobRecord, state: JobState, seen: RunProgress) -> str:
    """SLURM's word; where it has none any more, what the run directory says."""
    if state.has_ended and record.cancelled.exists():
        return "CANCELLED"
    if state.state != "UNKNOWN":
        return state.state
    return "COMPLETED" if seen.steps is not None and seen.saved == seen.steps else "ENDED"
