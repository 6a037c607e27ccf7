"""Measures of a generator against held-out data, and pictures of its samples."""

from collections.abc import Callable
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
from dist_contrastive.evaluation.manifold import density_coverage, memorisation, precision_recall
from dist_contrastive.evaluation.probe import Classifier, class_agreement
from dist_contrastive.evaluation.splits import Line, Splits, Table, labels_of
from dist_contrastive.losses import ContrastiveForce
from dist_contrastive.models import representations_of
from dist_contrastive.tasks.drift import Drift

CLASSIFIER_SAMPLES = 6000  # its time grows with their square
CLASS_SAMPLES = 6  # one and its 5 neighbours, of which a measure by classes needs as many
FIELD_POINTS, FIELD_SIDE = 256, 21  # of each kind, and arrows in a row, of the picture of the force

Space = Callable[[Tensor], Tensor]


def measure_generator(
    task: Drift,
    before: Tensor,
    labels: Tensor | None,
    splits: Splits[Samples],
    run: Path,
    table: Table,
) -> None:
    """Distances to held-out data, class agreement, precision, copies; pictures of samples.

    Args:
        before: samples of the untrained generator from the same noise and labels.
        labels: classes to generate [n], at least as many as held-out samples; None for a
            generator without classes.
        run: the run directory, for pictures.
        table: that the lines are added to.
    """
    train, test = splits.train, splits.test
    generated = task.generate(labels, len(before), seed=0)
    spaces: dict[str, Space] = {"pixels": _pixels}
    for name, encoder in task.encoder_spaces().items():
        spaces[name] = partial(representations_of, encoder)
    for name, space in spaces.items():
        _distances(name, [space(x) for x in (generated, before, train.images, test.images)], table)
    if labels is not None:
        _class_agreement(generated, labels, train, test, table)
    manifold = partial(_manifold, generated, labels, train, test, table)
    table.measure("manifold", "precision, recall, density and coverage", manifold)
    table.measure("copies", "copies", partial(_copies, generated, train, test))
    if table.wants("samples"):
        _draw(task, generated, labels, splits, run)


def _distances(name: str, sets: list[Tensor], table: Table) -> None:
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


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def _class_agreement(
    generated: Tensor, labels: Tensor, train: Samples, test: Samples, table: Table
) -> None:
    """Agreement of generated samples with the classes asked for."""
    few = slice(0, CLASSIFIER_SAMPLES)

    def classifier() -> Callable[[Tensor, Tensor], float]:
        return Classifier(train.images[few], labels_of(train)[few]).accuracy

    def neighbours() -> Callable[[Tensor, Tensor], float]:
        return partial(class_agreement, train.images, labels_of(train))

    def line(name: str, fitted: Callable[[], Callable[[Tensor, Tensor], float]]) -> list[Line]:
        agree = fitted()
        beside = {"held-out data": agree(test.images, labels_of(test))}
        return [(name, agree(generated, labels), beside)]

    for name, fitted in (("classifier", classifier), ("kNN", neighbours)):
        title = f"{name} agrees with the class asked for"
        table.measure("classes", title, partial(line, title, fitted))


def _manifold(
    generated: Tensor, labels: Tensor | None, train: Samples, test: Samples, table: Table
) -> list[Line]:
    """Precision, recall, density and coverage, which compare sets of one size, class by class."""
    if labels is not None:  # those of the held-out samples, again and again
        kept = _common_rows(train, test, table)
        test, generated, labels = test.rows(kept), generated[kept], labels[kept]
    few, same = slice(0, len(test.images)), torch.arange(min(len(test.images), len(train.images)))
    real_labels, train_labels = None, None
    if labels is not None:
        real_labels, same = labels_of(test), _as_many_of_each(train, labels_of(test))
        train_labels = labels_of(train)[same]
    compared = (
        (generated[few], None if labels is None else labels[few]),
        (train.images[same], train_labels),
    )
    fidelity = [precision_recall(test.images, real_labels, *x) for x in compared]
    density = [density_coverage(test.images, real_labels, *x) for x in compared]
    return [
        (name, getattr(value, name), {"train data": getattr(reference, name)})
        for name, (value, reference) in (
            ("precision", fidelity),
            ("recall", fidelity),
            ("density", density),
            ("coverage", density),
        )
    ]


def _common_rows(train: Samples, test: Samples, table: Table) -> Tensor:
    """Numbers of the held-out samples whose class has enough samples for all neighbours."""
    classes = 1 + int(torch.cat([labels_of(train), labels_of(test)]).max())
    counts = [labels_of(x).bincount(minlength=classes) for x in (train, test)]
    common = torch.minimum(*counts)[labels_of(test)] >= CLASS_SAMPLES
    if not common.any():
        raise ConfigError(
            f"no class has {CLASS_SAMPLES} samples both in data.train and in data.test; hold out "
            f"more"
        )
    rare = labels_of(test)[~common].unique().tolist()
    if rare:
        what = "precision, recall, density and coverage of classes " + ", ".join(map(str, rare))
        reason = f"they have fewer than {CLASS_SAMPLES} samples in data.train or data.test"
        table.left_out.append((what, reason))
    return common.nonzero().flatten()


def _copies(generated: Tensor, train: Samples, test: Samples) -> list[Line]:
    """Distances of generated samples to training data, beside those of held-out data."""
    m = memorisation(generated[: len(test.images)], train.images, test.images)
    return [
        (name, float(value), {"held-out data": float(held_out)})
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


def _draw(
    task: Drift, generated: Tensor, labels: Tensor | None, splits: Splits[Samples], run: Path
) -> None:
    images, path = splits.test.images, run / "plots" / "samples.png"
    if report.are_images(generated):
        real_labels = torch.zeros(len(images), dtype=torch.int64)
        if labels is None:
            labels = real_labels.new_zeros(len(generated))
        else:
            real_labels = labels_of(splits.test)
        real = images, real_labels
        report.sample_grid(generated, labels, *real, path, title=str(run), names=splits.classes)
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


def _as_many_of_each(samples: Samples, labels: Tensor) -> Tensor:
    """Indices of the first samples of each class, as many as `labels` has of it."""
    available = labels_of(samples)
    chosen = [
        (available == label).nonzero().flatten()[: int((labels == label).sum())]
        for label in labels.unique()
    ]
    return torch.cat(chosen)
