"""The contrastive force on whole matrices, in plain torch: the specification of `force`.

Every rank computes the matrices of all points, which repeats what others do, and keeps its rows.
"""

import math

import torch
from torch import Tensor

from dist_contrastive.pairwise import dense
from dist_contrastive.pairwise.affinity import Affinity
from dist_contrastive.pairwise.force import LogSums
from dist_contrastive.pairwise.points import GENERATED, POSITIVE, Points


class DenseForce:
    """See `pairwise.force.StreamedForce`, which takes the same and gives the same.

    Memory: a few matrices of [T, G, K, K] for the K points of all ranks.
    """

    def __init__(
        self, points: Points, affinity: Affinity, slope: Tensor, weights: Tensor | None
    ) -> None:
        extras = () if weights is None else (weights,)
        (block,) = points.source.blocks(*extras)
        assert block.tags is not None
        self._points = block.keys.transpose(0, 1)  # [G, K, D]
        kinds, labels = block.tags.unbind(1)
        number = torch.arange(len(labels), device=labels.device)
        is_self = number[:, None] == number
        apart = labels[:, None] != labels
        has_row = torch.ones_like(kinds, dtype=torch.bool)
        if not affinity.square:
            has_row = kinds == GENERATED
        self._d = dense.distances(self._points)
        scores = slope[..., labels][..., None, :] * self._d
        scores = scores.masked_fill(apart | (is_self & affinity.mask_self), -torch.inf)
        scores = scores.masked_fill(~has_row[:, None], -torch.inf)
        log_a = (scores.log_softmax(-1) + scores.log_softmax(-2)) / 2
        self._row_lse = scores.logsumexp(-1)
        log_a = log_a.masked_fill((scores == -torch.inf) | is_self, -torch.inf)
        if affinity.floor > 0:
            reached = log_a.clamp(min=math.log(affinity.floor))
            log_a = torch.where(apart | ~has_row[:, None], -torch.inf, reached)
        if weights is not None:
            log_a = log_a + block.extras[0].T.log()[:, None]
        self._log_a = log_a  # [T, G, K, K]
        self._is_positive, self._labels = kinds == POSITIVE, labels
        first = points.pairs.start
        self._mine = slice(first, first + len(points.pairs.keys))
        self._moving = slice(first, first + points.num_generated)

    def row_logsumexp(self) -> Tensor:
        """Log-sum-exp of -d/t over the keys of this rank's rows: [T, G, R]."""
        return self._row_lse[..., self._mine]

    def log_sums(self, with_square: bool) -> LogSums:
        """See `LogSums`."""
        num_labels = 1 + int(self._labels.max())
        log_square = (2 * (self._log_a + self._d.log())).logsumexp(-1)[..., self._mine]
        of_label = [
            log_square.masked_fill(self._labels[self._mine] != label, -torch.inf).logsumexp(-1)
            for label in range(num_labels)
        ]
        square = torch.stack(of_label, -1).double()
        if not with_square:
            square = torch.full_like(square, -torch.inf)
        same = (self._labels[self._mine, None] == self._labels).sum(1)
        num_pairs = torch.zeros(num_labels, dtype=torch.float64, device=same.device)
        num_pairs.index_add_(0, self._labels[self._mine], same.double())
        negative, positive = self._row_sums(self._log_a)
        of_others = self._row_sums(self._log_a.masked_fill(self._d == 0, -torch.inf))
        moving = torch.logaddexp(positive + of_others[0], negative + of_others[1])
        return LogSums(negative, positive, moving, square, num_pairs)

    def _row_sums(self, log_a: Tensor) -> list[Tensor]:
        """Logarithms of the sums over negatives and over positives, for this rank's rows."""
        of_sides = (
            log_a.masked_fill(other, -torch.inf)
            for other in (self._is_positive, ~self._is_positive)
        )
        return [x.logsumexp(-1)[..., self._mine] for x in of_sides]

    def accumulate(self, sums: LogSums, log_unit: Tensor, apart: bool) -> Tensor:
        """``F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j`` over the unit, S
        the row sums of A: [T, G, m, D], or the sum over T [1, G, m, D] unless `apart`.

        Points that coincide with x_j add nothing to it; their weights could only overflow.
        """
        m, d = self._moving.stop - self._moving.start, self._d[:, self._moving]
        log_unit = torch.where(log_unit == -torch.inf, torch.inf, log_unit).to(d.dtype)
        log_a = self._log_a[..., self._moving, :].masked_fill(d == 0, -torch.inf)
        other = torch.where(
            self._is_positive, sums.negative[..., :m, None], sums.positive[..., :m, None]
        )
        weight = torch.exp(log_a + other - log_unit[..., self._labels[self._moving], None])
        weight = torch.where(self._is_positive, weight, -weight)
        moving = self._points[:, self._moving]
        force = weight @ self._points - weight.sum(-1, keepdim=True) * moving
        return force if apart else force.sum(0, keepdim=True)
