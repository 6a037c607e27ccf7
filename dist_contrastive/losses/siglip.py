"""The sigmoid loss over the global batch (SigLIP, Zhai et al., arXiv 2303.15343, equation 1)."""

import math
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss, PairOptions, Scale, normalised
from dist_contrastive.losses.inputs import exchange_sizes
from dist_contrastive.pairwise import PairSum, Tile


class SigLIP(PairLoss):
    """Every pair is a binary classification of its own: does this key belong to this row?

    Equals, on the rows of all ranks together::

        logits = scale * normalize(a) @ normalize(b).T + bias
        loss = -logsigmoid((2 * eye(B) - 1) * logits).sum() / B

    Args:
        scale: multiplies the similarities; above 0. bias: is added to them.
        learnable: both are parameters, the scale as its logarithm.
        options: see `PairLoss`.

    Collectives: those of one `pairwise.reduce`.
    """

    takes = "views"

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        learnable: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(**options)
        if not 0 < scale < math.inf or not math.isfinite(bias):
            raise ConfigError(
                f"scale={scale} must be positive and bias={bias} finite, for instance 10 and -10"
            )
        self.scale = Scale(1 / scale, learnable)
        self.bias = nn.Parameter(torch.tensor([float(bias)])) if learnable else float(bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Scalar loss; a, b: [b, D], row i of both from the same sample."""
        sizes = exchange_sizes(self.group, {"a": a, "b": b})["a"]
        self.check_batch(sizes)
        x, y = normalised(a, b)
        # The bias as one more dimension, so that its gradient is that of any other.
        one = x.new_ones(len(x), 1)
        rows = torch.cat([x * self.scale(), one * self.bias], dim=1)
        keys = torch.cat([y, one], dim=1)
        (negatives,), _ = self.reduce(_Negatives(), self.pairs(rows, keys, sizes))
        positive = -logsigmoid((rows * keys).sum(-1))
        return self.mean((positive + negatives).sum(), len(x))


class _Negatives(PairSum):
    """-logsigmoid(-score) of every pair but a row and its own key."""

    def value(self, tile: Tile) -> Tensor:
        return tile.without_own(-logsigmoid(-tile.scores))

    def derivative(self, tile: Tile) -> Tensor:
        return tile.without_own(tile.scores.sigmoid())
