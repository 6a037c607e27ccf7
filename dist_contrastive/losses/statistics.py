"""What losses of statistics over the whole batch share (they compare dimensions, not samples)."""

from abc import abstractmethod

import torch
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import PairLoss, in_full_precision


class StatisticsLoss(PairLoss):
    """Base of the losses of means and covariances of two views, over the rows of all ranks."""

    takes = "views"

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
    mask = ~torch.eye(matrices.shape[-1], dtype=torch.bool, device=matrices.device)
    return matrices[..., mask]
