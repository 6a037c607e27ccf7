"""The self-diagonal loss over the global batch (seed of this project)."""

from typing import Unpack

from torch import Tensor

from dist_contrastive.losses.base import PairLoss, PairOptions, Scale, normalised
from dist_contrastive.losses.inputs import exchange_sizes
from dist_contrastive.pairwise import LogSumExp


class SelfDiagonal(PairLoss):
    """Cross-entropy that makes every embedding find itself.

    Equals, on the rows of all ranks together::

        z = normalize(features)
        loss = cross_entropy(z @ z.T / temperature, arange(B))

    A row's positive is the row itself, so the positive term is the constant 1 / temperature, and
    what is left is repulsion: embeddings spread evenly over the sphere. Nothing is drawn together;
    with a second view as keys it becomes `InfoNCE`.

    Args:
        temperature: divides the similarities; above 0.
        learnable: the temperature is a parameter, kept as ``log(1 / temperature)``.
        options: see `PairLoss`.

    Collectives: those of one `pairwise.reduce`.
    """

    takes = "features"

    def __init__(
        self, temperature: float = 0.1, learnable: bool = False, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(**options)
        self.scale = Scale(temperature, learnable)

    def forward(self, features: Tensor) -> Tensor:
        """Scalar loss; features: [b, D]."""
        sizes = exchange_sizes(self.group, {"features": features})["features"]
        self.check_batch(sizes)
        (z,) = normalised(features)
        scaled = z * self.scale()
        (row_lse,), _ = self.reduce(LogSumExp(), self.pairs(scaled, z, sizes))
        return self.mean((row_lse - (scaled * z).sum(-1)).sum(), len(z))
