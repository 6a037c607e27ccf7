"""Measures of a representation without a classifier: clusters, rank, alignment, uniformity.

All compute in fp64, whatever the dtype of the features, and refuse NaN. What is collapsed to one
point has rank 1 at most, uniformity 0, clusters without information, and no alignment.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import metrics
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.evaluation.points import as_points, check_labels

_RIDGE = 1e-4  # of the covariance within samples: delta of LiDAR
_EQUAL = 1e-12  # of squared distances on the unit sphere: rounding alone
RESTARTS, ITERATIONS = 10, 100  # of k-means
_ROWS = 4096  # that are compared with all centres at a time


def rank_me(features: Tensor) -> float:
    """`metrics.rank_me` of checked features [n, D]; n better some times D, since the rank is at
    most min(n, D).

    Raises:
        ConfigError, DataError: as `as_points`.
    """
    (points,) = as_points("RankMe", 1, features=features)
    return metrics.rank_me(points)


def lidar(views: Tensor) -> float:
    """Effective rank of what tells samples apart, beside what tells views of a sample apart (LDA).

    S = W^(-1/2) B W^(-1/2), B the covariance of the means of samples (over n), W that of views
    around them (over n q) plus 1e-4 I; exp of the entropy of the eigenvalues of S over their sum.

    Args:
        views: [n, q, D], q views of n samples, both 2 or more.
    Returns:
        1 ... min(n - 1, D); 0 where the means of all samples are equal.
    Raises:
        ConfigError: there are too few samples or views, or all views of a sample are equal.
        DataError: as `as_points`.
    References:
        Thilak et al. 2023, arXiv 2312.04000, equations 3 to 6.
    """
    count = views.shape[1]
    (points,) = as_points("LiDAR", 2, views=views.flatten(0, 1))
    if count < 2 or len(points) < 2 * count:
        raise ConfigError(
            f"LiDAR compares 2 views or more of 2 samples or more, but there are {count} of "
            f"{len(points) // max(1, count)}: give more."
        )
    rows = points.view(-1, count, points.shape[1])
    means = rows.mean(dim=1)
    around = (rows - means[:, None]).flatten(0, 1)
    if not around.abs().amax() > 0:
        raise ConfigError("all views of a sample are equal: LiDAR needs views that differ.")
    between = means - means.mean(dim=0)
    within = around.T @ around / len(points)
    within.diagonal().add_(_RIDGE)
    root = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(root, between.T, upper=False)
    return metrics.effective_rank(torch.linalg.svdvals(whitened).square())


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two embeddings of a sample on the unit sphere; 0 is perfect.

    Args:
        first, second: [n, D]; row i of both is of one sample.
    Raises:
        ConfigError: lengths differ. DataError: all rows are equal, which would look perfect; or as
            `as_points`.
    References:
        Wang and Isola 2020, arXiv 2005.10242, equation 4, with exponent 2.
    """
    first, second = as_points("alignment", 1, first=first, second=second)
    if len(first) != len(second):
        raise ConfigError(
            f"there are {len(first)} first embeddings and {len(second)} second ones: give as many."
        )
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    rows = torch.cat([first, second])
    if not (rows - rows[0]).square().sum(dim=1).amax() > _EQUAL:
        raise DataError(
            f"all {len(rows)} embeddings are equal (collapsed), so that their alignment says "
            f"nothing: train another encoder."
        )
    return (first - second).square().sum(dim=1).mean().item()


def uniformity(embeddings: Tensor, chunk: int = 1024) -> float:
    """Log of the mean over pairs of different samples of exp(-2 squared distance) on the unit
    sphere; 0 where all are equal, lower is more evenly spread.

    Args:
        embeddings: [n, D], n 2 or more.
        chunk: rows at a time; bounds the memory to chunk x n.
    Raises:
        ConfigError, DataError: as `as_points`.
    References:
        Wang and Isola 2020, arXiv 2005.10242, equation 5, with t = 2.
    """
    (points,) = as_points("uniformity", 2, embeddings=embeddings)
    points = F.normalize(points, dim=1)
    total = 0.0
    for part in points.split(chunk):
        squared = torch.cdist(part, points, compute_mode="use_mm_for_euclid_dist").square()
        total += (-2 * squared).exp().sum().item()
    n = len(points)
    return math.log((total - n) / (n * (n - 1)))  # each pair adds exp(-8) or more


def cluster(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """Clusters of k-means: Lloyd's algorithm from k-means++ centres, the best of RESTARTS.

    Args:
        features: [n, D], n at least `count`.
        count: clusters; fewer are found where fewer points are different.
        seed: of the first centres, which depend on nothing else than it and the features.
    Returns:
        int64 [n], numbers of clusters 0 ... count - 1. The same on any number of ranks.
    Raises:
        ConfigError: there are fewer samples than clusters; or as `as_points`. DataError: as that.
    """
    (points,) = as_points("k-means", count, features=features)
    best, least = torch.zeros(len(points), dtype=torch.int64, device=points.device), math.inf
    for restart in range(RESTARTS):
        random = np.random.default_rng([seed, restart])
        numbers, inertia = _lloyd(points, _first_centres(points, count, random))
        if inertia < least:
            best, least = numbers, inertia
    return best


def nmi(features: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Mutual information of classes and of as many clusters, over the mean of their entropies.

    Clusters are those of `cluster` of rows of length 1.

    Args:
        features: [n, D]. labels: integers [n].
        seed: as of `cluster`.
    Returns:
        0 ... 1; 0 where all features are equal, or all labels.
    Raises:
        ConfigError, DataError: as `cluster`, or there is not one label for each row.
    """
    check_labels("features", labels, features)
    from sklearn.metrics import normalized_mutual_info_score

    numbers = cluster(F.normalize(features.flatten(1).double(), dim=1), len(labels.unique()), seed)
    classes = labels.unique(return_inverse=True)[1]
    if numbers.unique().numel() < 2 or classes.unique().numel() < 2:
        return 0.0  # scikit-learn takes two partitions of one part each for equal: 1
    return float(normalized_mutual_info_score(classes.cpu().numpy(), numbers.cpu().numpy()))


def _first_centres(points: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """k-means++: each next centre is drawn by its squared distance to the nearest one."""
    chosen = [int(random.integers(len(points)))]
    nearest = torch.full((len(points),), math.inf, dtype=torch.float64, device=points.device)
    for draw in random.random(count - 1):
        nearest = nearest.minimum((points - points[chosen[-1]]).square().sum(dim=1))
        until = nearest.cumsum(0)
        at = torch.searchsorted(until, until[-1] * draw, right=True)
        chosen.append(min(int(at), len(points) - 1))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Number of the nearest centre [n] once it changes no more, and the sum of squared distances.
    A cluster that has lost all its points keeps its centre."""
    numbers = points.new_full((len(points),), -1, dtype=torch.int64)
    for _ in range(ITERATIONS):
        before, numbers = numbers, numbers.clone()
        sums, counts = torch.zeros_like(centres), centres.new_zeros(len(centres), 1)
        for begin in range(0, len(points), _ROWS):
            rows = points[begin : begin + _ROWS]
            nearest = _nearest(rows, centres)
            numbers[begin : begin + _ROWS] = nearest
            # Not index_add_, whose order of additions on a GPU is another one each time.
            members = F.one_hot(nearest, len(centres)).double().T
            sums += members @ rows
            counts += members.sum(dim=1, keepdim=True)
        if torch.equal(before, numbers):
            break
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return numbers, (points - centres[numbers]).square().sum().item()


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(dim=1) - 2 * points @ centres.T).argmin(dim=1)
