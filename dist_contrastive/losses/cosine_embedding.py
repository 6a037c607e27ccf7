"""Cosine embedding loss over all pairs of the global batch (seed of this project)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import not_below_zero
from dist_contrastive.losses.supcon import LabelledLoss
from dist_contrastive.pairwise import PairSum, Tile


class CosineEmbedding(LabelledLoss):
    """Similar pairs become parallel, dissimilar ones are pushed apart until a margin.

    Equals, on the rows of all ranks together, with S = z @ z.T and z = normalize(features), the
    mean over all ordered pairs i != j of::

        1 - S[i, j]                  where i and j are similar        (y = +1)
        max(0, S[i, j] - margin)     where they are not               (y = -1)

    which is the mean of torch's ``cosine_embedding_loss`` over these pairs.

    Collectives: those of one `pairwise.reduce`.
    """

    class Config(LabelledLoss.Config):
        """Similar pairs become parallel, others are pushed apart until a margin."""

        name: Literal["cosine_embedding"] = "cosine_embedding"
        margin: float = Field(default=0.5, ge=-1, le=1)
        """Cosine similarity up to which dissimilar pairs cost nothing."""

        def learns(self, similar: bool, dissimilar: bool) -> bool:
            """Pairs of either kind, but no cosine is beyond a margin of 1."""
            return similar or (dissimilar and self.margin < 1)

    settings: Config

    def forward(
        self, features: Tensor, labels: Tensor | None = None, sizes: Sizes | None = None
    ) -> Tensor:
        """Scalar loss.

        Args:
            features: [b, D], or [b, V, D] for V views of every sample.
            labels: [b] integers or floats, see `LabelledLoss`; None: views alone are similar.
            sizes: b of every rank, of inputs that have been checked.
        """
        features, tags, sizes = self.points(features, labels, sizes)
        max_delta = self.settings.max_delta or 0.0
        pairs = self.pairs(features, features, sizes, tags, max_delta, scale=1.0)
        (row_sum,), _ = self.reduce(_Embedding(self.settings.margin), pairs)
        return self.mean(not_below_zero(row_sum).sum(), len(features) * (pairs.num_keys - 1))


@dataclass(frozen=True)
class _Embedding(PairSum):
    """1 - S of similar pairs, max(0, S - margin) of others, nothing of a row with itself."""

    margin: float

    @property
    def expression(self) -> tuple[str, float]:
        return "cosine_embedding", self.margin

    def value(self, tile: Tile) -> Tensor:
        apart = (tile.scores - self.margin).clamp(min=0)
        return tile.without_own(torch.where(_similar(tile), 1 - tile.scores, apart))

    def derivative(self, tile: Tile) -> Tensor:
        apart = (tile.scores > self.margin).to(tile.scores.dtype)
        return tile.without_own(torch.where(_similar(tile), -1.0, apart))


def _similar(tile: Tile) -> Tensor:
    assert tile.similar is not None, "similar pairs need tags"
    return tile.similar
