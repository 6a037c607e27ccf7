"""Euclidean and cosine distance: of all pairs of a tile, and of rows with rows.

With p, q in R^D: Euclidean d = |p - q| in [0, inf), of angle and length; cosine
d = 1 - <p, q> / (|p| |q|) in [0, 2], of the angle alone (no true metric).
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

# |x|^2 + |y|^2 - 2xy keeps about eps * (|x|^2 + |y|^2) of absolute error. Below this share of
# (|x|^2 + |y|^2) the squared distance is computed again from the difference.
_CLOSE = 1e-2
# With more close pairs than one in this many, computing the whole tile from differences is cheaper.
_MANY = 64
# And with so few dimensions it always is.
_FEW_DIMENSIONS = 4
# The same for gradients, whose exact kernel is slower; and close pairs that are added at a time.
_MANY_GRADIENTS, _PAIRS = 8, 4096
# Lengths below which a direction is noise, and its gradient, which grows as 1 / length, as well.
_SHORT, _NO_LENGTH = 1e-3, 1e-12

DistanceName = Literal["euclidean", "squared_euclidean", "cosine"]


def unit_rows(x: Tensor) -> Tensor:
    """Rows [..., D] of unit length, 0 where all is 0; their gradient is `bounded`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return bounded(x / length.clamp(min=_NO_LENGTH), length)


def joined_rows(*inputs: Tensor) -> Tensor:
    """Rows of all inputs, one after the other, in a dtype that holds them; not by autocast, which
    refuses some."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return torch.cat(inputs)


def bounded(x: Tensor, length: Tensor) -> Tensor:
    """x, a function of lengths whose gradient grows as 1 / length: below 1e-3 it is made to shrink
    with the length instead, so that a row near 0, or near another one, moves no others. A graph of
    that gradient is refused: it would lack the derivative of the shrinking."""
    if not x.requires_grad:
        return x
    share = (length.detach() / _SHORT).clamp(max=1).square()

    def shrunk(grad: Tensor) -> Tensor:
        if torch.is_grad_enabled() and bool((share < 1).any()):
            raise NotImplementedError(
                f"a graph of the gradient is asked for (create_graph=True), and rows shorter, or "
                f"nearer to each other, than {_SHORT:g} have none; scale embeddings up, or leave "
                f"create_graph out"
            )
        return grad * share

    x.register_hook(shrunk)
    return x


class Distance(ABC):
    """A distance between points, and its derivative."""

    def prepare(self, points: Tensor) -> Tensor:
        """Points [n, D] in the form that the methods below take; distances do not change."""
        return points

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
    def gradients(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of ``sum(weight * d)`` by x [r, D] and y [k, D], from d = tile(x, y)."""


class Euclidean(Distance):
    """``|x - y|``; where points coincide the derivative is taken as 0."""

    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        return distances(x[None], y[None])[0]

    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).norm(dim=1)

    def gradients(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _along_differences(x, y, d, weight)


class SquaredEuclidean(Distance):
    """``|x - y|^2``."""

    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        return distances(x[None], y[None])[0].square_()

    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()

    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum(1)

    def gradients(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        d = d.sqrt()
        return _along_differences(x, y, d, 2 * d * weight)


class Cosine(Distance):
    """``1 - cosine similarity``; points are prepared by giving them unit length."""

    def prepare(self, points: Tensor) -> Tensor:
        return unit_rows(points)

    def tile(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - x @ y.T

    def dense(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - x @ y.T

    def rowwise(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - (x * y).sum(1)

    def gradients(self, x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return -weight @ y, -weight.T @ x


DISTANCES: dict[str, Distance] = {
    "euclidean": Euclidean(),
    "squared_euclidean": SquaredEuclidean(),
    "cosine": Cosine(),
}


def _along_differences(x: Tensor, y: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_k weight[i, k] (x_i - y_k) / d[i, k]`` for every row, and the opposite for every key.

    Points that coincide add nothing. Two matrix products, repaired as in `distances`: a close pair
    has a large ``weight / d``, and what it should leave of that is lost beside the norms.
    """
    if not d.numel():
        return torch.zeros_like(x), torch.zeros_like(y)
    x_centred, y_centred = x - y.mean(0), y - y.mean(0)
    magnitude = x_centred.square().sum(1)[:, None] + y_centred.square().sum(1)
    close = (d.square() < _CLOSE * magnitude) & (weight != 0) & (d > 0)
    num_close = int(torch.count_nonzero(close))
    if num_close * _MANY_GRADIENTS > close.numel():
        return _exact_gradients(x, y, weight)
    factor = torch.where(d > 0, weight / d, 0.0)
    products = factor.masked_fill(close, 0.0) if num_close else factor
    by_x = products.sum(1, keepdim=True) * x_centred - products @ y_centred
    by_y = products.sum(0)[:, None] * y_centred - products.T @ x_centred
    for pairs in close.nonzero().split(_PAIRS):
        row, column = pairs.unbind(1)
        along = factor[row, column, None] * (x[row] - y[column])
        by_x.index_add_(0, row, along)
        by_y.index_add_(0, column, along, alpha=-1)
    return by_x, by_y


def _exact_gradients(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`_along_differences` from all differences, by torch's own kernel."""
    with torch.enable_grad():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        by_x, by_y = torch.autograd.grad(d, [x, y], weight)
    return by_x, by_y


def distances(x: Tensor, y: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Euclidean distances between rows: [G, r, D], [G, c, D] -> [G, r, c]; 0 exactly where rows
    are equal. One matrix product, repaired where it loses its digits.

    Args:
        excluded: bool [r, c], pairs whose distance is taken as infinite.
    """
    if 0 in (x.shape[-2], y.shape[-2]):
        return x.new_empty(*x.shape[:-1], y.shape[-2])
    square = None if x.shape[-1] <= _FEW_DIMENSIONS else _squares(x, y, excluded)
    if square is not None:
        return square.sqrt_()
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return d if excluded is None else d.masked_fill_(excluded, torch.inf)


def _squares(x: Tensor, y: Tensor, excluded: Tensor | None) -> Tensor | None:
    """Squares of `distances`; None where many must be repaired."""
    # Rounding is relative to the norms, which are smallest seen from the middle.
    middle = y.mean(-2, keepdim=True)
    x_centred, y_centred = x - middle, y - middle
    x_square = torch.linalg.vector_norm(x_centred, dim=-1, keepdim=True).square_()
    y_square = torch.linalg.vector_norm(y_centred, dim=-1).square_()[..., None, :]
    square = (x_square + y_square).baddbmm_(x_centred, y_centred.transpose(-1, -2), alpha=-2)
    if excluded is not None:
        square.masked_fill_(excluded, torch.inf)
    largest = x_square + y_square.amax(-1, keepdim=True)  # of the magnitudes in a row
    if (square.amin(-1, keepdim=True) < _CLOSE * largest).any():
        close = square < _CLOSE * (x_square + y_square)
        num_close = int(torch.count_nonzero(close))
        if num_close * _MANY > close.numel():
            return None
        group, row, column = close.nonzero(as_tuple=True)
        square[close] = (x[group, row] - y[group, column]).square().sum(-1)
    # What is not close is not negative; two points in the middle, without magnitude, have 0.
    return square
