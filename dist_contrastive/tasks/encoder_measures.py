"""What `eval` measures of an encoder, of its classifier, and of two towers."""

from pathlib import Path

import torch
from torch import Tensor

from dist_contrastive import report
from dist_contrastive.evaluation.neighbours import knn_accuracy, knn_regression_error
from dist_contrastive.evaluation.probe import few_label_probe, linear_probe
from dist_contrastive.evaluation.retrieval import recall_at_k, zero_shot_accuracy
from dist_contrastive.tasks.hybrid import Hybrid
from dist_contrastive.tasks.images import ImageTask
from dist_contrastive.tasks.paired import Paired
from dist_contrastive.tasks.splits import Line, Splits, labels_of

PER_CLASS = 10  # labelled samples of the few-label probe
DRAWS = 20
NEIGHBOURS = 5


def measure_encoder(task: ImageTask, splits: Splits, run: Path) -> list[Line]:
    """How well the representation shows the labels, and a map of it.

    Args:
        run: the run directory, for pictures.
    """
    train, test = splits.train, splits.test
    features = task.represent(train.images), task.represent(test.images)
    pixels = train.images, test.images
    title = "held-out samples in the representation"
    report.embedding_map(features[1], labels_of(test), run / "plots" / "embedding.png", title)
    labels = labels_of(train), labels_of(test)
    if labels[0].is_floating_point():
        return _of_values(features, pixels, labels)
    lines = _of_classes(features, pixels, labels)
    if isinstance(task, Hybrid):
        lines += _of_classifier(task, splits)
    if isinstance(task, Paired):
        lines += _of_towers(task, splits)
    return lines


Two = tuple[Tensor, Tensor]  # of training and of held-out samples


def _of_classes(features: Two, pixels: Two, labels: Two) -> list[Line]:
    few = min(PER_CLASS, int(labels[0].unique(return_counts=True)[1].min()))

    def knn(x: Two) -> float:
        return knn_accuracy(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

    def linear(x: Two) -> float:
        return linear_probe(x[0], labels[0], x[1], labels[1])

    def few_labels(x: Two) -> float:
        return few_label_probe(x[0], labels[0], x[1], labels[1], few, DRAWS).mean

    return [
        (f"kNN accuracy, k = {NEIGHBOURS}", knn(features), {"raw pixels": knn(pixels)}),
        ("linear probe, all labels", linear(features), {"raw pixels": linear(pixels)}),
        (
            f"linear probe, {few} labels a class, mean of {DRAWS} draws",
            few_labels(features),
            {"raw pixels": few_labels(pixels)},
        ),
    ]


def _of_values(features: Two, pixels: Two, labels: Two) -> list[Line]:
    def knn(x: Two) -> float:
        return knn_regression_error(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

    constant = (labels[1] - labels[0].median()).abs().mean().item()
    beside = {"raw pixels": knn(pixels), "one value for all": constant}
    return [(f"mean absolute error of kNN, k = {NEIGHBOURS}", knn(features), beside)]


def _of_classifier(task: Hybrid, splits: Splits) -> list[Line]:
    """Accuracy of the decided path, down to each level of the hierarchy."""
    truth = labels_of(splits.test)
    matched = task.hierarchy.matched_levels(task.classify(splits.test.images).argmax(1), truth)
    levels = task.hierarchy.depth
    names = (
        ["classifier accuracy"]
        if levels == 1
        else [f"classifier accuracy, level {level} of {levels}" for level in range(1, levels + 1)]
    )
    return [
        (name, (matched >= level).double().mean().item(), {})
        for level, name in enumerate(names, start=1)
    ]


def _of_towers(task: Paired, splits: Splits) -> list[Line]:
    """Classes by the texts that describe them; other modalities by finding their own partner."""
    train, test = splits.train, splits.test
    assert train.pair is not None
    assert test.pair is not None
    images, partners = task.embed_images(test.images), task.embed_pair(test.pair)
    if isinstance(test.pair, Tensor):
        n = len(images)
        return [
            (
                "image finds its partner, recall at 1",
                recall_at_k(images, partners, 1),
                {"chance": 1 / n},
            ),
            (
                "partner finds its image, recall at 1",
                recall_at_k(partners, images, 1),
                {"chance": 1 / n},
            ),
        ]
    classes = labels_of(train)
    embedded = torch.nn.functional.normalize(task.embed_pair(train.pair), dim=1)
    of_class = torch.stack([embedded[classes == c].mean(0) for c in classes.unique()])
    chance = labels_of(test).bincount().max().item() / len(images)
    accuracy = zero_shot_accuracy(images, labels_of(test), of_class)
    return [("class by its texts", accuracy, {"the most frequent class": chance})]
