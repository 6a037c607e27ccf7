"""VICReg with the statistics of the global batch (Bardes et al., arXiv 2105.04906)."""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import PairLoss, in_full_precision


class StatisticsLoss(PairLoss):
    """Base of the losses of means and covariances of two views, over the rows of all ranks."""

    takes = "views"
    has_kernels = False

    def forward(self, view_a: Tensor, view_b: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Scalar loss; view_a, view_b: [b, D], row i of both from the same sample."""
        sizes = self.check_rows(sizes, view_a=view_a, view_b=view_b)
        num_rows = len(view_a) if self.keys_from == "local" else sum(sizes)
        # Mixed precision would multiply in bf16 what is then squared and summed.
        with torch.autocast(view_a.device.type, enabled=False):
            return self.compare(torch.stack(in_full_precision(view_a, view_b)), num_rows)

    @abstractmethod
    def compare(self, views: Tensor, num_rows: int) -> Tensor:
        """The loss of views [2, b, D], num_rows rows of which share their statistics."""

    def mean_of_ranks(self, loss: Tensor) -> Tensor:
        """A loss that every rank has computed from the same statistics, under the contract."""
        return self.mean(loss, 1)


def off_diagonal(matrices: Tensor) -> Tensor:
    """The entries off the diagonals of [..., D, D], flat."""
    dim = matrices.shape[-1]
    # Without the last one, lines of D + 1 entries begin with the diagonal's. By a mask the host
    # would wait to know how many there are.
    lines = matrices.flatten(-2)[..., :-1].unflatten(-1, (dim - 1, dim + 1))
    return lines[..., 1:].flatten(-2)


class VICReg(StatisticsLoss):
    """Views agree; each dimension varies; no two dimensions vary together.

    Equals, on the rows of all ranks together::

        invariance = mse_loss(a, b)
        variance   = mean(relu(1 - sqrt(a.var(0) + eps))), averaged over a and b
        covariance = off_diagonal(cov(a)).pow(2).sum() / D, summed over a and b
        loss = 25 * invariance + 25 * variance + covariance

    with variances and covariances over B - 1 (equations 1 to 6). No pair of samples is compared:
    ``gather`` and ``ring`` are the same here, and memory is that of [D, D].

    Collectives: two all-reduces of [2, 1, D] and [2, D, D], and one of two numbers; backward those
    of the first two.
    """

    class Config(StatisticsLoss.Config):
        """Views agree, dimensions vary, and not together."""

        name: Literal["vicreg"] = "vicreg"
        invariance_weight: NonNegativeFloat = 25.0
        """Weight of the distance between the two views."""
        variance_weight: NonNegativeFloat = 25.0
        """Weight of the hinge on the standard deviation of each dimension."""
        covariance_weight: NonNegativeFloat = 1.0
        """Weight of the covariances between dimensions."""
        eps: PositiveFloat = 1e-4
        """Is added to variances."""

        def check_run(self) -> None:
            """Some weight is not 0."""
            super().check_run()
            if not (self.invariance_weight or self.variance_weight or self.covariance_weight):
                raise ValueError("all weights are 0, which leaves nothing to learn; give one")

    settings: Config

    def compare(self, views: Tensor, num_rows: int) -> Tensor:
        """Loss of views [2, b, D]; num_rows rows share their statistics."""
        a, b = views
        invariance = self.mean((a - b).square().sum(), a.numel())
        centred = views - self.over_ranks(views.sum(1, keepdim=True)) / num_rows
        cov = self.over_ranks(centred.transpose(1, 2) @ centred) / (num_rows - 1)  # [2, D, D]
        std = (cov.diagonal(dim1=1, dim2=2) + self.settings.eps).sqrt()
        variance = torch.relu(1 - std).mean(1).sum() / 2
        covariance = off_diagonal(cov).square().sum() / cov.shape[-1]
        weights = self.settings
        statistics = weights.variance_weight * variance + weights.covariance_weight * covariance
        return weights.invariance_weight * invariance + self.mean_of_ranks(statistics)
