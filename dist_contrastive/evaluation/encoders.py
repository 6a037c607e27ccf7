"""Measures of an encoder, of its classifier, and of two towers, and a map of representations."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import report
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.encoded import Encoded
from dist_contrastive.evaluation.neighbours import (
    knn_accuracy,
    knn_regression_error,
    recall_at_k,
    zero_shot_accuracy,
)
from dist_contrastive.evaluation.options import MeasureName
from dist_contrastive.evaluation.probe import few_label_probe, linear_probe, probe_sweep
from dist_contrastive.evaluation.prompts import Prompts
from dist_contrastive.evaluation.ranking import Ranking, rank
from dist_contrastive.evaluation.representation import (
    alignment,
    lidar,
    nmi,
    rank_me,
    uniformity,
)
from dist_contrastive.evaluation.splits import Line, Splits, Table, labels_of, with_labels
from dist_contrastive.models import device_of, representations_of
from dist_contrastive.tasks.hybrid import Hybrid
from dist_contrastive.tasks.images import ImageTask
from dist_contrastive.tasks.paired import Paired

PER_CLASS = 10  # labelled samples of the few-label probe
DRAWS = 20
NEIGHBOURS = 5
AMONG = (1, 5, 10)  # k of the measures of a ranking
VIEWS, VIEWED = 10, 1000  # of a sample, and samples, for LiDAR and alignment
SPREAD = 10_000  # samples of which uniformity compares all pairs
_CPU_PIXELS, _LEAST_ROWS = 2**16, 8  # of the images that a CPU encodes at a time

_BY_LABELS: tuple[MeasureName, ...] = (
    *("knn", "probe", "sweep", "few", "nmi", "classifier", "zero-shot", "map"),
)


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
        features=_in_parts(task, task.represent, samples.images),
        image_shape=tuple(samples.images.shape[1:]),
        pixels=samples.images,
        partners=partners,
        texts=texts,
    )


@torch.no_grad()
def encode_views(task: ImageTask, samples: Samples) -> Encoded:
    """Representations [n, VIEWS, D] of the first views of some samples, as training draws them."""
    represent = partial(representations_of, task.encoder)
    views = [_in_parts(task, represent, x) for x in task.make_views(samples, VIEWS)]
    shape = tuple(samples.images.shape[1:])
    return Encoded(samples.index, samples.labels, torch.stack(views, dim=1), shape)


def _in_parts(task: ImageTask, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """On a CPU as many images at a time as its cache holds, their channels last, takes half as
    long."""
    if device_of(task, images.device).type != "cpu" or not len(images):
        return network(images)
    rows = max(_LEAST_ROWS, _CPU_PIXELS // math.prod(images.shape[2:]))
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.cat([network(x) for x in images.split(rows)])


def measure_encoder(
    task: ImageTask, splits: Splits[Encoded], views: Encoded | None, run: Path, table: Table
) -> None:
    """Classes or values of labels from the representation, retrieval, and a map of it; by wish what
    needs no labels.

    Args:
        views: of `encode_views`, of held-out samples; None: they are not wanted.
        run: the run directory, for pictures.
        table: that the lines are added to.
    """
    here = device_of(task, splits.test.features.device)
    splits = replace(splits, train=splits.train.to(here), test=splits.test.to(here))
    if isinstance(task, Paired):
        table.measure("retrieval", "retrieval", partial(_retrieval, task, splits))
        table.measure("ranking", "ranking of partners", partial(_rankings, task, splits, table))
    _without_labels(task, splits.test, views, table)
    if isinstance(task, Paired) and splits.train.labels is None:
        return
    wanted = [name for name in _BY_LABELS if table.wants(name)]
    if table.wants("ranking") and not isinstance(task, Paired):
        wanted.append("ranking")
    if wanted:
        by_labels = partial(_by_labels, task, splits, run, table)
        table.measure(wanted[0], "what goes by labels", by_labels)


def _without_labels(task: ImageTask, test: Encoded, views: Encoded | None, table: Table) -> None:
    """Rank and spread of held-out samples, in the representation and in what the loss compares."""
    if not table.wants("rankme", "uniformity", "lidar", "alignment"):
        return
    embedded = task.embed_representations(test.features)
    for name, rows in (("representation", test.features), ("embedding", embedded)):
        most = {"at most": float(min(rows.shape))}
        measure = partial(_line, f"RankMe, {name}", partial(rank_me, rows), most)
        table.measure("rankme", f"RankMe, {name}", measure)
    few = min(SPREAD, len(embedded))
    some = embedded[torch.arange(few) * len(embedded) // few]
    measure = partial(_line, "uniformity", partial(uniformity, some), {"one point": 0.0})
    table.measure("uniformity", "uniformity", measure)
    if views is not None:
        views = views.to(embedded.device)
        most = {"at most": float(min(len(views.index) - 1, views.features.shape[2]))}
        title = f"LiDAR, {VIEWS} views of {len(views.index)} samples"
        table.measure("lidar", title, partial(_line, title, partial(lidar, views.features), most))
    if isinstance(task, Paired) and test.partners is not None:
        pairs = embedded, test.partners
        title = "alignment of images and partners"
    elif views is not None:
        first, second = views.features[:, 0], views.features[:, 1]
        pairs = task.embed_representations(first), task.embed_representations(second)
        title = "alignment of two views"
    else:
        return
    table.measure("alignment", title, partial(_line, title, partial(alignment, *pairs)))


def _line(
    title: str, measure: Callable[[], float], beside: dict[str, float] | None = None
) -> list[Line]:
    return [(title, measure(), beside or {})]


def _by_labels(task: ImageTask, splits: Splits[Encoded], run: Path, table: Table) -> list[Line]:
    splits = with_labels(splits, table)
    train, test = splits.train, splits.test
    labels, features = (labels_of(train), labels_of(test)), (train.features, test.features)
    pixels = _pixels(train, test, table)
    if labels[0].is_floating_point():
        _regression(features, pixels, labels, table)
        for name in ("sweep", "nmi", "ranking"):
            if table.wants(name):
                table.left_out.append((name, "it needs classes, and these labels are continuous"))
    else:
        _name_missing_classes(splits, table)
        _classification(features, pixels, labels, table)
        measure = partial(nmi, features[1], labels[1])
        title = f"NMI of {len(labels[1].unique())} clusters with the classes"
        table.measure("nmi", title, partial(_line, title, measure))
        if not isinstance(task, Paired):
            title = "ranking of held-out samples by class"
            same = partial(_ranking_of_classes, features[1], labels[1], table)
            table.measure("ranking", title, same)
    if isinstance(task, Hybrid) and task.classifies:
        by_level = partial(_classifier_by_level, task, test)
        table.measure("classifier", "classifier accuracy", by_level)
    if isinstance(task, Paired) and train.texts is not None:
        table.measure("zero-shot", "class by its texts", partial(_zero_shot, task, splits))
    if table.options.prompts is not None:
        by_prompts = partial(_by_prompts, task, splits, table.options.prompts)
        table.measure("zero-shot", "class by prompts", by_prompts)

    def embedding_map() -> list[Line]:
        title = "held-out samples in the representation"
        path = run / "plots" / "embedding.png"
        report.embedding_map(features[1], labels[1], path, title, names=splits.classes)
        return []

    table.measure("map", "a map of held-out samples", embedding_map)
    return []  # each measure has added its own


def _name_missing_classes(splits: Splits[Encoded], table: Table) -> None:
    """The table tells which classes one of the two splits lacks."""
    present = [set(labels_of(x).tolist()) for x in (splits.train, splits.test)]
    for lacking, other, what in (
        ("data.train", present[1] - present[0], "no kNN and no probe can find them"),
        ("data.test", present[0] - present[1], "nothing is measured of them"),
    ):
        if other:
            names = ", ".join(str(splits.classes.get(number, number)) for number in sorted(other))
            table.left_out.append((f"classes {names}", f"{lacking} has no sample; {what}"))


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
    def knn(x: Pair) -> float:
        return knn_accuracy(x[0], labels[0], x[1], labels[1], NEIGHBOURS)

    def linear(x: Pair) -> float:
        return linear_probe(x[0], labels[0], x[1], labels[1])

    def few_labels(per_class: float, x: Pair) -> float:
        return few_label_probe(x[0], labels[0], x[1], labels[1], per_class, DRAWS).mean

    def sweep() -> list[Line]:
        accuracy, c = probe_sweep(features[0], labels[0], features[1], labels[1])
        return [("linear probe, all labels, C by a sweep", accuracy, {"C": c})]

    smallest = int(labels[0].unique(return_counts=True)[1].min())
    measures: tuple[tuple[MeasureName, str, Callable[[Pair], float]], ...] = (
        ("knn", f"kNN accuracy, k = {NEIGHBOURS}", knn),
        ("probe", "linear probe, all labels", linear),
        *(
            (
                "few",
                f"linear probe, {_amount(few)}, mean of {DRAWS} draws",
                partial(few_labels, few),
            )
            for few in table.options.few or (min(PER_CLASS, smallest),)
        ),
    )
    for name, title, measure in measures:
        table.measure(name, title, partial(_beside_pixels, title, measure, features, pixels))
    table.measure("sweep", "linear probe, C by a sweep", sweep)


def _amount(per_class: float) -> str:
    """Labels of a few-label probe in words."""
    if per_class < 1:
        return f"{100 * per_class:g} % of labels"
    return f"{per_class:g} labels a class"


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


def _rankings(task: Paired, splits: Splits[Encoded], table: Table) -> list[Line]:
    """Where partners stand, both ways; equal texts are equally right."""
    test, groups = splits.test, splits.test.groups()
    assert test.partners is not None
    images, partners = task.embed_representations(test.features), test.partners
    return [
        *_lines_of(rank(images, partners, groups, groups), "image to partner", table),
        *_lines_of(rank(partners, images, groups, groups), "partner to image", table),
    ]


def _ranking_of_classes(features: Tensor, labels: Tensor, table: Table) -> list[Line]:
    """Where the held-out samples of a sample's class stand among all others."""
    found = rank(features, features, labels, labels, without_itself=True)
    if found.left_out:
        reason = f"{found.left_out} are the only held-out ones of their class"
        table.left_out.append(("queries of the ranking by class", reason))
    return _lines_of(found, "sample to its class", table)


def _lines_of(found: Ranking, title: str, table: Table) -> list[Line]:
    """Recall, nDCG and the rest; what looks at more keys than there are is left out."""
    ks = [k for k in AMONG if k <= found.num_keys]
    if len(ks) < len(AMONG):
        reason = f"there are {found.num_keys} keys"
        left_out = ", ".join(str(k) for k in AMONG if k not in ks)
        table.left_out.append((f"{title}, k = {left_out}", reason))
    lines = [(f"{title}, hit@{k}", found.hit_rate(k)) for k in ks]
    if int(found.counts.max()) > 1:  # otherwise it is the hit rate
        lines += [(f"{title}, recall@{k}", found.recall(k)) for k in ks]
    lines += [(f"{title}, nDCG@{k}", found.ndcg(k)) for k in ks[-1:]]
    lines += [
        (f"{title}, MAP", found.mean_average_precision()),
        (f"{title}, MRR", found.mean_reciprocal_rank()),
        (f"{title}, median rank of {found.num_keys}", found.median_rank()),
    ]
    return [(name, value, {}) for name, value in lines]


def _zero_shot(task: Paired, splits: Splits[Encoded]) -> list[Line]:
    """Zero-shot accuracy by the training texts of each class; other classes are left out."""
    train, test = splits.train, splits.test
    assert train.partners is not None
    present, number = labels_of(train).unique(return_inverse=True)
    embedded = F.normalize(train.partners, dim=1)
    class_means = torch.stack([embedded[number == c].mean(0) for c in range(len(present))])
    truth = labels_of(test)
    known = torch.isin(truth, present).nonzero().flatten()
    if not len(known):
        return []
    truth = torch.searchsorted(present, truth[known])
    images = task.embed_representations(test.features[known])
    accuracy = zero_shot_accuracy(images, truth, class_means)
    return [("class by its texts", accuracy, {"the most frequent": _largest_share(truth)})]


def _by_prompts(task: ImageTask, splits: Splits[Encoded], prompts: Prompts) -> list[Line]:
    """Zero-shot accuracy by prompts: of each class the mean of normalised embeddings."""
    test = splits.test
    if not isinstance(task, Paired) or test.texts is None:
        raise ConfigError(
            "prompts are for runs of the task paired whose second modality is texts; leave them out"
        )
    truth = labels_of(test)
    if truth.is_floating_point():
        raise ConfigError("prompts are of classes, and these labels are continuous; leave them out")
    seen = (int(labels_of(x).max()) for x in (splits.train, test))
    num_classes = max(max(seen) + 1, len(prompts.classes or splits.classes))
    texts = prompts.texts(splits.classes, num_classes)
    embedded = [F.normalize(task.embed_pair(of_class), dim=1).mean(0) for of_class in texts]
    images = task.embed_representations(test.features)
    accuracy = zero_shot_accuracy(images, truth, torch.stack(embedded).to(images.device))
    title = f"class by {len(prompts.templates)} prompts"
    return [(title, accuracy, {"the most frequent": _largest_share(truth)})]


def _largest_share(numbers: Tensor) -> float:
    """Share of the most frequent number."""
    return numbers.bincount().max().item() / len(numbers)
