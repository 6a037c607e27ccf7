"""VICReg with the statistics of the global batch (Bardes et al., arXiv 2105.04906)."""

from typing import Unpack

import torch
from torch import Tensor

from dist_contrastive.losses.base import PairOptions, at_least, positive
from dist_contrastive.losses.statistics import StatisticsLoss, off_diagonal


class VICReg(StatisticsLoss):
    """Views agree; each dimension varies; no two dimensions vary together.

    Equals, on the rows of all ranks together::

        invariance = mse_loss(a, b)
        variance   = mean(relu(1 - sqrt(a.var(0) + eps))), averaged over a and b
        covariance = off_diagonal(cov(a)).pow(2).sum() / D, summed over a and b
        loss = 25 * invariance + 25 * variance + covariance

    with variances and covariances over B - 1 (equations 1 to 6). No pair of samples is compared:
    ``gather`` and ``ring`` are the same here, and memory is that of [D, D].

    Args:
        invariance_weight, variance_weight, covariance_weight: 0 or more.
        eps: is added to variances; above 0.
        options: see `PairLoss`.

    Collectives: two all-reduces of [2, 1, D] and [2, D, D], and one of two numbers; backward those
    of the first two.
    """

    def __init__(
        self,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        eps: float = 1e-4,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(**options)
        weights = {"invariance_weight": invariance_weight, "variance_weight": variance_weight}
        at_least(0, **weights, covariance_weight=covariance_weight)
        positive(eps=eps)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.eps = eps

    def compare(self, views: Tensor, num_rows: int) -> Tensor:
        """See `StatisticsLoss`."""
        a, b = views
        invariance = self.mean((a - b).square().sum(), a.numel())
        centred = views - self.over_ranks(views.sum(1, keepdim=True)) / num_rows
        cov = self.over_ranks(centred.transpose(1, 2) @ centred) / (num_rows - 1)  # [2, D, D]
        std = (cov.diagonal(dim1=1, dim2=2) + self.eps).sqrt()
        variance = torch.relu(1 - std).mean(1).sum() / 2
        covariance = off_diagonal(cov).square().sum() / cov.shape[-1]
        statistics = self.variance_weight * variance + self.covariance_weight * covariance
        return self.invariance_weight * invariance + self.mean_of_ranks(statistics)
