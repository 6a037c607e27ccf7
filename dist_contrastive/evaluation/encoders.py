"""Measures of an encoder, of its classifier, and of two towers, and a map of representations."""

import math
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
from dist_contrastive.evaluation.splits import (
    Encoded,
    Line,
    MeasureName,
    Splits,
    Table,
    labels_of,
    with_labels,
)
from dist_contrastive.tasks.hybrid import Hybrid
from dist_contrastive.tasks.images import ImageTask
from dist_contrastive.tasks.paired import Paired

PER_CLASS = 10  # labelled samples of the few-label probe
DRAWS = 20
NEIGHBOURS = 5


_BY_LABELS: tuple[MeasureName, ...] = ("knn", "probe", "few", "classifier", "zero-shot", "map")


@torch.no_grad()
def encode(task: ImageTask, samples: Samples) -> Encoded:
    """What the measures of an encoder take of some samples."""
    partners = texts = None
    if isinstance(task, Paired) and samples.pair is not None:
        partners = task.embed_pair(samples.pair)
        texts = samples.pair if isinstance(samples.pair, tuple) else None
    return Encoded(
        index=samples.index,
        labels=samples.labels,
        features=task.represent(samples.images),
        image_shape=tuple(samples.images.shape[1:]),
        pixels=samples.images,
        partners=partners,
        texts=texts,
    )


def measure_encoder(task: ImageTask, splits: Splits[Encoded], run: Path, table: Table) -> None:
    """Classes or values of labels from the representation, retrieval, and a map of it.

    Args:
        run: the run directory, for pictures.
        table: that the lines are added to.
    """
    if isinstance(task, Paired):
        table.measure("retrieval", "retrieval", partial(_retrieval, task, splits))
        if splits.train.labels is None:
            return
    wanted = [name for name in _BY_LABELS if table.wants(name)]
    if wanted:
        by_labels = partial(_by_labels, task, splits, run, table)
        table.measure(wanted[0], "what goes by labels", by_labels)


def _by_labels(task: ImageTask, splits: Splits[Encoded], run: Path, table: Table) -> list[Line]:
    splits = with_labels(splits, table)
    train, test = splits.train, splits.test
    labels, features = (labels_of(train), labels_of(test)), (train.features, test.features)
    pixels = _pixels(train, test, table)
    if labels[0].is_floating_point():
        _regression(features, pixels, labels, table)
    else:
        _classification(features, pixels, labels, table)
    if isinstance(task, Hybrid) and task.classifies:
        by_level = partial(_classifier_by_level, task, test)
        table.measure("classifier", "classifier accuracy", by_level)
    if isinstance(task, Paired) and train.texts is not None:
        table.measure("zero-shot", "class by its texts", partial(_zero_shot, task, splits))

    def embedding_map() -> list[Line]:
        title = "held-out samples in the representation"
        path = run / "plots" / "embedding.png"
        report.embedding_map(features[1], labels[1], path, title, names=splits.classes)
        return []

    table.measure("map", "a map of held-out samples", embedding_map)
    return []  # each measure has added its own


Pair = tuple[Tensor, Tensor]  # of training and of held-out samples


def _pixels(train: Encoded, test: Encoded, table: Table) -> Pair | None:
    """Raw pixels to compare with; None where held-out images have another size, or where there are
    so many that their measures would take longer than all others."""
    if train.image_shape != test.image_shape:
        return None
    if train.pixels is not None and test.pixels is not None:
        return train.pixels, test.pixels
    if table.wants("knn", "probe", "few"):
        numbers = math.prod(train.image_shape)
        table.left_out.append(
            (
                "raw pixels to compare with",
                f"{len(train.index)} images of {numbers} numbers take long to measure; "
                f"--baselines does it all the same",
            )
        )
    return None


def _classification(features: Pair, pixels: Pair | None, labels: Pair, table: Table) -> None:
    few = min(PER_CLASS, int(labels[0].unique(return_counts=True)[1].min()))

    def knn(x: Pair) -> float:
        return knn_accuracy(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

    def linear(x: Pair) -> float:
        return linear_probe(x[0], labels[0], x[1], labels[1])

    def few_labels(x: Pair) -> float:
        return few_label_probe(x[0], labels[0], x[1], labels[1], few, DRAWS).mean

    measures: tuple[tuple[MeasureName, str, Callable[[Pair], float]], ...] = (
        ("knn", f"kNN accuracy, k = {NEIGHBOURS}", knn),
        ("probe", "linear probe, all labels", linear),
        ("few", f"linear probe, {few} labels a class, mean of {DRAWS} draws", few_labels),
    )
    for name, title, measure in measures:
        table.measure(name, title, partial(_beside_pixels, title, measure, features, pixels))


def _beside_pixels(
    title: str, measure: Callable[[Pair], float], features: Pair, pixels: Pair | None
) -> list[Line]:
    return [(title, measure(features), _pixel_reference(measure, pixels))]


def _pixel_reference(measure: Callable[[Pair], float], pixels: Pair | None) -> dict[str, float]:
    """The same measure of raw pixels, where there are some."""
    return {} if pixels is None else {"raw pixels": measure(pixels)}


def _regression(features: Pair, pixels: Pair | None, labels: Pair, table: Table) -> None:
    name = f"mean absolute error of kNN, k = {NEIGHBOURS}"

    def lines() -> list[Line]:
        def knn(x: Pair) -> float:
            return knn_regression_error(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

        constant = (labels[1] - labels[0].median()).abs().mean().item()
        beside = {**_pixel_reference(knn, pixels), "one value for all": constant}
        return [(name, knn(features), beside)]

    table.measure("knn", name, lines)


def _classifier_by_level(task: Hybrid, test: Encoded) -> list[Line]:
    """Accuracy of the decided path, down to each level of the hierarchy."""
    truth, depth = labels_of(test), task.hierarchy.depth
    matched = task.hierarchy.matched_levels(task.classify(test.features).argmax(1), truth)
    nodes = task.hierarchy.ancestors(truth)
    lines: list[Line] = []
    for level in range(1, depth + 1):
        name = "classifier accuracy" + (f", level {level} of {depth}" if depth > 1 else "")
        beside = {"the most frequent": _largest_share(nodes[:, level - 1])}
        lines.append((name, (matched >= level).double().mean().item(), beside))
    return lines


def _retrieval(task: Paired, splits: Splits[Encoded]) -> list[Line]:
    """Recall of the other half of a pair; equal texts are equally right."""
    test, groups = splits.test, splits.test.groups()
    assert test.partners is not None
    images, partners = task.embed_representations(test.features), test.partners
    chance = {"the most frequent": 1 / len(images) if groups is None else _largest_share(groups)}
    return [
        ("image finds its partner, recall at 1", recall_at_k(images, partners, 1, groups), chance),
        ("partner finds its image, recall at 1", recall_at_k(partners, images, 1, groups), chance),
    ]


def _zero_shot(task: Paired, splits: Splits[Encoded]) -> list[Line]:
    """Zero-shot accuracy by the training texts of each class; other classes are left out."""
    train, test = splits.train, splits.test
    assert train.partners is not None
    present, number = labels_of(train).unique(return_inverse=True)
    embedded = torch.nn.functional.normalize(train.partners, dim=1)
    class_means = torch.stack([embedded[number == c].mean(0) for c in range(len(present))])
    truth = labels_of(test)
    known = torch.isin(truth, present).nonzero().flatten()
    if not len(known):
        return []
    truth = torch.searchsorted(present, truth[known])
    images = task.embed_representations(test.features[known])
    accuracy = zero_shot_accuracy(images, truth, class_means)
    return [("class by its texts", accuracy, {"the most frequent": _largest_share(truth)})]


def _largest_share(numbers: Tensor) -> float:
    """Share of the most frequent number."""
    return numbers.bincount().max().item() / len(numbers)
