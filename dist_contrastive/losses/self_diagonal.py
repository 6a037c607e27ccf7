"""The self-diagonal loss over the global batch (seed of this project)."""

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import TemperatureLoss, not_below_zero
from dist_contrastive.pairwise import LogSumExp


class SelfDiagonal(TemperatureLoss):
    """Cross-entropy that makes every embedding find itself.

    Equals, on the rows of all ranks together::

        z = normalize(features)
        loss = cross_entropy(z @ z.T / temperature, arange(B))

    A row's positive is the row itself, so the positive term is the constant 1 / temperature, and
    what is left is repulsion: embeddings spread evenly over the sphere. Nothing is drawn together;
    with a second view as keys it becomes `InfoNCE`.

    Collectives: those of one `pairwise.reduce`.
    """

    takes = "features"

    class Config(TemperatureLoss.Config):
        """Every embedding finds itself: pure repulsion."""

        name: Literal["self_diagonal"] = "self_diagonal"
        temperature: PositiveFloat = 0.1

    settings: Config

    def forward(self, features: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Scalar loss; features: [b, D]."""
        sizes = self.check_rows(sizes, features=features)
        pairs = self.pairs(features, features, sizes, scale=self.scale())
        (row_lse, own), _ = self.reduce(LogSumExp(), pairs, partners=0)
        return self.mean(not_below_zero(row_lse - own).sum(), len(features))
