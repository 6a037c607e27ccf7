"""Decoupled contrastive loss over the global batch (Yeh et al., arXiv 2110.06848, equation 6)."""

from typing import Unpack

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.losses.base import PairLoss, PairOptions, Scale, normalised
from dist_contrastive.losses.inputs import exchange_sizes
from dist_contrastive.pairwise import LogSumExp


class DCL(PairLoss):
    """NT-Xent whose denominator leaves the positive out: it no longer holds back its own gradient.

    Equals, on the rows of all ranks together::

        z, sample = normalize(cat([view_a, view_b])), arange(B).repeat(2)
        scores = z @ z.T / temperature
        positive = scores[arange(2 * B), (arange(2 * B) + B) % (2 * B)]
        negative = scores.masked_fill(sample[:, None] == sample, -inf).logsumexp(1)
        loss = (negative - positive).mean()

    Args:
        temperature: divides the similarities; above 0.
        learnable: the temperature is a parameter, kept as ``log(1 / temperature)``.
        options: see `PairLoss`.

    Collectives: those of one `pairwise.reduce` of both views.
    """

    def __init__(
        self, temperature: float = 0.1, learnable: bool = False, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(**options)
        self.scale = Scale(temperature, learnable)

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        """Scalar loss; view_a, view_b: [b, D], row i of both from the same sample."""
        sizes = exchange_sizes(self.group, {"view_a": view_a, "view_b": view_b})["view_a"]
        self.check_batch(sizes)
        first = sum(sizes[: collectives.rank(self.group)])
        sample = first + torch.arange(len(view_a), device=view_a.device)
        z = torch.cat(normalised(view_a, view_b))
        scaled = z * self.scale()
        pairs = self.pairs(scaled, z, tuple(2 * size for size in sizes), sample.repeat(2))
        (negative,), _ = self.reduce(LogSumExp(leave_out="similar"), pairs)
        positive = (scaled * z.roll(len(view_a), 0)).sum(-1)
        return self.mean((negative - positive).sum(), len(z))
