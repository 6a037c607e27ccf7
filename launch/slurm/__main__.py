"""``python -m launch.slurm``: submit runs to a SLURM cluster, see them, end them."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from dist_contrastive.cli.ending import reporting_errors
from dist_contrastive.cli.parsing import parse
from dist_contrastive.errors import ConfigError

# torch and the rest are imported by the commands that need them: status answers at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parse(_parser(), argv)
    with reporting_errors() as outcome:
        try:
            args.command(args)
        except KeyboardInterrupt:
            outcome.code = 130
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    submit = commands.add_parser("submit", help="submit a config, or a sweep: key=a,b,c")
    submit.add_argument("config", type=Path, help="YAML file")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    submit.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    _add_options(submit)
    submit.set_defaults(command=_submit)

    resume = commands.add_parser("resume", help="submit a run again, from where it is")
    resume.add_argument("run", type=Path, metavar="RUN", help="run directory")
    _add_options(resume)
    resume.set_defaults(command=_resume)

    status = commands.add_parser("status", help="state of runs: of the job, and of the training")
    status.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    status.set_defaults(command=_status)

    listing = commands.add_parser("list", help="a table of the runs in a folder, or of a sweep")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER")
    listing.add_argument("--metric", nargs="+", default=["loss"], metavar="NAME", help="columns")
    listing.set_defaults(command=_list)

    logs = commands.add_parser("logs", help="what the last job of a run wrote")
    logs.add_argument("run", type=Path, metavar="RUN", help="run directory")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    logs.add_argument("--rank", type=int, default=0, metavar="R", help="whose (default 0)")
    logs.set_defaults(command=_logs)

    cancel = commands.add_parser("cancel", help="save, and end the job of a run")
    cancel.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    cancel.add_argument("--timeout-s", type=float, default=600, help="for saving (default 600)")
    cancel.set_defaults(command=_cancel)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", type=Path, metavar="FILE", help="YAML file of the site")
    parser.add_argument("--no-doctor", action="store_true", help="do not try the config here first")
    flags: dict[str, tuple[type, str]] = {
        "nodes": (int, "default 1"),
        "gpus-per-node": (int, "one rank for each; default 0"),
        "tasks-per-node": (int, "ranks of a node, where they are not its GPUs"),
        "cpus-per-task": (int, "of a rank: one, and one for each data worker"),
        "memory-gb": (float, "of a node"),
        "time": (str, "limit of one start: minutes, H:MM:SS or D-HH:MM:SS; default 1:00:00"),
        "partition": (str, "of the cluster"),
        "account": (str, "that is charged"),
        "qos": (str, "quality of service"),
        "constraint": (str, "what nodes must have"),
        "name": (str, "of the job; default: that of the run directory"),
        "signal-lead-s": (int, "how long before its end a job saves; default: measured"),
        "parallel": (int, "jobs of a sweep at the same time"),
        "python": (str, "the command that runs Python on the nodes"),
    }
    for flag, (kind, text) in flags.items():
        parser.add_argument(f"--{flag}", type=kind, help=text, metavar=kind.__name__.upper())


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    from launch.slurm.options import Options

    return {name: getattr(args, name, None) for name in Options.model_fields}


def _submit(args: argparse.Namespace) -> None:
    from dist_contrastive.config import load
    from launch.slurm.options import load_options
    from launch.slurm.sweep import expand

    options = load_options(args.profile, _flags(args))
    swept = expand(args.overrides)
    runs = [load(args.config, overrides) for _, overrides in swept]
    root = runs[0].run_dir
    if len(runs) > 1:
        if (root / "config.yaml").exists():
            raise ConfigError(f"{root} holds a run already; give the sweep another run_dir")
        runs = [
            run.model_copy(update={"run_dir": root / name})
            for run, (name, _) in zip(runs, swept, strict=True)
        ]
    _submit_runs(args, runs, options, root, args.cluster, args.dry_run)


def _resume(args: argparse.Namespace) -> None:
    from dist_contrastive.config import load
    from launch.slurm.options import load_options
    from launch.slurm.records import last_record

    record, run_dir = last_record(args.run), args.run.absolute()
    before = {k: v for k, v in record.options.items() if args.profile is None}
    given = {k: v for k, v in _flags(args).items() if v is not None}
    options = load_options(args.profile, {**before, "signal_lead_s": None, **given})
    try:
        os.chdir(record.cwd)  # for paths in the config
    except OSError as error:
        raise ConfigError(
            f"{args.run} was submitted in {record.cwd}, which is not there any more; make it, or "
            f"submit anew with run_dir={args.run}"
        ) from error
    runs = [load(record.config).model_copy(update={"run_dir": run_dir})]
    _submit_runs(args, runs, options, run_dir, record.cluster, False)


def _submit_runs(
    args: argparse.Namespace, runs: list[Any], options: Any, root: Path, cluster: str, is_dry: bool
) -> None:
    from launch.slurm import checks, submission
    from launch.slurm.cluster import require_slurm

    if cluster == "slurm" and not is_dry:
        require_slurm()
        checks.check_cluster(options)
    checks.check_runs(runs, options.world_size)
    save_s, step_s = checks.measured_s(runs[0].run_dir) or (0.0, 0.0)
    if not (args.no_doctor or is_dry):
        for finding in checks.examined(runs[0], options.world_size):
            print(finding, flush=True)
            save_s = save_s or finding.save_s or 0.0
    lead_s = options.signal_lead_s or submission.lead_s(save_s, step_s)
    checks.check_lead(lead_s, options)
    options = options.model_copy(update={"signal_lead_s": lead_s})
    planned = submission.Submission(runs, options, root.absolute(), Path.cwd(), cluster)
    if is_dry:
        print(submission.script(planned, planned.new_folder()))
        return
    jobs = submission.submit(planned)
    for config, job in zip(runs, jobs, strict=True):
        print(f"job {job}: {config.run_dir}")
    print(f"follow it with python -m launch.slurm logs -f {runs[0].run_dir}")


def _status(args: argparse.Namespace) -> None:
    from launch.slurm.tables import status

    print("\n\n".join(status(run_dir) for run_dir in args.runs))


def _list(args: argparse.Namespace) -> None:
    from launch.slurm.tables import table

    print(table(args.folder, args.metric))


def _logs(args: argparse.Namespace) -> None:
    from launch.slurm.control import show_logs

    show_logs(args.run, args.rank, args.follow)


def _cancel(args: argparse.Namespace) -> None:
    from launch.slurm.control import cancel

    for run_dir in args.runs:
        print(cancel(run_dir, args.timeout_s), flush=True)


if __name__ == "__main__":
    sys.exit(main())
