"""KoLeo over the global batch (Sablayrolles et al., arXiv 1806.03198, equation 2; DINOv2)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import PairLoss, normalised
from dist_contrastive.pairwise import (
    DISTANCES,
    Pairs,
    choose,
    extremes,
    fetch,
)
from dist_contrastive.pairwise.chosen import Search, extreme_distances
from dist_contrastive.pairwise.distances import bounded
from dist_contrastive.pairwise.kernel_calls import unfit_rows


class KoLeo(PairLoss):
    """Every embedding moves away from its nearest neighbour: a uniform spread over the sphere.

    Equals, on the rows of all ranks together::

        z = normalize(features)
        nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
        loss = -log(pairwise_distance(z, z[nearest], eps) + eps).mean()

    No matrix of scores is kept, whatever ``impl`` is.

    Collectives: one round over the keys, and the fetch of one neighbour a row, or by kernels
    another round in backward.
    """

    takes = "features"

    class Config(PairLoss.Config):
        """Every embedding moves away from its nearest neighbour."""

        name: Literal["koleo"] = "koleo"
        eps: PositiveFloat = 1e-8
        """Keeps the logarithm finite where embeddings coincide."""

    settings: Config

    def forward(self, features: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Scalar loss; features: [b, D]."""
        sizes = self.check_rows(sizes, features=features)
        first, device = sum(sizes[: collectives.rank(self.group)]), features.device
        number = first + torch.arange(len(features), device=device)
        pairs = self.pairs(features, features, sizes, tags=number)  # similar to itself alone
        num_scores = max(pairs.sizes) * pairs.num_keys
        with torch.autocast(device.type, enabled=False):
            unfit = unfit_rows(pairs.rows, pairs.keys)
            how = choose(self.impl, num_scores, unfit, features.is_cuda)
            d = self._by_kernels(pairs) if how == "triton" else self._in_tiles(pairs)
        d = bounded(d, d)  # of equal rows there is no way apart
        return self.mean(-(d + self.settings.eps).log().sum(), len(d))

    def _by_kernels(self, pairs: Pairs) -> Tensor:
        """Distances to nearest neighbours [b], of rows of unit length."""
        search = Search("euclidean", farthest=False, unit=True, eps=self.settings.eps)
        return extreme_distances(pairs, search)[0]

    def _in_tiles(self, pairs: Pairs) -> Tensor:
        """The same in plain torch."""
        (z,) = normalised(pairs.rows)
        pairs = replace(pairs, rows=z, keys=z)
        _, nearest = extremes(pairs, DISTANCES["euclidean"], self.chunk_size)
        neighbours = fetch(pairs, nearest.number)
        return torch.nn.functional.pairwise_distance(z, neighbours, eps=self.settings.eps)
