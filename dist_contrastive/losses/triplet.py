"""Triplet loss over the global batch (Schroff et al., arXiv 1503.03832; Hermans et al., 1703.07737;
seed of this project)."""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import in_full_precision
from dist_contrastive.losses.supcon import LabelledLoss
from dist_contrastive.pairwise import (
    DISTANCES,
    WEIGHTS,
    DistanceName,
    Mining,
    Pairs,
    choose,
    dense_triplet_sums,
    extremes,
    fetch,
    triplet_sums,
)
from dist_contrastive.pairwise.chosen import Search, extreme_distances
from dist_contrastive.pairwise.kernel_calls import unfit_rows
from dist_contrastive.pairwise.mined import MinedTriplets, mined_sums

MiningName = Literal["all", "hard", "semihard"]


class Triplet(LabelledLoss):
    """An anchor is nearer to its positives than to its negatives, by a margin.

    Equals, on the rows of all ranks together, with d the distances of all rows, the mean of
    ``relu(d[a, p] - d[a, n] + margin)`` over

        ``all``       all triplets of an anchor a, a positive p and a negative n;
        ``hard``      one for every anchor: its farthest positive and its nearest negative;
        ``semihard``  one for every anchor and positive: its nearest negative farther than that
                      positive, or if there is none its farthest negative.

    Triplets that keep the margin count as 0 in the mean; anchors without a positive or without a
    negative do not count. A batch without a triplet, as one of a single class, gives 0 and no
    gradient; ``metrics`` has the numbers of ``valid_triplets`` and of ``active_triplets``, which
    break the margin.

    ``chunk_size`` is the rows and keys of a tile (``hard``), or the rows whose distances to all
    keys are kept at a time.

    Collectives: an all-reduce of two numbers, and with ``dense`` those of one gather of the keys;
    otherwise ``hard`` those of one round over the keys and of the fetch of two keys a row, and the
    others those of `pairwise.triplet_sums`.
    """

    class Config(LabelledLoss.Config):
        """An embedding is nearer to similar ones than to others, by a margin."""

        name: Literal["triplet"] = "triplet"
        margin: NonNegativeFloat = 0.2
        """In units of the distance."""
        distance: DistanceName = "euclidean"
        """euclidean and squared_euclidean of the features as they are, cosine of their angles."""
        mining: MiningName = "all"
        """Triplets that count: all, of each anchor the hard one, or of each anchor and positive the
        semihard one."""

        def learns(self, similar: bool, dissimilar: bool) -> bool:
            """A triplet has one of each."""
            return similar and dissimilar

    settings: Config

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        chosen = self.settings
        self.mining = Mining(WEIGHTS[chosen.mining], DISTANCES[chosen.distance], chosen.margin)

    def forward(
        self, features: Tensor, labels: Tensor | None = None, sizes: Sizes | None = None
    ) -> Tensor:
        """Scalar loss.

        Args:
            features: [b, D], or [b, V, D] for V views of every sample.
            labels: [b] integers or floats, see `LabelledLoss`; None: views alone are positives.
            sizes: b of every rank, of inputs that have been checked.
        """
        features, tags, sizes = self.points(features, labels, sizes)
        with torch.autocast(features.device.type, enabled=False):
            pairs = self.pairs(features, features, sizes, tags, self.settings.max_delta or 0.0)
            total, active, valid = self._sums(pairs)
        self.report_counts(valid_triplets=valid, active_triplets=active)
        return self.mean(total, valid)

    def _sums(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        num_scores = max(pairs.sizes) * pairs.num_keys
        unfit = unfit_rows(pairs.rows, pairs.keys)
        how = choose(self.impl, num_scores, unfit, pairs.rows.is_cuda)
        if how == "triton":
            return self._sums_by_kernels(pairs)
        x = self.mining.distance.prepare(*in_full_precision(pairs.rows))
        pairs = replace(pairs, rows=x, keys=x)
        if how == "dense" and self.keys_from != "ring":
            return dense_triplet_sums(self.mining, pairs)
        if self.settings.mining == "hard":
            return self._hard_sums(pairs)
        panel_rows = max(pairs.sizes) if how == "dense" else self.chunk_size
        return triplet_sums(self.mining, pairs, panel_rows)

    def _hard_sums(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over hard triplets, whose keys are searched in tiles and fetched with gradients."""
        distance, margin = self.mining.distance, self.mining.margin
        farthest, nearest = extremes(pairs, distance, self.chunk_size)
        is_valid = farthest.exists & nearest.exists
        keys = fetch(pairs, torch.cat([farthest.number, nearest.number]))
        keys = keys.unflatten(0, (2, len(pairs.rows)))
        positive, negative = (distance.rowwise(pairs.rows, of_kind) for of_kind in keys)
        return _hard_losses(positive, negative, margin, is_valid)

    def _sums_by_kernels(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        mining, distance, margin = self.settings.mining, self.settings.distance, self.mining.margin
        if mining != "hard":
            return mined_sums(MinedTriplets(mining, distance, margin), pairs, self.chunk_size)
        negative, positive = extreme_distances(pairs, Search(distance, farthest=True))
        is_valid = negative.isfinite() & positive.isfinite()
        return _hard_losses(positive, negative, margin, is_valid)


def _hard_losses(
    positive: Tensor, negative: Tensor, margin: float, is_valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of their hard triplet's loss; how many are active, and valid."""
    difference = torch.where(is_valid, positive - negative, -torch.inf)
    loss = torch.relu(difference + margin)
    return loss.sum(), (loss > 0).sum(), is_valid.sum()
