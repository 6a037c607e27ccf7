"""The command ``dist-contrastive``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dist_contrastive import __version__
from dist_contrastive.cli import planning, shards
from dist_contrastive.cli.app import (
    MOST_RANKS,
    ConfigFile,
    MayChange,
    Overrides,
    SeveralValues,
    examples,
    new_app,
    quick_imports,
    run,
)
from dist_contrastive.errors import ConfigError

if TYPE_CHECKING:
    from dist_contrastive.config.reference import Row

# torch and the rest are imported by the commands that need them: --help answers at once.

app = new_app(
    "Train encoders and one-step generators by comparing every sample of a very large batch with "
    "every other.",
    completion=True,
)
app.add_typer(shards.app, name="shards")

_Trust = Annotated[bool, typer.Option("--trust", help="Run the code that the config of RUN names.")]
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run(app, "dist-contrastive", argv)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command(
    "train",
    epilog=examples(
        "dist-contrastive train configs/digits_encoder.yaml",
        "dist-contrastive train configs/digits_encoder.yaml optim.lr=0.001 run_dir=runs/slow",
        "dist-contrastive train configs/digits_encoder.yaml train.steps=900 --change",
        "torchrun --nproc-per-node 8 -m dist_contrastive train CONFIG",
    ),
)
def _train(config: ConfigFile, overrides: Overrides = None, change: MayChange = False) -> int:
    """Train, or go on with the run in run_dir."""
    with quick_imports():
        import torch._dynamo  # noqa: F401  the first optimizer does

        from dist_contrastive import trainer
        from dist_contrastive.config import load

    return trainer.train(load(config, overrides or []), change=change)


@app.command(
    "doctor", epilog=examples("dist-contrastive doctor configs/digits_encoder.yaml --ranks 8")
)
def _doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(metavar="N", help="Ranks that will train.")] = 1,
    change: MayChange = False,
) -> int:
    """Check all that training needs, without training."""
    with quick_imports():
        from dist_contrastive.config import load
        from dist_contrastive.trainer.checks import Finding, examine
        from dist_contrastive.trainer.failures import plan_of_run

    if not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"--ranks {ranks} is not 1 to {MOST_RANKS}; give the ranks of the run")
    loaded = load(config, overrides or [])
    summary = f"{config}: task {loaded.task.name}, {loaded.train.steps} steps"
    print(Finding("config", True, summary))
    if planned := plan_of_run(loaded, ranks):
        print(Finding("plan", True, planning.line(planned)))
    is_fine = True
    for finding in examine(loaded, ranks, change=change):
        is_fine = is_fine and finding.is_fine
        print(finding)
    return 0 if is_fine else ConfigError.exit_code


app.command("plan", epilog=examples(*planning.EXAMPLES))(planning.plan)


@app.command(
    "eval",
    epilog=examples(
        "dist-contrastive eval runs/digits_encoder runs/other",
        "dist-contrastive eval runs/photos --only knn,probe --limit 20000",
        "dist-contrastive eval runs/photos --only few --few 1%,10% --split val",
        "torchrun --nproc-per-node 8 -m dist_contrastive eval RUN --only all",
    ),
)
def _evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    only: Annotated[
        str | None,
        typer.Option(metavar="MEASURE,...", help="Measures, or all.", show_default="the usual"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples of each split, spread evenly.", show_default="all"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Held-out split, beside data.test.", show_default="test"),
    ] = None,
    few: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Labels a class of probes, or 1%,10%.", show_default="10"
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Templates for zero-shot, of YAML.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Measure raw pixels however many there are.")
    ] = False,
    trust: _Trust = False,
) -> None:
    """Measure trained runs, print one table."""
    with quick_imports():
        from dist_contrastive.evaluate import evaluate_runs, print_table
        from dist_contrastive.evaluation.options import eval_options

    options = eval_options(only, limit, baselines, few, split, prompts)
    print_table(evaluate_runs(runs, trust, options))


@app.command(
    "export",
    epilog=examples("dist-contrastive export runs/digits_encoder --out exported"),
)
def _export(
    run: _Run,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write.", show_default="RUN/export")
    ] = None,
    checkpoint: Annotated[
        Literal["newest", "best"], typer.Option(help="The one to take.")
    ] = "newest",
    trust: _Trust = False,
) -> None:
    """Write the weights and config of a trained run."""
    from dist_contrastive.runs import export

    out = out or run / "export"
    exported = export(run, out, checkpoint, trust)
    print(f"weights after step {exported.progress.step} and config in {out}")


@app.command(
    "embed",
    epilog=examples(
        "dist-contrastive embed runs/photos data/photos/test --out vectors.npy",
        "torchrun --nproc-per-node 8 -m dist_contrastive embed RUN SHARDS --out vectors.parquet",
    ),
)
def _embed(
    run: _Run,
    source: Annotated[
        str, typer.Argument(help="Folder, pattern or URL of shards, or a folder of images.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="New file, .npy or .parquet.")],
    what: Annotated[
        Literal["representation", "embedding", "partner"],
        typer.Option(help="Of the encoder, after its head, or of the second modality."),
    ] = "representation",
    trust: _Trust = False,
) -> None:
    """Write vectors of a data set, with their keys."""
    with quick_imports():
        from dist_contrastive.embed import embed

    embedded = embed(run, source, out, what, trust)
    for reason in embedded.left_out[:3]:
        print(f"left out: {reason}")
    print(f"{embedded.rows} vectors in {out}, {len(embedded.left_out)} samples left out")


@app.command(
    "sample",
    cls=SeveralValues,
    epilog=examples(
        "dist-contrastive sample runs/digits_generator --count 20 --classes 3 8 --guidance 1.5"
    ),
)
def _sample(
    run: _Run,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write.", show_default="RUN/samples"),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="Number of samples.")] = 80,
    classes: Annotated[
        list[int] | None,
        typer.Option(metavar="C...", help="Classes to draw.", show_default="all in turn"),
    ] = None,
    guidance: Annotated[float, typer.Option(metavar="S", help="Strength, 1 (none) or more.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the noise.")] = 0,
    trust: _Trust = False,
) -> None:
    """Write samples of a trained generator."""
    from dist_contrastive.runs import write_samples

    out = out or run / "samples"
    grid = write_samples(run, out, count, classes, guidance, seed, trust)
    print(f"{count} samples in {out}, all in {grid}")


@app.command(
    "config",
    epilog=examples(
        "dist-contrastive config optim",
        "dist-contrastive config infonce",
        "dist-contrastive config loss --json",
    ),
)
def _config(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION",
            help="A key, as optim.lr, or a name in one, as loss, or of a component, as infonce.",
            show_default="all",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List the settings of a run: type, limits, unit, default, help."""
    from dist_contrastive.config.reference import as_json, reference
    from dist_contrastive.tables import print_table

    rows = reference(section)
    if json:
        print(as_json(rows))
        return
    print_table(["key", "type", "default", "help"], [_setting_cells(row) for row in rows])


def _setting_cells(row: "Row") -> tuple[str, str, str, str]:
    component = row.when.rpartition("=")[2].replace("|", " | ")
    kind = ", ".join(filter(None, (row.type, row.limits, row.unit)))
    return row.key, kind, row.default, f"{row.help} ({component})" if component else row.help


@app.command(
    "audit",
    cls=SeveralValues,
    epilog=examples("dist-contrastive audit --only InfoNCE --world-sizes 1 2"),
)
def _audit(
    world_sizes: Annotated[
        list[int] | None,
        typer.Option(metavar="W...", help="Numbers of ranks.", show_default="1 2 3 4"),
    ] = None,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Losses whose name has it.")] = "",
) -> int:
    """Prove every loss's gradient on several ranks against one process."""
    from dist_contrastive import audit

    world_sizes = world_sizes or [1, 2, 3, 4]
    cases = {name: case for name, case in audit.CASES.items() if only in name}
    if not cases:
        raise ConfigError(f"--only {only!r} is in no name; known are {'; '.join(audit.CASES)}")
    if not all(1 <= size <= audit.MOST_RANKS for size in world_sizes):
        raise ConfigError(f"--world-sizes {world_sizes} must be 1 to {audit.MOST_RANKS} ranks")
    findings = audit.audit(world_sizes, cases)
    print(audit.table(findings))
    worst = max(findings, key=lambda finding: finding.error)
    print(f"\n{len(findings)} ways, worst error {worst.error:.1e}: {worst.loss}, {worst.way}")
    return 0 if worst.error <= audit.TOLERANCE else 1
