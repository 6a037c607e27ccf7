"""KoLeo over the global batch (Sablayrolles et al., arXiv 1806.03198, equation 2; DINOv2)."""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import PairLoss, normalised
from dist_contrastive.pairwise import DISTANCES, extremes, fetch
from dist_contrastive.pairwise.distances import bounded


class KoLeo(PairLoss):
    """Every embedding moves away from its nearest neighbour: a uniform spread over the sphere.

    Equals, on the rows of all ranks together::

        z = normalize(features)
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
        loss = -log(pairwise_distance(z, z[nearest], eps) + eps).mean()

    No matrix of scores is kept, whatever ``impl`` is.

    Collectives: one round over the keys, and the fetch of one neighbour a row.
    """

    takes = "features"
    has_kernels = False

    class Config(PairLoss.Config):
        """Every embedding moves away from its nearest neighbour."""

        name: Literal["koleo"] = "koleo"
        eps: PositiveFloat = 1e-8
        """Keeps the logarithm finite where embeddings coincide."""

    settings: Config

    def forward(self, features: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Scalar loss; features: [b, D]."""
        sizes = self.check_rows(sizes, features=features)
        (z,) = normalised(features)
        number = sum(sizes[: collectives.rank(self.group)]) + torch.arange(len(z), device=z.device)
        pairs = self.pairs(z, z, sizes, tags=number)  # similar to itself alone
        with torch.autocast(z.device.type, enabled=False):
            _, nearest = extremes(pairs, DISTANCES["euclidean"], self.chunk_size)
        neighbours = fetch(pairs, nearest.number)
        d = torch.nn.functional.pairwise_distance(z, neighbours, eps=self.settings.eps)
        d = bounded(d, d)  # of equal rows there is no way apart
        return self.mean(-(d + self.settings.eps).log().sum(), len(z))
