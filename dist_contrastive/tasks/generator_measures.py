"""What `eval` measures of a generator."""

from pathlib import Path

import torch
from torch import Tensor

from dist_contrastive import report
from dist_contrastive.data.fields import Samples
from dist_contrastive.evaluation.generative import (
    class_agreement,
    energy_distance,
    precision_recall,
)
from dist_contrastive.tasks.drift import Drift
from dist_contrastive.tasks.splits import Line, Splits, labels_of


def measure_generator(
    task: Drift, before: Tensor, labels: Tensor, splits: Splits, run: Path
) -> list[Line]:
    """How near to held-out data it comes, and a grid of samples.

    Args:
        before: what the untrained generator made of the same noise and labels.
        run: the run directory, for pictures.
    """
    train, test = splits.train, splits.test
    made = task.generate(labels, len(labels), seed=0)
    path = run / "plots" / "samples.png"
    report.sample_grid(made, labels, test.images, labels_of(test), path, title=str(run))
    # Precision and recall compare only between sets of equal sizes, class by class.
    few = slice(0, len(test.images))
    same = _as_many_of_each(train, labels_of(test))

    def energy(x: Tensor) -> float:
        return energy_distance(x, test.images)

    def agree(x: Tensor, y: Tensor) -> float:
        return class_agreement(train.images, labels_of(train), x, y)

    generated, start, data = energy(made), energy(before), energy(train.images)
    ours = precision_recall(test.images, labels_of(test), made[few], labels[few])
    theirs = precision_recall(
        test.images, labels_of(test), train.images[same], labels_of(train)[same]
    )
    return [
        ("energy distance", generated, {"train data": data, "untrained": start}),
        ("part of the way to train data", (start - generated) / (start - data), {}),
        (
            "kNN agrees with the class asked for",
            agree(made, labels),
            {"held-out data": agree(test.images, labels_of(test))},
        ),
        ("precision", ours.precision, {"train data": theirs.precision}),
        ("recall", ours.recall, {"train data": theirs.recall}),
    ]


def _as_many_of_each(samples: Samples, labels: Tensor) -> Tensor:
    """Indices of the first samples of each class, as many as `labels` has of it."""
    mine = labels_of(samples)
    chosen = [
        (mine == label).nonzero().flatten()[: int((labels == label).sum())]
        for label in labels.unique()
    ]
    return torch.cat(chosen)
