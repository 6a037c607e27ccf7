"""Decoupled contrastive loss over the global batch (Yeh et al., arXiv 2110.06848, equation 6)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.ntxent import NTXent
from dist_contrastive.pairwise import LogSumExp, Pairs


class DCL(NTXent):
    """NT-Xent whose denominator leaves the positive out: it no longer holds back its own gradient.

    Equals, on the rows of all ranks together::

        z, sample = normalize(cat([view_a, view_b])), arange(B).repeat(2)
        scores = z @ z.T / temperature
        positive = scores[arange(2 * B), (arange(2 * B) + B) % (2 * B)]
        negative = scores.masked_fill(sample[:, None] == sample, -inf).logsumexp(1)
        loss = (negative - positive).mean()

    Collectives are those of `NTXent`.
    """

    reduction = LogSumExp(leave_out="similar")
    is_cross_entropy = False

    class Config(NTXent.Config):
        """Decoupled contrastive loss."""

        name: Literal["dcl"] = "dcl"  # type: ignore[assignment]
        temperature: PositiveFloat = 0.1

    settings: Config

    def compared(self, views: Tensor, sizes: Sizes) -> Pairs:
        """All pairs of views [2 * b, D]; those of one sample are similar."""
        rank = collectives.rank(self.group)
        sample = sum(sizes[:rank]) + torch.arange(sizes[rank], device=views.device)
        return replace(super().compared(views, sizes), tags=sample.repeat(2))
