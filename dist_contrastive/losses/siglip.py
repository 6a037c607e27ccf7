"""The sigmoid loss over the global batch (SigLIP, Zhai et al., arXiv 2303.15343, equation 1)."""

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dist_contrastive import collectives
from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.scale import SCALES, Scale, check_start
from dist_contrastive.pairwise import PairSum, Tile


class SigLIP(PairLoss):
    """Every pair is a binary classification of its own: does this key belong to this row?

    Equals, on the rows of all ranks together::

        logits = scale * normalize(a) @ normalize(b).T + bias
        loss = -logsigmoid((2 * eye(B) - 1) * logits).sum() / B

    Collectives: those of one `pairwise.reduce`.
    """

    takes = "views"

    class Config(PairLoss.Config):
        """Every pair of views is a binary classification of its own."""

        name: Literal["siglip"] = "siglip"
        scale: PositiveFloat = 10.0
        """Multiplies the similarities."""
        bias: float = -10.0
        """Is added to them."""
        learnable: bool = True
        """Whether both are parameters, the scale as its logarithm."""

        def check_run(self) -> None:
            """A learnable scale must start where the clamp leaves it."""
            super().check_run()
            if self.learnable:
                check_start("scale", self.scale, *SCALES)

    settings: Config

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        learnable, bias = self.settings.learnable, self.settings.bias
        self.scale = Scale(1 / self.settings.scale, learnable)
        self.bias = nn.Parameter(torch.tensor([bias])) if learnable else bias

    def forward(self, a: Tensor, b: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Scalar loss; a, b: [b, D], row i of both from the same sample."""
        sizes = self.check_rows(sizes, a=a, b=b)
        dtype = collectives.accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
        if isinstance(self.bias, Tensor):
            bias = self.bias.to(dtype)
        else:  # filled in, since a copy from the host would wait
            bias = a.new_full((1,), self.bias, dtype=dtype)
        pairs = self.pairs(a, b, sizes, bias=bias, scale=self.scale())
        (negatives, scores), _ = self.reduce(_Negatives(), pairs, partners=0)
        return self.mean((negatives - logsigmoid(scores + bias)).sum(), len(a))


class _Negatives(PairSum):
    """-logsigmoid(-score) of every pair but a row and its own key."""

    expression = "softplus", 0.0

    def value(self, tile: Tile) -> Tensor:
        return tile.without_own(-logsigmoid(-tile.scores))

    def derivative(self, tile: Tile) -> Tensor:
        return tile.without_own(tile.scores.sigmoid())
