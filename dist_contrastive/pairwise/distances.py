"""Euclidean distances of a tile: one matrix product, repaired where it loses its digits."""

import torch
from torch import Tensor

# |x|^2 + |y|^2 - 2xy keeps about eps * (|x|^2 + |y|^2) of absolute error. Below this share of
# (|x|^2 + |y|^2) the squared distance is computed again from the difference.
_CLOSE = 1e-2
# With more close pairs than one in this many, computing the whole tile from differences is cheaper.
_MANY = 64


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances between rows: [G, r, D], [G, c, D] -> [G, r, c]; 0 exactly where rows are equal.

    Points should be centred (see `centre`): the error is relative to their norms.
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


def centre(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both minus the mean of the keys, group by group: distances stay, rounding shrinks.

    Args:
        rows: [G, R, D]. keys: [G, K, D], the same on all ranks, so that all subtract the same.
    """
    mean = keys.mean(-2, keepdim=True)
    return rows - mean, keys - mean
