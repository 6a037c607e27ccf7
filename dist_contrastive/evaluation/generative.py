"""How close generated samples are to held-out data.

No number here means much alone: compute each a second time with training data in place of the
generated samples, and read the two side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.neighbours import Metric, knn_predict


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions: generated samples that look real, and real samples that are covered."""

    precision: float
    recall: float


def energy_distance(x: Tensor, y: Tensor, chunk: int = 1024) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| between two samples, without bias.

    Expectations over one sample leave out pairs of a point with itself (U-statistic), so that
    two samples of one distribution give 0 on average, and a negative value is possible.

    Args:
        x, y: [n, D] and [m, D], or images, which are flattened; n, m at least 2.
        chunk: rows at a time; bounds the memory to chunk x max(n, m).
    Returns:
        The distance in units of the points; distances and sums are fp64.
    Raises:
        ConfigError: fewer than two points on a side.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ConfigError(
            f"energy distance needs 2 samples or more on both sides, but got {n} and {m}: "
            "generate or hold out more."
        )
    x, y = x.flatten(1).double(), y.flatten(1).double()
    centre = x.mean(dim=0)  # distances from products of large numbers would lose digits
    x, y = x - centre, y - centre
    between = _sum_of_distances(x, y, chunk) / (n * m)
    within_x = _sum_of_distances(x, x, chunk) / (n * (n - 1))
    within_y = _sum_of_distances(y, y, chunk) / (m * (m - 1))
    return 2 * between - within_x - within_y


def precision_recall(
    real: Tensor,
    real_labels: Tensor,
    generated: Tensor,
    generated_labels: Tensor,
    k: int = 3,
) -> PrecisionRecall:
    """Improved precision and recall, within each class and averaged over classes.

    Each point of a set owns the ball that reaches its k-th nearest other point of the set.
    Precision is the fraction of generated points inside some real point's ball; recall the
    fraction of real points inside some generated point's ball. Both grow with the size of the
    set that owns the balls: compare only values from sets of equal sizes.

    Args:
        real, generated: [n, D] and [m, D], or images, which are flattened.
        real_labels, generated_labels: integers [n] and [m]; every class of `real` counts.
        k: neighbour that sets a ball's radius.
    Raises:
        ConfigError: a class has fewer than k + 1 points on a side.
    References:
        Kynkaanniemi et al. 2019, arXiv 1904.06991.
    """
    real, generated = real.flatten(1).double(), generated.flatten(1).double()
    precisions, recalls = [], []
    for label in real_labels.unique().tolist():
        a, b = real[real_labels == label], generated[generated_labels == label]
        if min(len(a), len(b)) <= k:
            raise ConfigError(
                f"precision and recall with k = {k} need {k + 1} samples of each class, but "
                f"class {label} has {len(a)} real and {len(b)} generated: take more or lower k."
            )
        precisions.append(_covered(b, by=a, k=k))
        recalls.append(_covered(a, by=b, k=k))
    return PrecisionRecall(_mean(precisions), _mean(recalls))


def class_agreement(
    real: Tensor,
    real_labels: Tensor,
    generated: Tensor,
    generated_labels: Tensor,
    k: int = 5,
    metric: Metric = "euclidean",
) -> float:
    """Fraction of generated samples that a kNN classifier fitted on real ones gives their class.

    Args:
        real, generated: [n, D] and [m, D], or images, which are flattened.
        real_labels, generated_labels: int64 [n], and the classes asked for [m].
        k, metric: of the classifier.
    """
    predicted = knn_predict(real, real_labels, generated, k, metric)
    return (predicted == generated_labels).double().mean().item()


def _covered(points: Tensor, by: Tensor, k: int) -> float:
    """Fraction of `points` inside the ball of at least one point of `by`."""
    # Smallest of k + 1 distances is the point itself. Direct differences keep duplicates at 0.
    exact = "donot_use_mm_for_euclid_dist"
    radii = torch.cdist(by, by, compute_mode=exact).kthvalue(k + 1, dim=1).values
    inside = torch.cdist(points, by, compute_mode=exact) <= radii
    return inside.any(dim=1).double().mean().item()


def _sum_of_distances(x: Tensor, y: Tensor, chunk: int) -> float:
    return sum(torch.cdist(part, y).sum().item() for part in x.split(chunk))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
