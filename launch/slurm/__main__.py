"""Submit runs to a SLURM cluster, see them, end them: ``python -m launch.slurm``."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dist_contrastive.cli.app import (
    ConfigFile,
    MayChange,
    Overrides,
    SeveralValues,
    examples,
    new_app,
    run,
    with_options,
)
from dist_contrastive.errors import ConfigError
from launch.slurm.options import job_flags, load_options

# torch and the rest are imported by the commands that need them: status answers at once.

app = new_app("Submit runs to a SLURM cluster, see them, end them.")

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
_Runs = Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")]
_Profile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of the site.")]
_NoDoctor = Annotated[
    bool, typer.Option("--no-doctor", help="Do not try the config here before it is submitted.")
]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run(app, "python -m launch.slurm", argv)


@app.command(
    "submit",
    epilog=examples(
        "python -m launch.slurm submit CONFIG --nodes 2 --gpus-per-node 8 --time 8:00:00",
        "python -m launch.slurm submit CONFIG --profile site.yaml optim.lr=0.001,0.004",
        "python -m launch.slurm submit CONFIG --dry-run",
    ),
)
@with_options(job_flags)
def _submit(
    config: ConfigFile,
    options: dict[str, Any],
    overrides: Overrides = None,
    cluster: Annotated[
        Literal["slurm", "local"], typer.Option(help="SLURM, or processes of this machine.")
    ] = "slurm",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, submit nothing.")
    ] = False,
    profile: _Profile = None,
    no_doctor: _NoDoctor = False,
    change: MayChange = False,
) -> None:
    """Submit a config, or a sweep: key=a,b,c."""
    from dist_contrastive.config import load
    from launch.slurm.submission import expand

    job_options = load_options(profile, options)
    sweep = expand(overrides or [])
    runs = [load(config, run_overrides) for _, run_overrides in sweep]
    root = runs[0].run_dir
    if len(runs) > 1:
        if (root / "config.yaml").exists():
            raise ConfigError(f"{root} holds a run already; give the sweep another run_dir")
        runs = [
            run.model_copy(update={"run_dir": root / name})
            for run, (name, _) in zip(runs, sweep, strict=True)
        ]
    _submit_runs(runs, job_options, root, cluster, dry_run, no_doctor, change)


@app.command(
    "resume",
    epilog=examples(
        "python -m launch.slurm resume runs/digits_encoder --nodes 1 --time 30",
        "python -m launch.slurm resume runs/digits_encoder train.steps=900 --change",
    ),
)
@with_options(job_flags)
def _resume(
    run: _Run,
    options: dict[str, Any],
    overrides: Overrides = None,
    profile: _Profile = None,
    no_doctor: _NoDoctor = False,
    change: MayChange = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code and shell lines that the run names.")
    ] = False,
) -> None:
    """Submit a run again, from where it is."""
    from dist_contrastive.config import resolve
    from launch.slurm.checks import current_config
    from launch.slurm.cluster import known_options, last_record, require_trusted_record

    record, run_dir = last_record(run), run.absolute()
    before = {k: v for k, v in known_options(record).items() if profile is None}
    require_trusted_record(run, record, before, trust)
    job_options = load_options(profile, {**before, "signal_lead_s": None, **options})
    try:
        os.chdir(record.cwd)  # for paths in the config
    except OSError as error:
        raise ConfigError(
            f"{run} was submitted in {record.cwd}, which is not there any more; make it, or submit "
            f"anew with run_dir={run}"
        ) from error
    current, is_pending = current_config(run_dir, record, trust)
    runs = [resolve(current, overrides or []).model_copy(update={"run_dir": run_dir})]
    change = change or is_pending
    _submit_runs(runs, job_options, run_dir, record.cluster, False, no_doctor, change)


def _submit_runs(
    runs: list[Any],
    options: Any,
    root: Path,
    cluster: str,
    dry_run: bool,
    no_doctor: bool,
    change: bool,
) -> None:
    from launch.slurm import checks, submission
    from launch.slurm.cluster import require_slurm

    checks.check_folder(root.absolute())
    if cluster == "slurm" and not dry_run:
        require_slurm()
        checks.check_cluster(options)
    checks.check_runs(runs, options.world_size, change)
    save_s, step_s = checks.measured_s(runs[0].run_dir) or (0.0, 0.0)
    if not (no_doctor or dry_run):
        for finding in checks.examined(runs[0], options.world_size, change):
            print(finding, flush=True)
            save_s = save_s or finding.save_s or 0.0
    lead_s = options.signal_lead_s or submission.lead_s(save_s, step_s)
    checks.check_lead(lead_s, options)
    options = options.model_copy(update={"signal_lead_s": lead_s})
    planned = submission.Submission(runs, options, root.absolute(), Path.cwd(), cluster, change)
    if dry_run:
        print(submission.script(planned, planned.new_folder()))
        return
    jobs = submission.submit(planned)
    for config, job in zip(runs, jobs, strict=True):
        print(f"job {job}: {config.run_dir}")
    print(f"follow it with python -m launch.slurm logs -f {runs[0].run_dir}")


@app.command("status", epilog=examples("python -m launch.slurm status runs/digits_encoder"))
def _status(runs: _Runs) -> None:
    """State of runs: of the job, and of the training."""
    from launch.slurm.control import status

    print("\n\n".join(status(run_dir) for run_dir in runs))


@app.command(
    "list",
    cls=SeveralValues,
    epilog=examples("python -m launch.slurm list runs/sweep --metric loss lr"),
)
def _list(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds run directories.")] = Path(
        "runs"
    ),
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME...", help="Columns.", show_default="loss")
    ] = None,
) -> None:
    """A table of the runs in a folder, or of a sweep."""
    from launch.slurm.control import table

    print(table(folder, metric or ["loss"]))


@app.command("logs", epilog=examples("python -m launch.slurm logs -f runs/digits_encoder"))
def _logs(
    run: _Run,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
    rank: Annotated[int, typer.Option(metavar="R", help="Rank whose output to print.")] = 0,
) -> None:
    """Print the output of the last job of a run."""
    from launch.slurm.control import show_logs

    show_logs(run, rank, follow)


@app.command("cancel", epilog=examples("python -m launch.slurm cancel runs/digits_encoder"))
def _cancel(
    runs: _Runs, timeout_s: Annotated[float, typer.Option(help="Time for saving.")] = 600.0
) -> None:
    """Save, and end the job of a run."""
    from launch.slurm.control import cancel

    for run_dir in runs:
        print(cancel(run_dir, timeout_s), flush=True)


if __name__ == "__main__":
    sys.exit(main())
