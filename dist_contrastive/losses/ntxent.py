"""NT-Xent over the global batch (SimCLR, Chen et al., arXiv 2002.05709, equation 1)."""

from typing import Unpack

import torch
from torch import Tensor

from dist_contrastive import pairwise
from dist_contrastive.losses.base import (
    PairLoss,
    PairOptions,
    Scale,
    check_batch,
    check_rows,
    normalised,
)


class NTXent(PairLoss):
    """Each view must find the other view of its sample among the 2B - 1 other views.

    Equals, on the rows of all ranks together::

        z = normalize(cat([view_a, view_b]))
        scores = (z @ z.T / temperature).fill_diagonal_(-inf)
        loss = cross_entropy(scores, (arange(2 * B) + B) % (2 * B))

    Args:
        temperature: divides the similarities; above 0.
        learnable: the temperature is a parameter, kept as ``log(1 / temperature)``.
        options: see `PairLoss`.

    Collectives: one gather of both views.
    """

    def __init__(
        self, temperature: float = 0.5, learnable: bool = False, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(**options)
        self.scale = Scale(temperature, learnable)

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        """Scalar loss; view_a, view_b: [b, D], row i of both from the same sample."""
        check_rows(view_a=view_a, view_b=view_b)
        z = normalised(torch.cat([view_a, view_b]))
        keys, offset = self.gather(z)
        check_batch(len(keys) // 2)
        scaled = z * self.scale()
        itself = offset + torch.arange(len(z), device=z.device)
        row_lse, _ = pairwise.logsumexp(scaled, keys, itself, self.impl, self.chunk_size)
        positive = (scaled * z.roll(len(view_a), 0)).sum(-1)
        return self.mean((row_lse - positive).sum(), len(z))
