"""Precision, recall, density, coverage and memorisation of generated samples.

Each point of a set owns the ball that reaches its k-th nearest other point of the set: together
the balls stand for where the set's distribution lies. Precision and density look for generated
points in balls of real ones; recall looks for real points in balls of generated ones, coverage
for balls of real points that hold a generated one. Coverage and density thus never trust the
balls of generated points, which a single outlier makes huge.

All are taken within each class and averaged over the classes of the real samples. They change
with the numbers of points: compare only values from sets of equal sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.evaluation.points import as_points, check_labels

LOW = 0.05
"""The quantile of distances that stands for the nearest ones."""
SUSPECT = 0.01
"""The quantile of held-out distances below which a generated sample is suspiciously near."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions: generated samples that look real, and real samples that are covered."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Real balls around a generated sample, over k; fraction of real balls that hold one.

    Density is 1 on average for real samples, and above where samples crowd where data does;
    coverage is at most 1, and 1 - 2^-k on average for as many real samples (many of them).
    """

    density: float
    coverage: float


def precision_recall(
    real: Tensor,
    real_labels: Tensor | None,
    generated: Tensor,
    generated_labels: Tensor | None,
    k: int = 3,
    chunk: int = 1024,
) -> PrecisionRecall:
    """Improved precision and recall, within each class and averaged over classes.

    Precision is the fraction of generated points inside some real point's ball; recall the
    fraction of real points inside some generated point's ball.

    Args:
        real, generated: [n, D] and [m, D], or images, which are flattened.
        real_labels, generated_labels: integers [n] and [m]; every class of `real` counts. None
            for both: one class.
        k: neighbour that sets a ball's radius.
        chunk: rows at a time; bounds the memory to chunk x max(n, m).
    Raises:
        ConfigError: k is not positive, or a class has fewer than k + 1 points on a side.
        DataError: labels on one side only, or not one for each; or as `as_points`.
    References:
        Kynkaanniemi et al. 2019, arXiv 1904.06991.
    """
    precisions, recalls = [], []
    pairs = _by_class(
        "precision and recall", real, real_labels, generated, generated_labels, k, k + 1
    )
    for a, b in pairs:
        around, _ = _count(b, a, _radii(a, k, chunk), chunk)
        precisions.append(_fraction(around > 0))
        around, _ = _count(a, b, _radii(b, k, chunk), chunk)
        recalls.append(_fraction(around > 0))
    return PrecisionRecall(_mean(precisions), _mean(recalls))


def density_coverage(
    real: Tensor,
    real_labels: Tensor | None,
    generated: Tensor,
    generated_labels: Tensor | None,
    k: int = 5,
    chunk: int = 1024,
) -> DensityCoverage:
    """Density and coverage, within each class and averaged over classes.

    Density is the mean number of real points' balls that a generated point lies in, divided by
    k; coverage the fraction of real points whose ball holds a generated point.

    Args:
        real, real_labels, generated, generated_labels, k, chunk: as of `precision_recall`.
    Raises:
        ConfigError: k is not positive, or a class has fewer than k + 1 real points or no
            generated one.
        DataError: as of `precision_recall`.
    References:
        Naeem et al. 2020, arXiv 2002.09797.
    """
    densities, coverages = [], []
    pairs = _by_class("density and coverage", real, real_labels, generated, generated_labels, k, 1)
    for a, b in pairs:
        around, held = _count(b, a, _radii(a, k, chunk), chunk)
        densities.append(around.double().mean().item() / k)
        coverages.append(_fraction(held > 0))
    return DensityCoverage(_mean(densities), _mean(coverages))


def _by_class(
    measure: str,
    real: Tensor,
    real_labels: Tensor | None,
    generated: Tensor,
    generated_labels: Tensor | None,
    k: int,
    least_generated: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked real and generated points [n, D] and [m, D] of each class of the real ones."""
    if k < 1:
        raise ConfigError(f"a ball reaches the k-th neighbour, but k is {k}: set 1 or more.")
    real, generated = as_points(measure, 1, real=real, generated=generated)
    if real_labels is None and generated_labels is None:
        real_labels = torch.zeros(len(real), dtype=torch.int64, device=real.device)
        generated_labels = real_labels.new_zeros(len(generated))
    elif real_labels is None or generated_labels is None:
        missing = "real" if real_labels is None else "generated"
        raise DataError(
            f"the {missing} samples have no labels, but the others have: give {measure} both, or "
            "None for both."
        )
    check_labels("real", real_labels, real)
    check_labels("generated", generated_labels, generated)
    for label in real_labels.unique().tolist():
        a, b = real[real_labels == label], generated[generated_labels == label]
        if len(a) <= k or len(b) < least_generated:
            raise ConfigError(
                f"{measure} with k = {k} need {k + 1} real and {least_generated} generated samples "
                f"of each class, but class {label} has {len(a)} real and {len(b)} generated: "
                "take more or lower k."
            )
        yield a, b


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Distance [n] of each point to its k-th nearest other point."""
    # Smallest of k + 1 distances is the point itself.
    parts = [_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(chunk)]
    return torch.cat(parts)


def _count(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """How many balls each point lies in, and how many points each ball holds: int64 [n], [m]."""
    around, held = [], torch.zeros_like(radii, dtype=torch.int64)
    for part in points.split(chunk):
        inside = _distances(part, centres) <= radii
        around.append(inside.sum(dim=1))
        held += inside.sum(dim=0)
    return torch.cat(around), held


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances by differences, which keep duplicates at 0 and balls at their neighbour.

    scikit-learn's NearestNeighbors would replace the search of radii alone, not the counts.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _fraction(hits: Tensor) -> float:
    return hits.double().mean().item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training sample, of generated and of held-out samples.

    Honest samples have the distances of held-out ones. A generator that copies has smaller ones,
    in the median if it does so often and in the low quantile if it does so sometimes; one whose
    samples lie off the data has larger ones, which is no merit.

    Attributes:
        generated_median, held_out_median: medians, in units of the points.
        generated_low, held_out_low: quantiles LOW.
        suspicious: fraction of generated samples that are as near to a training sample as the
            quantile SUSPECT of held-out samples, or nearer. Honest samples give about SUSPECT.
        copies, held_out_copies: how many equal a training sample in every value.
    """

    generated_median: float
    held_out_median: float
    generated_low: float
    held_out_low: float
    suspicious: float
    copies: int
    held_out_copies: int


def memorisation(
    generated: Tensor, train: Tensor, held_out: Tensor, chunk: int = 1024
) -> Memorisation:
    """How near generated samples come to training samples, beside how near held-out ones do.

    Args:
        generated, train, held_out: [n, D], [m, D] and [h, D], or images, which are flattened; h
            better 100 or more, or the quantile SUSPECT is little more than the nearest one.
        chunk: rows at a time; bounds the memory to chunk x m.
    Raises:
        ConfigError, DataError: as `as_points`.
    """
    generated, train, held_out = as_points(
        "memorisation", 1, generated=generated, train=train, held_out=held_out
    )
    distances = _to_nearest(generated, train, chunk)
    reference = _to_nearest(held_out, train, chunk)
    return Memorisation(
        generated_median=distances.quantile(0.5).item(),
        held_out_median=reference.quantile(0.5).item(),
        generated_low=distances.quantile(LOW).item(),
        held_out_low=reference.quantile(LOW).item(),
        suspicious=(distances <= reference.quantile(SUSPECT)).double().mean().item(),
        copies=int((distances == 0).sum()),
        held_out_copies=int((reference == 0).sum()),
    )


def _to_nearest(points: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Distance [n] of each point to the nearest of `keys`."""
    centre = keys.mean(dim=0)
    centred, distances = keys - centre, []
    for part in points.split(chunk):
        # Products find the nearest one fast, but only differences are exactly 0 for a copy.
        nearest = torch.cdist(part - centre, centred).argmin(dim=1)
        distances.append((part - keys[nearest]).norm(dim=1))
    return torch.cat(distances)
