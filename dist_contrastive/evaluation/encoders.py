"""Measures of an encoder, of its classifier, and of two towers, and a map of representations."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dist_contrastive import report
from dist_contrastive.data.fields import Samples
from dist_contrastive.evaluation.neighbours import (
    knn_accuracy,
    knn_regression_error,
    recall_at_k,
    zero_shot_accuracy,
)
from dist_contrastive.evaluation.probe import few_label_probe, linear_probe
from dist_contrastive.evaluation.splits import Line, Splits, Table, labels_of, with_labels
from dist_contrastive.tasks.hybrid import Hybrid
from dist_contrastive.tasks.images import ImageTask
from dist_contrastive.tasks.paired import Paired

PER_CLASS = 10  # labelled samples of the few-label probe
DRAWS = 20
NEIGHBOURS = 5


def measure_encoder(task: ImageTask, splits: Splits, run: Path, table: Table) -> None:
    """Classes or values of labels from the representation, retrieval, and a map of it.

    Args:
        run: the run directory, for pictures.
        table: that the lines are added to.
    """
    if isinstance(task, Paired):
        table.measure("retrieval", partial(_retrieval, task, splits))
        if splits.train.labels is None:
            return
    table.measure("what goes by labels", partial(_by_labels, task, splits, run, table))


def _by_labels(task: ImageTask, splits: Splits, run: Path, table: Table) -> list[Line]:
    splits = with_labels(splits, table)
    train, test = splits.train, splits.test
    pixels, labels = (train.images, test.images), (labels_of(train), labels_of(test))
    features = task.represent(train.images), task.represent(test.images)
    if labels[0].is_floating_point():
        _regression(features, pixels, labels, table)
    else:
        _classification(features, pixels, labels, table)
    if isinstance(task, Hybrid) and task.classifies:
        table.measure("classifier accuracy", partial(_classifier_by_level, task, test))
    if isinstance(task, Paired) and isinstance(train.pair, tuple):
        table.measure("class by its texts", partial(_zero_shot, task, splits))
    title = "held-out samples in the representation"
    path = run / "plots" / "embedding.png"
    report.embedding_map(features[1], labels[1], path, title, names=splits.classes)
    return []  # each measure has added its own


Pair = tuple[Tensor, Tensor]  # of training and of held-out samples


def _classification(features: Pair, pixels: Pair, labels: Pair, table: Table) -> None:
    few = min(PER_CLASS, int(labels[0].unique(return_counts=True)[1].min()))

    def knn(x: Pair) -> float:
        return knn_accuracy(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

    def linear(x: Pair) -> float:
        return linear_probe(x[0], labels[0], x[1], labels[1])

    def few_labels(x: Pair) -> float:
        return few_label_probe(x[0], labels[0], x[1], labels[1], few, DRAWS).mean

    for name, measure in (
        (f"kNN accuracy, k = {NEIGHBOURS}", knn),
        ("linear probe, all labels", linear),
        (f"linear probe, {few} labels a class, mean of {DRAWS} draws", few_labels),
    ):
        table.measure(name, partial(_beside_pixels, name, measure, features, pixels))


def _beside_pixels(
    name: str, measure: Callable[[Pair], float], features: Pair, pixels: Pair
) -> list[Line]:
    return [(name, measure(features), _pixel_reference(measure, pixels))]


def _pixel_reference(measure: Callable[[Pair], float], pixels: Pair) -> dict[str, float]:
    """The same measure of raw pixels; none where held-out images have another size."""
    alike = pixels[0].shape[1:] == pixels[1].shape[1:]
    return {"raw pixels": measure(pixels)} if alike else {}


def _regression(features: Pair, pixels: Pair, labels: Pair, table: Table) -> None:
    name = f"mean absolute error of kNN, k = {NEIGHBOURS}"

    def lines() -> list[Line]:
        def knn(x: Pair) -> float:
            return knn_regression_error(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

        constant = (labels[1] - labels[0].median()).abs().mean().item()
        beside = {**_pixel_reference(knn, pixels), "one value for all": constant}
        return [(name, knn(features), beside)]

    table.measure(name, lines)


def _classifier_by_level(task: Hybrid, test: Samples) -> list[Line]:
    """Accuracy of the decided path, down to each level of the hierarchy."""
    truth, depth = labels_of(test), task.hierarchy.depth
    matched = task.hierarchy.matched_levels(task.classify(test.images).argmax(1), truth)
    nodes = task.hierarchy.ancestors(truth)
    lines: list[Line] = []
    for level in range(1, depth + 1):
        name = "classifier accuracy" + (f", level {level} of {depth}" if depth > 1 else "")
        beside = {"the most frequent": _largest_share(nodes[:, level - 1])}
        lines.append((name, (matched >= level).double().mean().item(), beside))
    return lines


def _retrieval(task: Paired, splits: Splits) -> list[Line]:
    """Recall of the other half of a pair; equal texts are equally right."""
    pair = splits.test.pair
    assert pair is not None
    groups = None
    if not isinstance(pair, Tensor):
        numbers = {text: number for number, text in enumerate(dict.fromkeys(pair))}
        groups = torch.tensor([numbers[text] for text in pair])
    images, partners = task.embed_images(splits.test.images), task.embed_pair(pair)
    chance = {"the most frequent": 1 / len(images) if groups is None else _largest_share(groups)}
    return [
        ("image finds its partner, recall at 1", recall_at_k(images, partners, 1, groups), chance),
        ("partner finds its image, recall at 1", recall_at_k(partners, images, 1, groups), chance),
    ]


def _zero_shot(task: Paired, splits: Splits) -> list[Line]:
    """Zero-shot accuracy by the training texts of each class; other classes are left out."""
    train, test = splits.train, splits.test
    assert train.pair is not None
    present, number = labels_of(train).unique(return_inverse=True)
    embedded = torch.nn.functional.normalize(task.embed_pair(train.pair), dim=1)
    class_means = torch.stack([embedded[number == c].mean(0) for c in range(len(present))])
    truth = labels_of(test)
    known = torch.isin(truth, present).nonzero().flatten()
    if not len(known):
        return []
    truth = torch.searchsorted(present, truth[known])
    accuracy = zero_shot_accuracy(task.embed_images(test.images[known]), truth, class_means)
    return [("class by its texts", accuracy, {"the most frequent": _largest_share(truth)})]


def _largest_share(numbers: Tensor) -> float:
    """Share of the most frequent number."""
    return numbers.bincount().max().item() / len(numbers)
