"""The command ``dist-contrastive``."""

import argparse
import sys
from pathlib import Path

from dist_contrastive import __version__
from dist_contrastive.cli import checking, packing
from dist_contrastive.cli.ending import reporting_errors
from dist_contrastive.cli.parsing import parse
from dist_contrastive.errors import ConfigError

# torch and the rest are imported by the commands that need them: --help answers at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parse(_parser(), argv)
    if "" not in sys.path:  # a reward function may lie in the current folder, as for `python -m`
        sys.path.insert(0, "")
    try:
        with reporting_errors() as outcome:
            outcome.code = args.command(args)
    except KeyboardInterrupt:
        print("dist-contrastive: interrupted", file=sys.stderr)
        return 130
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-contrastive",
        description="Train encoders and one-step generators by comparing every sample of a very "
        "large batch with every other.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on with the run in run_dir")
    train.add_argument("config", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    train.set_defaults(command=_train)

    doctor = commands.add_parser("doctor", help="look at all that training needs, without training")
    doctor.add_argument("config", help="YAML file")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    doctor.add_argument("--ranks", type=int, default=1, metavar="N", help="that it is to have")
    doctor.set_defaults(command=_doctor)

    evaluate = commands.add_parser("eval", help="measure trained runs, print one table")
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser("export", help="write the weights and config of a trained run")
    export.add_argument("run", type=Path, metavar="RUN", help="run directory")
    export.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")
    export.add_argument("--checkpoint", choices=["newest", "best"], default="newest")
    export.set_defaults(command=_export)

    sample = commands.add_parser("sample", help="write samples of a trained generator")
    sample.add_argument("run", type=Path, metavar="RUN", help="run directory of task drift")
    sample.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/samples")
    sample.add_argument("--count", type=int, default=80, help="how many (default 80)")
    sample.add_argument("--classes", type=int, nargs="+", metavar="C", help="default: all in turn")
    sample.add_argument(
        "--guidance", type=float, default=1.0, metavar="S", help="strength, 1 (none) or more"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(command=_sample)

    audit = commands.add_parser(
        "audit", help="prove every loss's gradient on several ranks against one process"
    )
    audit.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 3, 4], metavar="W")
    audit.add_argument("--only", default="", metavar="TEXT", help="losses whose name contains it")
    audit.set_defaults(command=_audit)

    shards = commands.add_parser("shards", help="make, index, merge and check shards of samples")
    commands = shards.add_subparsers(required=True, metavar="COMMAND")
    packing.add_commands(commands)
    checking.add_commands(commands)
    return parser


def _train(args: argparse.Namespace) -> int:
    from dist_contrastive import trainer
    from dist_contrastive.config import load

    return trainer.train(load(args.config, args.overrides))


def _doctor(args: argparse.Namespace) -> int:
    from dist_contrastive.config import load
    from dist_contrastive.trainer.doctor import Finding, examine

    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks} is below 1; use 1 or more")
    is_fine = True
    config = load(args.config, args.overrides)
    told = f"{args.config}: task {config.task.name}, {config.train.steps} steps"
    print(Finding("config", True, told))
    for finding in examine(config, args.ranks):
        is_fine = is_fine and finding.is_fine
        print(finding)
    return 0 if is_fine else ConfigError.exit_code


def _evaluate(args: argparse.Namespace) -> int:
    from dist_contrastive.runs import evaluate_runs, print_table

    print_table(evaluate_runs(args.runs))
    return 0


def _export(args: argparse.Namespace) -> int:
    from dist_contrastive.runs import export

    out = args.out or args.run / "export"
    found = export(args.run, out, args.checkpoint)
    print(f"weights after step {found.progress.step} and config in {out}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    from dist_contrastive.runs import write_samples

    out = args.out or args.run / "samples"
    grid = write_samples(args.run, out, args.count, args.classes, args.guidance, args.seed)
    print(f"{args.count} samples in {out}, all in {grid}")
    return 0


def _audit(args: argparse.Namespace) -> int:
    from dist_contrastive import audit

    cases = {name: case for name, case in audit.CASES.items() if args.only in name}
    if not cases:
        raise ConfigError(f"--only {args.only!r} is in no name; known are {'; '.join(audit.CASES)}")
    if not all(1 <= size <= audit.MOST_RANKS for size in args.world_sizes):
        raise ConfigError(f"--world-sizes {args.world_sizes} must be 1 to {audit.MOST_RANKS} ranks")
    findings = audit.audit(args.world_sizes, cases)
    print(audit.table(findings))
    worst = max(findings, key=lambda finding: finding.error)
    print(f"\n{len(findings)} ways, worst error {worst.error:.1e}: {worst.loss}, {worst.way}")
    return 0 if worst.error <= audit.TOLERANCE else 1
