"""KoLeo over the global batch (Sablayrolles et al., arXiv 1806.03198, equation 2; DINOv2)."""

from typing import Unpack

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.losses.base import PairLoss, PairOptions, normalised, positive
from dist_contrastive.losses.inputs import exchange_sizes
from dist_contrastive.pairwise import DISTANCES, extremes, fetch


class KoLeo(PairLoss):
    """Every embedding moves away from its nearest neighbour: a uniform spread over the sphere.

    Equals, on the rows of all ranks together::

        z = normalize(features)
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
        loss = -log(pairwise_distance(z, z[nearest], eps) + eps).mean()

    Args:
        eps: keeps the logarithm finite where embeddings coincide; above 0.
        options: see `PairLoss`. ``impl`` is of no matter: no matrix of scores is kept.

    Collectives: one round over the keys, and the fetch of one neighbour a row.
    """

    takes = "features"

    def __init__(self, eps: float = 1e-8, **options: Unpack[PairOptions]) -> None:
        super().__init__(**options)
        positive(eps=eps)
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Scalar loss; features: [b, D]."""
        sizes = exchange_sizes(self.group, {"features": features})["features"]
        self.check_batch(sizes)
        (z,) = normalised(features)
        number = sum(sizes[: collectives.rank(self.group)]) + torch.arange(len(z), device=z.device)
        pairs = self.pairs(z, z, sizes, tags=number)  # similar to itself alone
        with torch.autocast(z.device.type, enabled=False):
            _, nearest = extremes(pairs, DISTANCES["euclidean"], self.chunk_size)
        d = torch.nn.functional.pairwise_distance(z, fetch(pairs, nearest.number), eps=self.eps)
        return self.mean(-(d + self.eps).log().sum(), len(z))
