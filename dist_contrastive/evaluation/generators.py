"""What `eval` measures of a generator."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dist_contrastive import report
from dist_contrastive.data.fields import Samples
from dist_contrastive.evaluation import generative
from dist_contrastive.evaluation.distances import MEDIAN_POINTS
from dist_contrastive.evaluation.generative import Classifier
from dist_contrastive.evaluation.splits import Line, Splits, labels_of
from dist_contrastive.losses import ContrastiveForce
from dist_contrastive.models import representations_of
from dist_contrastive.tasks.drift import Drift

CLASSIFIER_SAMPLES = 6000  # its time grows with their square
FIELD_POINTS, FIELD_SIDE = 256, 21  # of each kind, and arrows in a row, of the picture of the force

Space = Callable[[Tensor], Tensor]


def measure_generator(
    task: Drift, before: Tensor, labels: Tensor | None, splits: Splits, run: Path
) -> list[Line]:
    """How near to held-out data it comes, and pictures of samples.

    Args:
        before: what the untrained generator made of the same noise and labels.
        labels: of what is to be generated [n], at least as many as held-out samples; None for a
            generator without classes.
        run: the run directory, for pictures.
    """
    train, test = splits.train, splits.test
    made = task.generate(labels, len(before), seed=0)
    _draw(task, made, labels, splits, run)
    lines = _distances("pixels", _pixels, made, before, train, test)
    for name, encoder in task.encoder_spaces().items():
        space = partial(representations_of, encoder)
        lines += _distances(name, space, made, before, train, test)
    if labels is not None:
        lines += _classes(made, labels, train, test)
    return [*lines, *_manifold(made, labels, train, test), *_copies(made, train, test)]


def _distances(
    name: str, space: Space, made: Tensor, before: Tensor, train: Samples, test: Samples
) -> list[Line]:
    """In one space; Fréchet and sliced Wasserstein distances need sets of one size."""
    generated, start, data, real = (space(x) for x in (made, before, train.images, test.images))
    energy = {
        key: generative.energy_distance(x, real)
        for key, x in (("made", generated), ("train data", data), ("untrained", start))
    }
    here = energy.pop("made")
    way = (energy["untrained"] - here) / (energy["untrained"] - energy["train data"])
    few = min(len(real), len(data), len(generated))
    mmd = partial(generative.mmd, bandwidth=_bandwidth(real))
    lines: list[Line] = [
        (f"energy distance, {name}", here, energy),
        (f"part of the way to train data, {name}", way, {}),
    ]
    for title, measure in (
        ("MMD^2", mmd),
        ("sliced Wasserstein", generative.sliced_wasserstein),
        ("Fréchet distance", generative.frechet_distance),
    ):
        beside = {"train data": measure(data[:few], real[:few])}
        lines.append((f"{title}, {name}", measure(generated[:few], real[:few]), beside))
    return lines


def _bandwidth(real: Tensor) -> float | None:
    """One for all that is compared: the median distance of held-out samples, or of some of them."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    return torch.pdist(real[order[:MEDIAN_POINTS]].double()).median().item() or None


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def _classes(made: Tensor, labels: Tensor, train: Samples, test: Samples) -> list[Line]:
    """Whether samples are of the class that was asked for."""
    few = slice(0, CLASSIFIER_SAMPLES)
    classifier = Classifier(train.images[few], labels_of(train)[few])

    def neighbours(x: Tensor, y: Tensor) -> float:
        return generative.class_agreement(train.images, labels_of(train), x, y)

    return [
        (
            f"{name} agrees with the class asked for",
            agree(made, labels),
            {"held-out data": agree(test.images, labels_of(test))},
        )
        for name, agree in (("classifier", classifier.accuracy), ("kNN", neighbours))
    ]


def _manifold(made: Tensor, labels: Tensor | None, train: Samples, test: Samples) -> list[Line]:
    """Precision, recall and the like compare only between sets of one size, class by class."""
    few, same = slice(0, len(test.images)), torch.arange(min(len(test.images), len(train.images)))
    real_labels, train_labels = None, None
    if labels is not None:
        real_labels, same = labels_of(test), _as_many_of_each(train, labels_of(test))
        train_labels = labels_of(train)[same]
    mine = made[few], None if labels is None else labels[few]
    theirs = train.images[same], train_labels
    both = [generative.precision_recall(test.images, real_labels, *x) for x in (mine, theirs)]
    more = [generative.density_coverage(test.images, real_labels, *x) for x in (mine, theirs)]
    return [
        (name, getattr(found, name), {"train data": getattr(beside, name)})
        for name, (found, beside) in (
            ("precision", both),
            ("recall", both),
            ("density", more),
            ("coverage", more),
        )
    ]


def _copies(made: Tensor, train: Samples, test: Samples) -> list[Line]:
    """Whether samples are nearer to training data than held-out data are."""
    found = generative.memorisation(made[: len(test.images)], train.images, test.images)
    held_out = found.held_out_median
    return [
        ("distance to the nearest training sample, median", found.generated_median,
         {"held-out data": held_out}),
        ("the same, 5 % quantile", found.generated_low, {"held-out data": found.held_out_low}),
        ("nearer than 99 % of held-out data are", found.suspicious, {"held-out data": 0.01}),
        ("copies of training samples", float(found.copies),
         {"held-out data": float(found.held_out_copies)}),
    ]  # fmt: skip


def _draw(task: Drift, made: Tensor, labels: Tensor | None, splits: Splits, run: Path) -> None:
    test, path = splits.test, run / "plots" / "samples.png"
    if report.are_images(made):
        shown = torch.zeros(len(made), dtype=torch.int64) if labels is None else labels
        real = torch.zeros(len(test.images), dtype=torch.int64)
        report.sample_grid(
            made, shown, test.images, real if labels is None else labels_of(test), path,
            title=str(run),
        )  # fmt: skip
    elif made[0].numel() == 2:
        points, data = made.flatten(1), test.images.flatten(1)
        report.point_clouds({"generated": points[: len(data)], "data": data}, path, str(run))
        at, force = force_field(task.loss, points[:FIELD_POINTS], data[:FIELD_POINTS])
        report.force_field(at, force, points[:FIELD_POINTS], data[:FIELD_POINTS],
                           run / "plots" / "force.png", str(run))  # fmt: skip


def force_field(loss: ContrastiveForce, generated: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """What one more generated point would feel at the places of a grid.

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
    floor = loss.rules.affinity.floor
    alone = ContrastiveForce(
        loss.temperatures, loss.preset, affinity_floor=floor, keys_from="local"
    )
    return at, alone.force(negative / scale, positive / scale)[:, 0]


def _as_many_of_each(samples: Samples, labels: Tensor) -> Tensor:
    """Indices of the first samples of each class, as many as `labels` has of it."""
    mine = labels_of(samples)
    chosen = [
        (mine == label).nonzero().flatten()[: int((labels == label).sum())]
        for label in labels.unique()
    ]
    return torch.cat(chosen)
