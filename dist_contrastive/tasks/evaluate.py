"""Measure trained runs on held-out data: one table, and pictures in each run directory.

Every number stands beside what it has to be read against: the same measure of raw pixels, or of
training data in the place of generated samples.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_contrastive import config as configs
from dist_contrastive import metrics, report
from dist_contrastive.tasks import Drift, ImageTask, build_task
from dist_contrastive.tasks.encoder_measures import measure_encoder
from dist_contrastive.tasks.generator_measures import measure_generator
from dist_contrastive.tasks.runs import load_weights
from dist_contrastive.tasks.splits import labels_of, read_splits, with_labels

GENERATED_PER_HELD_OUT = 4


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    run: str
    name: str
    value: float
    beside: dict[str, float]
    """The same measure of what the value is to be compared with."""


def evaluate_runs(runs: list[Path]) -> list[Measure]:
    """Measure each run; writes RUN/eval.json and the pictures in RUN/plots."""
    return [measure for run in runs for measure in _evaluate(run)]


def print_table(measures: list[Measure]) -> None:
    """All measures in one table on stdout, and where the pictures are."""
    # A file or a pipe has no width of its own; rich would take 80 columns and cut names off.
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("run", "measure", "value", "to compare with")
    for m in measures:
        beside = ", ".join(f"{name} {value:.4f}" for name, value in m.beside.items())
        table.add_row(m.run, m.name, f"{m.value:.4f}", beside)
    console.print(table)
    for run in dict.fromkeys(m.run for m in measures):
        console.print(f"pictures: {run}/plots", soft_wrap=True)


def _evaluate(run: Path) -> list[Measure]:
    config = configs.load_run(run)
    splits = read_splits(config)
    task = build_task(config, splits.train).eval()
    if isinstance(task, ImageTask):
        load_weights(task, run)
        lines = measure_encoder(task, splits, run)
    else:
        assert isinstance(task, Drift)
        labels, count = None, len(splits.test.images) * GENERATED_PER_HELD_OUT
        if config.data.num_classes is not None:
            splits = with_labels(splits)
            labels = labels_of(splits.test).repeat(GENERATED_PER_HELD_OUT)
            count = len(labels)
        before = task.generate(labels, count, seed=0)  # as initialised
        load_weights(task, run)
        lines = measure_generator(task, before, labels, splits, run)
    rows = metrics.read_rows(run)
    terms = sorted({name for row in rows for name in row if name.startswith("loss/")})
    fields = ("loss", *terms, "mean_reward", "lr")
    report.loss_curves(rows, run / "plots" / "loss.png", fields, title=str(run))
    measures = [Measure(str(run), *line) for line in lines]
    text = json.dumps([asdict(m) for m in measures], indent=1) + "\n"
    (run / "eval.json").write_text(text)
    return measures
