"""Distances between the distributions that two samples come from.

All are symmetric and do not depend on the order of the points. The first two are without bias:
two samples of one distribution give 0 on average, and negative values are possible. The last two
are never negative and shrink with the number of points: compare values of equal numbers only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.points import as_points

MEDIAN_POINTS = 2000
"""The median distance is taken among so many points: two million pairs, 16 MB."""


def energy_distance(x: Tensor, y: Tensor, chunk: int = 1024) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| between two samples, without bias.

    Expectations over one sample leave out pairs of a point with itself (U-statistic).

    Args:
        x, y: [n, D] and [m, D], or images, which are flattened; n, m at least 2.
        chunk: rows at a time; bounds the memory to chunk x max(n, m).
    Returns:
        The distance in units of the points; distances and sums are fp64.
    Raises:
        ConfigError, DataError: as `as_points`.
    References:
        Szekely and Rizzo 2013, "Energy statistics".
    """
    x, y = _centred(*as_points("energy distance", 2, x=x, y=y))
    return _between_less_within(lambda distances: distances, x, y, chunk)


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None, chunk: int = 1024) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel, without bias.

    E k(X, X') + E k(Y, Y') - 2 E k(X, Y) with k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)), again
    without pairs of a point with itself.

    Args:
        x, y: [n, D] and [m, D], or images, which are flattened; n, m at least 2.
        bandwidth: in units of the points. None: the median distance between two points of both
            samples together, among MEDIAN_POINTS of them drawn with a fixed seed where there are
            more. Equal points do not count, so that a sample of copies cannot make it 0. It
            depends on both samples: give one number to compare several generators.
        chunk: rows at a time; bounds the memory to chunk x max(n, m).
    Returns:
        At most 2, without unit; computed in fp64.
    Raises:
        ConfigError: the bandwidth is not a positive number, or as `as_points`.
        DataError: as `as_points`.
    References:
        Gretton et al. 2012, "A kernel two-sample test", equation 3 and section 8.
    """
    x, y = _centred(*as_points("MMD", 2, x=x, y=y))
    width = _median_distance(torch.cat([x, y])) if bandwidth is None else bandwidth
    if not 0 < width < math.inf:
        raise ConfigError(
            f"the bandwidth of MMD is {width}: give a positive number, or None for the median "
            "distance."
        )
    return -_between_less_within(lambda d: (-0.5 * (d / width) ** 2).exp(), x, y, chunk)


def sliced_wasserstein(
    x: Tensor, y: Tensor, num_projections: int = 256, seed: int = 0, chunk: int = 64
) -> float:
    """Mean over directions of the Wasserstein-1 distance between the projected samples.

    In one dimension W1 is the area between the two cumulative distributions, which needs no equal
    numbers of points. Directions are uniform on the sphere; for D = 1 it is W1 itself.

    Args:
        x, y: [n, D] and [m, D], or images, which are flattened; n, m at least 1.
        num_projections: directions. The same seed gives the same ones on any device.
        seed: of the directions.
        chunk: directions at a time; bounds the memory to chunk x (n + m).
    Returns:
        The distance in units of the points; computed in fp64.
    Raises:
        ConfigError: there are no directions, or as `as_points`.
        DataError: as `as_points`.
    References:
        Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    if num_projections < 1:
        raise ConfigError(
            f"sliced Wasserstein averages over directions, but num_projections is "
            f"{num_projections}: set 1 or more."
        )
    x, y = _centred(*as_points("sliced Wasserstein", 1, x=x, y=y))
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_projections, x.shape[1], generator=random, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=1).to(x.device)
    total = sum(_wasserstein(part @ x.T, part @ y.T) for part in directions.split(chunk))
    return total / num_projections


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Wasserstein-2 distance between the Gaussians fitted to two samples.

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), C the covariances (over n - 1). It is
    the FID where the points are features of the Inception network; here they are in whatever space
    the caller names. With C = R^T R, the last trace is the sum of the singular values of R_x R_y^T,
    and a QR decomposition of the points gives R: no covariance is formed and no root of a matrix
    is taken, so that fewer points than dimensions, or constant ones, do no harm.

    Args:
        x, y: [n, D] and [m, D], or images, which are flattened; n, m at least 2, and better some
            times D: the fewer, the larger the distance between samples of one distribution.
    Returns:
        The distance in squared units of the points; computed in fp64, in memory of the order of
        the points themselves.
    Raises:
        ConfigError, DataError: as `as_points`.
    References:
        Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """
    x, y = _centred(*as_points("the Fréchet distance", 2, x=x, y=y))
    mean_distance = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    root_x, root_y = _covariance_root(x), _covariance_root(y)
    spread = root_x.square().sum() + root_y.square().sum()
    shared = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return max(
        0.0, (mean_distance + spread - 2 * shared).item()
    )  # rounding alone makes it negative


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved by one vector: products of numbers far from zero would lose digits."""
    centre = torch.cat([x, y]).mean(dim=0)
    return x - centre, y - centre


def _between_less_within(
    function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, chunk: int
) -> float:
    """2 E f(|X - Y|) - E f(|X - X'|) - E f(|Y - Y'|), without pairs of a point with itself."""

    def total(a: Tensor, b: Tensor) -> float:
        return sum(function(torch.cdist(part, b)).sum().item() for part in a.split(chunk))

    def within(a: Tensor) -> float:
        n, itself = len(a), function(a.new_zeros(1)).item()
        return (total(a, a) - n * itself) / (n * (n - 1))

    return 2 * total(x, y) / (len(x) * len(y)) - within(x) - within(y)


def _median_distance(points: Tensor) -> float:
    """Median distance of different points; 1 where all are equal, since then any MMD is 0."""
    if len(points) > MEDIAN_POINTS:
        random = torch.Generator().manual_seed(0)  # every n-th could be of one class
        chosen = torch.randperm(len(points), generator=random)[:MEDIAN_POINTS]
        points = points[chosen.to(points.device)]
    distances = torch.pdist(points)
    distances = distances[distances > 0]
    return distances.median().item() if len(distances) else 1.0


def _wasserstein(x: Tensor, y: Tensor) -> float:
    """Sum over rows of W1 between the values [p, n] and [p, m]."""
    n, m = x.shape[1], y.shape[1]
    values, order = torch.cat([x, y], dim=1).sort(dim=1)
    # n m times the difference of the two cumulative distributions: whole numbers, hence exact.
    steps = torch.where(order < n, m, -n).cumsum(dim=1)[:, :-1]
    return (steps.abs() * values.diff(dim=1)).sum().item() / (n * m)


def _covariance_root(points: Tensor) -> Tensor:
    """R [min(n, D), D] with R^T R the covariance, summing to n - 1."""
    deviations = points - points.mean(dim=0)
    return torch.linalg.qr(deviations, mode="r").R / math.sqrt(len(points) - 1)
