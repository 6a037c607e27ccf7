"""Measure trained runs on held-out data: one table, and pictures in each run directory.

Every number stands beside what it has to be read against: the same measure of raw pixels, or of
training data in the place of generated samples.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dist_contrastive import config as configs
from dist_contrastive import metrics, report
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples, image_shape
from dist_contrastive.data.index import ShardIndex
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.generative import (
    class_agreement,
    energy_distance,
    precision_recall,
)
from dist_contrastive.evaluation.neighbours import knn_accuracy
from dist_contrastive.evaluation.probe import few_label_probe
from dist_contrastive.tasks import Drift, TwoView, build_task
from dist_contrastive.tasks.runs import load_weights

PER_CLASS = 10  # labelled samples of the few-label probe
DRAWS = 20
GENERATED_PER_HELD_OUT = 4


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    run: str
    name: str
    value: float
    beside: dict[str, float]
    """The same measure of what the value is to be compared with."""


@dataclass(frozen=True)
class _Splits:
    train: Samples
    test: Samples
    shape: tuple[int, int, int]


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
    splits = _read_splits(config)
    task = build_task(config, splits.shape)
    if isinstance(task, TwoView):
        load_weights(task, run)
        lines = _encoder(task.eval(), splits, run)
    else:
        assert isinstance(task, Drift)
        labels = _labels(splits.test).repeat(GENERATED_PER_HELD_OUT)
        before = task.eval().generate(labels, len(labels), seed=0)  # as initialised
        load_weights(task, run)
        lines = _generator(task, before, labels, splits, run)
    report.loss_curves(metrics.read_rows(run), run / "plots" / "loss.png", title=str(run))
    measures = [Measure(str(run), *line) for line in lines]
    text = json.dumps([asdict(m) for m in measures], indent=1) + "\n"
    (run / "eval.json").write_text(text)
    return measures


Line = tuple[str, float, dict[str, float]]


def _read_splits(config: RunConfig) -> _Splits:
    data = config.data
    if data.test is None or data.label is None:
        raise ConfigError("eval needs data.test (held-out shards) and data.label in the config")
    train, test = ShardIndex.load(data.train), ShardIndex.load(data.test)
    return _Splits(
        data.fields.read(train, range(len(train))),
        data.fields.read(test, range(len(test))),
        image_shape(train, data.image),
    )


def _labels(samples: Samples) -> Tensor:
    assert samples.labels is not None
    return samples.labels


def _encoder(task: TwoView, splits: _Splits, run: Path) -> list[Line]:
    train, test = splits.train, splits.test
    features = task.represent(train.images), task.represent(test.images)
    pixels = train.images, test.images
    title = "held-out samples in the representation"
    report.embedding_map(features[1], _labels(test), run / "plots" / "embedding.png", title)

    def knn(x: tuple[Tensor, Tensor]) -> float:
        return knn_accuracy(x[0], _labels(train), x[1], _labels(test))

    def probe(x: tuple[Tensor, Tensor]) -> float:
        return few_label_probe(x[0], _labels(train), x[1], _labels(test), PER_CLASS, DRAWS).mean

    return [
        ("kNN accuracy, k = 5", knn(features), {"raw pixels": knn(pixels)}),
        (
            f"linear probe, {PER_CLASS} labels a class, mean of {DRAWS} draws",
            probe(features),
            {"raw pixels": probe(pixels)},
        ),
    ]


def _generator(
    task: Drift, before: Tensor, labels: Tensor, splits: _Splits, run: Path
) -> list[Line]:
    """`before`: what the untrained generator made of the same noise and labels."""
    train, test = splits.train, splits.test
    made = task.generate(labels, len(labels), seed=0)
    path = run / "plots" / "samples.png"
    report.sample_grid(made, labels, test.images, _labels(test), path, title=str(run))
    # Precision and recall compare only between sets of equal sizes, class by class.
    few = slice(0, len(test.images))
    same = _as_many_of_each(train, _labels(test))

    def energy(x: Tensor) -> float:
        return energy_distance(x, test.images)

    def agree(x: Tensor, y: Tensor) -> float:
        return class_agreement(train.images, _labels(train), x, y)

    generated, start, data = energy(made), energy(before), energy(train.images)
    ours = precision_recall(test.images, _labels(test), made[few], labels[few])
    theirs = precision_recall(test.images, _labels(test), train.images[same], _labels(train)[same])
    return [
        ("energy distance", generated, {"train data": data, "untrained": start}),
        ("part of the way to train data", (start - generated) / (start - data), {}),
        (
            "kNN agrees with the class asked for",
            agree(made, labels),
            {"held-out data": agree(test.images, _labels(test))},
        ),
        ("precision", ours.precision, {"train data": theirs.precision}),
        ("recall", ours.recall, {"train data": theirs.recall}),
    ]


def _as_many_of_each(samples: Samples, labels: Tensor) -> Tensor:
    """Indices of the first samples of each class, as many as `labels` has of it."""
    mine = _labels(samples)
    chosen = [
        (mine == label).nonzero().flatten()[: int((labels == label).sum())]
        for label in labels.unique()
    ]
    return torch.cat(chosen)
