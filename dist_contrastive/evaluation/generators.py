"""Measures of a generator against held-out data, and pictures of its samples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dist_contrastive import report
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.distances import (
    MEDIAN_POINTS,
    energy_distance,
    frechet_distance,
    mmd,
    sliced_wasserstein,
)
from dist_contrastive.evaluation.encoded import Encoded, joined
from dist_contrastive.evaluation.manifold import density_coverage, memorisation, precision_recall
from dist_contrastive.evaluation.probe import Classifier, class_agreement
from dist_contrastive.evaluation.splits import Line, Splits, Table, labels_of
from dist_contrastive.losses import ContrastiveForce
from dist_contrastive.models import representations_of
from dist_contrastive.tasks.drift import Drift

CLASSIFIER_SAMPLES = 6000  # its time grows with their square
CLASS_SAMPLES = 6  # one and its 5 neighbours, of which a measure by classes needs as many
PIXELS = "pixels"
PART = 1024  # samples that are generated at a time
FIELD_POINTS, FIELD_SIDE = 256, 21  # of each kind, and arrows in a row, of the picture of the force

Sets = tuple[Tensor, Tensor, Tensor, Tensor]
"""Generated, untrained, training and held-out points [n, D] of one space."""


@torch.no_grad()
def encode_data(task: Drift, samples: Samples) -> Encoded:
    """What the measures of a generator take of some data: the features of all its encoders, one
    beside the other, and pixels."""
    features = [
        representations_of(encoder, samples.images).flatten(1)
        for encoder in task.encoder_spaces().values()
    ]
    no_encoder = samples.images.new_empty(len(samples.images), 0)
    shape = tuple(samples.images.shape[1:])
    rows = torch.cat([no_encoder, *features], dim=1)
    return Encoded(samples.index, samples.labels, rows, shape, samples.images)


def generate_encoded(task: Drift, labels: Tensor | None, count: int, has_pixels: bool) -> Encoded:
    """The same of generated samples, of which no more than a part is there as pixels at a time.

    Args:
        labels: classes to generate [count]; None for a generator without classes.
        has_pixels: all pixels are kept.
    """
    parts = []
    for index in torch.arange(count).split(PART):
        asked = None if labels is None else labels[index]
        images = task.generate(asked, len(index), seed=0, first=int(index[0]))
        part = encode_data(task, Samples(images, asked, torch.zeros_like(index), index))
        parts.append(part if has_pixels else replace(part, pixels=None))
    return joined(parts)


def measure_generator(
    task: Drift, generated: Encoded, before: Encoded, splits: Splits[Encoded], table: Table
) -> None:
    """Distances to held-out data, class agreement, precision, copies.

    Distances are of pixels and of the features of each encoder; the others of pixels, or where
    these are too many of the first encoder.

    Args:
        generated: at least as many as held-out samples, and their classes, if there are some.
        before: samples of the untrained generator from the same noise and labels.
        table: that the lines are added to.
    """
    spaces = _spaces(task, (generated, before, splits.train, splits.test), table)
    for name, sets in spaces.items():
        _distances(name, sets, table)
    if not spaces:
        return
    space, sets = next(iter(spaces.items()))
    suffix = "" if space == PIXELS else f", {space}"
    if generated.labels is not None:
        _class_agreement(sets, generated.labels, splits, suffix, table)
    manifold = partial(_manifold, sets, generated.labels, splits, suffix, table)
    table.measure("manifold", "precision, recall, density and coverage", manifold)
    table.measure("copies", "copies", partial(_copies, sets, suffix))


def _spaces(
    task: Drift, encoded: tuple[Encoded, Encoded, Encoded, Encoded], table: Table
) -> dict[str, Sets]:
    """Points of the sets by the name of the space; pixels first, unless they are too many."""
    spaces: dict[str, Sets] = {}
    pixels = [x.pixels.flatten(1) for x in encoded if x.pixels is not None]
    if len(pixels) == len(encoded):
        spaces[PIXELS] = (pixels[0], pixels[1], pixels[2], pixels[3])
    else:
        reason = (
            f"{len(encoded[2].index)} samples of {math.prod(encoded[2].image_shape)} numbers take "
            f"long to compare; --baselines does it all the same, and --limit compares fewer"
        )
        table.left_out.append(("what goes by pixels", reason))
    begin = 0
    for name, encoder in task.encoder_spaces().items():
        example = torch.zeros(1, *encoded[2].image_shape)
        end = begin + representations_of(encoder, example).flatten(1).shape[1]
        part = [x.features[:, begin:end] for x in encoded]
        spaces[name] = (part[0], part[1], part[2], part[3])
        begin = end
    return spaces


def _distances(name: str, sets: Sets, table: Table) -> None:
    """Distances in one space, of generated and untrained samples and training data to held-out
    data; Fréchet and sliced Wasserstein distances need sets of one size."""
    generated, _, data, real = sets
    few = min(len(real), len(data), len(generated))
    table.measure("distances", f"energy distance, {name}", partial(_energy, name, *sets))

    def line(title: str, measure: Callable[[Tensor, Tensor], float]) -> list[Line]:
        beside = {"train data": measure(data[:few], real[:few])}
        return [(title, measure(generated[:few], real[:few]), beside)]

    def mmd_line() -> list[Line]:
        return line(f"MMD^2, {name}", partial(mmd, bandwidth=_bandwidth(real)))

    table.measure("distances", f"MMD^2, {name}", mmd_line)
    for title, measure in (
        (f"sliced Wasserstein, {name}", sliced_wasserstein),
        (f"Fréchet distance, {name}", frechet_distance),
    ):
        table.measure("distances", title, partial(line, title, measure))


def _energy(
    name: str, generated: Tensor, untrained: Tensor, data: Tensor, real: Tensor
) -> list[Line]:
    energy = energy_distance(generated, real)
    references = {
        "train data": energy_distance(data, real),
        "untrained": energy_distance(untrained, real),
    }
    progress = (references["untrained"] - energy) / (
        references["untrained"] - references["train data"]
    )
    return [
        (f"energy distance, {name}", energy, references),
        (f"part of the way to train data, {name}", progress, {}),
    ]


def _bandwidth(real: Tensor) -> float | None:
    """Median distance of (some) held-out samples: one bandwidth for all that is compared."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    return torch.pdist(real[order[:MEDIAN_POINTS]].double()).median().item() or None


def _class_agreement(
    sets: Sets, labels: Tensor, splits: Splits[Encoded], suffix: str, table: Table
) -> None:
    """Agreement of generated samples with the classes asked for."""
    few = slice(0, CLASSIFIER_SAMPLES)
    generated, _, train, test = sets
    train_labels, test_labels = labels_of(splits.train), labels_of(splits.test)

    def classifier() -> Callable[[Tensor, Tensor], float]:
        return Classifier(train[few], train_labels[few]).accuracy

    def neighbours() -> Callable[[Tensor, Tensor], float]:
        return partial(class_agreement, train, train_labels)

    def line(name: str, fitted: Callable[[], Callable[[Tensor, Tensor], float]]) -> list[Line]:
        agree = fitted()
        beside = {"held-out data": agree(test, test_labels)}
        return [(name, agree(generated, labels), beside)]

    for name, fitted in (("classifier", classifier), ("kNN", neighbours)):
        title = f"{name} agrees with the class asked for{suffix}"
        table.measure("classes", title, partial(line, title, fitted))


def _manifold(
    sets: Sets, labels: Tensor | None, splits: Splits[Encoded], suffix: str, table: Table
) -> list[Line]:
    """Precision, recall, density and coverage, which compare sets of one size, class by class."""
    generated, _, train, test = sets
    same = torch.arange(min(len(test), len(train)))
    real_labels, train_labels = None, None
    if labels is not None:  # those of the held-out samples, again and again
        kept = _common_rows(splits, table)
        test, generated, labels = test[kept], generated[kept], labels[kept]
        real_labels = labels_of(splits.test)[kept]
        same = _as_many_of_each(labels_of(splits.train), real_labels)
        train_labels = labels_of(splits.train)[same]
    few = slice(0, len(test))
    compared = (
        (generated[few], None if labels is None else labels[few]),
        (train[same], train_labels),
    )
    fidelity = [precision_recall(test, real_labels, *x) for x in compared]
    density = [density_coverage(test, real_labels, *x) for x in compared]
    return [
        (name + suffix, getattr(value, name), {"train data": getattr(reference, name)})
        for name, (value, reference) in (
            ("precision", fidelity),
            ("recall", fidelity),
            ("density", density),
            ("coverage", density),
        )
    ]


def _common_rows(splits: Splits[Encoded], table: Table) -> Tensor:
    """Numbers of the held-out samples whose class has enough samples for all neighbours."""
    train, test = labels_of(splits.train), labels_of(splits.test)
    classes = 1 + int(torch.cat([train, test]).max())
    counts = [labels.bincount(minlength=classes) for labels in (train, test)]
    common = torch.minimum(*counts)[test] >= CLASS_SAMPLES
    if not common.any():
        raise ConfigError(
            f"no class has {CLASS_SAMPLES} samples both in data.train and in data.test; hold out "
            f"more"
        )
    rare = test[~common].unique().tolist()
    if rare:
        what = "precision, recall, density and coverage of classes " + ", ".join(map(str, rare))
        reason = f"they have fewer than {CLASS_SAMPLES} samples in data.train or data.test"
        table.left_out.append((what, reason))
    return common.nonzero().flatten()


def _copies(sets: Sets, suffix: str) -> list[Line]:
    """Distances of generated samples to training data, beside those of held-out data."""
    generated, _, train, test = sets
    m = memorisation(generated[: len(test)], train, test)
    return [
        (name + suffix, float(value), {"held-out data": float(held_out)})
        for name, value, held_out in (
            (
                "distance to the nearest training sample, median",
                m.generated_median,
                m.held_out_median,
            ),
            ("the same, 5 % quantile", m.generated_low, m.held_out_low),
            ("nearer than 99 % of held-out data are", m.suspicious, 0.01),
            ("copies of training samples", m.copies, m.held_out_copies),
        )
    ]


def draw_samples(
    task: Drift,
    generated: Tensor,
    images: Tensor,
    labels: Tensor | None,
    classes: Mapping[int, str],
    run: Path,
) -> None:
    """Pictures of generated samples beside held-out ones, in RUN/plots.

    Args:
        generated: [m, ...], of the classes of the held-out samples, again and again.
        images: [n, ...], held out, and their labels [n], if they have some.
        classes: names by number.
    """
    path = run / "plots" / "samples.png"
    if report.are_images(generated):
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        asked = labels.repeat(-(-len(generated) // len(labels)))[: len(generated)]
        report.sample_grid(generated, asked, images, labels, path, title=str(run), names=classes)
    elif generated[0].numel() == 2:
        points, data = generated.flatten(1), images.flatten(1)
        report.point_clouds({"generated": points[: len(data)], "data": data}, path, str(run))
        points, data = points[:FIELD_POINTS], data[:FIELD_POINTS]
        at, force = force_field(task.loss, points, data)
        report.force_field(at, force, points, data, run / "plots" / "force.png", str(run))


def force_field(loss: ContrastiveForce, generated: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Force on one more generated point at the places of a grid.

    Args:
        loss: whose preset, temperatures and `affinity_floor`; at a mean distance of all points of
            1, and with a unit for all places together where that of the preset is global.
        generated: [m, 2]. data: [n, 2].

    Returns:
        Places [k, 2], k = FIELD_SIDE², around all points, and forces [k, 2] in the units of the
        preset.
    """
    points = torch.cat([generated, data])
    low, high = points.amin(0), points.amax(0)
    axes = [torch.linspace(float(a), float(b), FIELD_SIDE) for a, b in zip(low, high, strict=True)]
    at = torch.cartesian_prod(*axes)
    scale = torch.cdist(points, points).mean()
    # A group for each place, in which the point there comes first.
    others, positive = (x.expand(len(at), *x.shape) for x in (generated, data))
    negative = torch.cat([at[:, None], others], dim=1)
    floor = loss.rules.floor
    alone = ContrastiveForce(
        loss.temperatures, loss.settings.preset, affinity_floor=floor, keys_from="local"
    )
    return at, alone.force(negative / scale, positive / scale)[:, 0]


def _as_many_of_each(available: Tensor, labels: Tensor) -> Tensor:
    """Indices of the first of `available` of each class, as many as `labels` has of it."""
    chosen = [
        (available == label).nonzero().flatten()[: int((labels == label).sum())]
        for label in labels.unique()
    ]
    return torch.cat(chosen)
