"""Triplet sums from panels: the distances of a few rows to all keys at a time.

Which triplets count depends on all distances of a row at once, so what is kept at a time is not a
tile but a panel: the fewer rows, the more keys there are. Memory is linear in the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.distances import Distance
from dist_contrastive.pairwise.keys import SUM, KeySource, gathered, open_keys
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.saved import recall, remember
from dist_contrastive.pairwise.triplets import TripletWeights

# Scores of a panel; some ten arrays of this size are in use at a time.
_PANEL_SCORES = 2**19


@dataclass(frozen=True)
class Mining:
    """Which triplets count."""

    weigh: Callable[[Tensor, Tensor, Tensor, float], TripletWeights]
    distance: Distance
    margin: float

    def __call__(self, pairs: Pairs, r: slice, d: Tensor, tags: Tensor) -> TripletWeights:
        """Triplet weights from the distances d [r, B] of rows r to all keys, and the keys' tags."""
        positive, negative = pairs.positive_and_negative(r, 0, tags)
        return self.weigh(d, positive, negative, self.margin)

    def total(self, weights: TripletWeights, d: Tensor) -> Tensor:
        """Sum over triplets; large weights of both signs cancel, hence fp64."""
        margins = self.margin * weights.active.sum().double()
        return (weights.weight.double() * d.double()).sum() + margins


Sums = tuple[Tensor, Tensor, Tensor]


def dense_triplet_sums(mining: Mining, pairs: Pairs) -> Sums:
    """`triplet_sums` on the whole matrix, with autograd: the specification."""
    assert pairs.tags is not None, "triplets need tags"
    keys, tags = gathered(pairs, pairs.keys), gathered(pairs, pairs.tags)
    d = mining.distance.dense(pairs.rows, keys)
    weights = mining(pairs, slice(0, len(d)), d.detach(), tags)
    total = mining.total(weights, d).to(d.dtype)
    return total, weights.active.sum(), weights.valid.sum()


def triplet_sums(mining: Mining, pairs: Pairs, panel_rows: int | None) -> Sums:
    """Sum of the triplets of this rank's rows, differentiable; how many are active, and valid.

    Args:
        pairs: rows and keys prepared by the distance; tags tell what is similar.
        panel_rows: rows of a panel; None chooses.

    Collectives: gather: those of one gather of the keys; ring: a round over the keys for every
    panel of rows, in backward two.
    """
    return _TripletSums.apply(pairs.rows, pairs.keys, mining, pairs, panel_rows)


class _TripletSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, mining: Mining, pairs: Pairs, panel_rows: int | None
    ) -> Sums:
        source = open_keys(pairs)
        total = rows.new_zeros((), dtype=torch.float64)
        active, valid = (torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(2))
        for _, d, weights in _panels(mining, pairs, source, panel_rows):
            total += mining.total(weights, d)
            active += weights.active.sum()
            valid += weights.valid.sum()
        remember(ctx, pairs, source)
        ctx.mining, ctx.panel_rows = mining, panel_rows
        ctx.mark_non_differentiable(active, valid)
        return total.to(rows.dtype), active, valid

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        (pairs, held, _), distance = recall(ctx), ctx.mining.distance
        source = held or open_keys(pairs)
        grad_rows, grad_keys = torch.zeros_like(pairs.rows), torch.zeros_like(pairs.keys)
        with torch.autocast(grad.device.type, enabled=False):
            for r, d, weights in _panels(ctx.mining, pairs, source, ctx.panel_rows):
                weight = weights.weight * grad
                over_ranks = source.reduction(SUM)
                for block in source.blocks():
                    k = block.span
                    by_rows, by_keys = distance.gradients(
                        pairs.rows[r], block.keys, d[:, k], weight[:, k]
                    )
                    grad_rows[r] += by_rows
                    over_ranks.add((by_keys,))
                grad_keys += over_ranks.finish()[0]
        return grad_rows, grad_keys, None, None, None


def _panels(
    mining: Mining, pairs: Pairs, source: KeySource, panel_rows: int | None
) -> Iterator[tuple[slice, Tensor, TripletWeights]]:
    """Row slices with distances [r, B] to all keys and weights. All ranks have the same number of
    panels, those with fewer rows empty ones at the end: each may be a ring exchange of keys."""
    assert pairs.tags is not None, "triplets need tags"
    tags = pairs.tags.new_empty(pairs.num_keys, *pairs.tags.shape[1:])
    size = panel_rows or max(1, _PANEL_SCORES // max(1, pairs.num_keys))
    for begin in range(0, max(pairs.sizes), size):
        r = slice(min(begin, len(pairs.rows)), min(begin + size, len(pairs.rows)))
        d = pairs.rows.new_empty(r.stop - r.start, pairs.num_keys)
        for block in source.blocks():
            assert block.tags is not None, "triplets need tags"
            d[:, block.span] = mining.distance.tile(pairs.rows[r], block.keys)
            tags[block.span] = block.tags
        yield r, d, mining(pairs, r, d, tags)
