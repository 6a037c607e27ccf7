"""Euclidean and cosine distance: of all pairs of a tile, and of rows with rows.

With p, q in R^D: Euclidean d = |p - q| in [0, inf), of angle and length; cosine
d = 1 - <p, q> / (|p| |q|) in [0, 2], of the angle alone (no true metric).
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

# |x|^2 + |y|^2 - 2xy keeps about eps * (|x|^2 + |y|^2) of absolute error. Below this share of
# (|x|^2 + |y|^2) the squared distance is computed again from the difference.
_CLOSE = 1e-2
# With more close pairs than one in this many, computing the whole tile from differences is cheaper.
_MANY = 64

DistanceName = Literal["euclidean", "squared_euclidean", "cosine"]


class Distance(ABC):
    """A distance between points, and its derivative."""

    def prepare(self, points: Tensor, centre: Tensor) -> Tensor:
        """Points [n, D] in the form that the methods below take; distances do not change.

        Args:
            centre: [D], near the middle of all ranks' points and the same on all ranks.
        """
        # Rounding is relative to the norms, which are smallest seen from the middle.
        return points - centre

    @abstractmethod
    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs, without gradient: [r, D], [k, D] -> [r, k]."""

    @abstractmethod
    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs, differentiable, in plain torch: the specification."""

    @abstractmethod
    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Each row with its partner, differentiable: [n, D], [n, D] -> [n]."""

    @abstractmethod
    def slopes(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of ``sum(weight * d)`` by x [r, D] and y [k, D], from d = tile(x, y)."""


class Euclidean(Distance):
    """``|x - y|``; where points coincide the derivative is taken as 0."""

    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return distances(x[None], y[None])[0]

    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return (x - y).norm(dim=1)

    def slopes(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        return _along_differences(x, y, torch.where(d > 0, weight / d, 0.0))


class SquaredEuclidean(Distance):
    """``|x - y|^2``."""

    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return distances(x[None], y[None])[0].square_()

    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()

    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return (x - y).square().sum(1)

    def slopes(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        return _along_differences(x, y, 2 * weight)


class Cosine(Distance):
    """``1 - cosine similarity``; points are prepared by giving them unit length."""

    def prepare(self, points: Tensor, centre: Tensor) -> Tensor:
        """See `Distance`."""
        return nn.functional.normalize(points, dim=-1)

    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return 1 - x @ y.T

    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return 1 - x @ y.T

    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Distance`."""
        return 1 - (x * y).sum(1)

    def slopes(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        return -weight @ y, -weight.T @ x


DISTANCES: dict[str, Distance] = {
    "euclidean": Euclidean(),
    "squared_euclidean": SquaredEuclidean(),
    "cosine": Cosine(),
}


def _along_differences(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_k weight[i, k] (x_i - y_k)`` for every row, and the opposite for every key."""
    by_x = weight.sum(1, keepdim=True) * x - weight @ y
    return by_x, weight.sum(0)[:, None] * y - weight.T @ x


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances between rows: [G, r, D], [G, c, D] -> [G, r, c]; 0 exactly where rows
    are equal. One matrix product, repaired where it loses its digits.

    Points should be near the origin: the error is relative to their norms.
    """
    x_square, y_square = x.square().sum(-1), y.square().sum(-1)
    magnitude = x_square[..., :, None] + y_square[..., None, :]
    square = torch.baddbmm(magnitude, x, y.transpose(-1, -2), alpha=-2)
    close = square < _CLOSE * magnitude
    num_close = int(torch.count_nonzero(close))
    if num_close * _MANY > close.numel():
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if num_close:
        group, row, column = close.nonzero(as_tuple=True)
        square[close] = (x[group, row] - y[group, column]).square().sum(-1)
    # All-zero rows have no magnitude, hence are not "close"; their square is exactly 0 already.
    return square.clamp_(min=0).sqrt_()
