"""Barlow Twins with the statistics of the global batch (Zbontar et al., arXiv 2103.03230)."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from dist_contrastive.losses.vicreg import StatisticsLoss, off_diagonal


class BarlowTwins(StatisticsLoss):
    """The correlations between the dimensions of two views approach the identity.

    Equals, on the rows of all ranks together::

        a, b = batch_norm(view_a), batch_norm(view_b)        without affine parameters
        c = a.T @ b / B
        loss = (c.diagonal() - 1).pow(2).sum() + redundancy_weight * off_diagonal(c).pow(2).sum()

    (equations 1 and 2). No pair of samples is compared: ``gather`` and ``ring`` are the same here,
    and memory is that of [D, D].

    Collectives: three all-reduces, two of [2, 1, D] and one of [D, D]; backward the same.
    """

    class Config(StatisticsLoss.Config):
        """The correlations between the dimensions of two views approach the identity."""

        name: Literal["barlow_twins"] = "barlow_twins"
        redundancy_weight: NonNegativeFloat = 5e-3
        """The paper's lambda."""
        eps: PositiveFloat = 1e-5
        """Is added to variances."""

    settings: Config

    def compare(self, views: Tensor, num_rows: int) -> Tensor:
        """Loss of views [2, b, D]; num_rows rows share their statistics."""
        centred = views - self.over_ranks(views.sum(1, keepdim=True)) / num_rows
        variance = self.over_ranks(centred.square().sum(1, keepdim=True)) / num_rows
        a, b = centred / (variance + self.settings.eps).sqrt()
        c = self.over_ranks(a.T @ b) / num_rows
        redundancy = off_diagonal(c).square().sum()
        return self.mean_of_ranks(
            (c.diagonal() - 1).square().sum() + self.settings.redundancy_weight * redundancy
        )
