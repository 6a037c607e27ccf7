"""The sigmoid loss over the global batch (SigLIP, Zhai et al., arXiv 2303.15343, equation 1)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dist_contrastive import collectives
from dist_contrastive.collectives import Ids, Sizes
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.false_negatives import id_tags
from dist_contrastive.losses.scale import SCALES, Scale, check_start
from dist_contrastive.pairwise import PairSum, Tile


class SigLIP(PairLoss):
    """Every pair is a binary classification of its own: does this key belong to this row?

    Equals, on the rows of all ranks together::

        logits = scale * normalize(a) @ normalize(b).T + bias
        loss = -logsigmoid((2 * eye(B) - 1) * logits)[counts].sum() / B

    where all pairs count but those of two samples of equal ids, if there are ids.

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

    def forward(
        self, a: Tensor, b: Tensor, sizes: Sizes | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        """Scalar loss.

        Args:
            a, b: [b, D], row i of both from the same sample.
            sizes: of inputs that have been checked, see `PairLoss.check_rows`.
            ids: [b] integers from 0 of the samples, -1 for none: others of a row's id are no
                negatives of it.
        """
        ids = collectives.as_labels(ids)
        sizes = self.check_rows(sizes, a=a, b=b, ids=Ids(ids, "n", optional=True))
        tags = None if ids is None else id_tags(ids, sizes, a.device, self.group)
        dtype = collectives.accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
        if isinstance(self.bias, Tensor):
            bias = self.bias.to(dtype)
        else:  # filled in, since a copy from the host would wait
            bias = a.new_full((1,), self.bias, dtype=dtype)
        pairs = self.pairs(a, b, sizes, tags, bias=bias, scale=self.scale())
        reduction = _Negatives("own" if ids is None else "similar")
        (negatives, scores), _ = self.reduce(reduction, pairs, partners=0)
        return self.mean((negatives - logsigmoid(scores + bias)).sum(), len(a))


@dataclass(frozen=True)
class _Negatives(PairSum):
    """-logsigmoid(-score) of every pair, but of a row and its own key, or of all similar ones."""

    leave_out: Literal["own", "similar"] = "own"

    expression = "softplus", 0.0

    def value(self, tile: Tile) -> Tensor:
        return self._counted(-logsigmoid(-tile.scores), tile)

    def derivative(self, tile: Tile) -> Tensor:
        return self._counted(tile.scores.sigmoid(), tile)

    def _counted(self, x: Tensor, tile: Tile) -> Tensor:
        if self.leave_out == "own":
            return tile.without_own(x)
        assert tile.similar is not None, "similar pairs need tags"
        return x.masked_fill(tile.similar, 0.0)
