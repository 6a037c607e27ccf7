"""The maths of a tile: what a loss keeps of each row and key, and the slope by each score.

A reduction states in `parts` what it keeps, in plain torch; on the whole matrix, with autograd,
that is its specification. `slope` is the derivative, computed on a tile once the totals are known.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_contrastive.pairwise.keys import LOGSUMEXP, SUM, Join
from dist_contrastive.pairwise.pairs import Tile

Parts = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
Joins = tuple[tuple[Join, ...], tuple[Join, ...]]


@dataclass(frozen=True)
class Totals:
    """What a tile's rows [r, 1] and keys [k] have come to, and the loss's slope by that."""

    rows: tuple[Tensor, ...]
    row_slopes: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    key_slopes: tuple[Tensor, ...]


class Reduction(ABC):
    """A reduction of the score matrix to numbers per row and per key."""

    @property
    @abstractmethod
    def joins(self) -> Joins:
        """How results of several tiles become one, for each number of a row, and of a key."""

    @abstractmethod
    def parts(self, tile: Tile) -> Parts:
        """What the tile adds to its rows, each [r], and to its keys, each [k]."""

    def fast_parts(self, tile: Tile) -> Parts:
        """The same, where there is a faster way without autograd."""
        return self.parts(tile)

    @abstractmethod
    def slope(self, tile: Tile, totals: Totals) -> Tensor:
        """Derivative of the loss by each score: [r, k]; may overwrite the scores."""


class PairSum(Reduction):
    """Sum over keys of a function of each pair."""

    @property
    def joins(self) -> Joins:
        """See `Reduction`."""
        return (SUM,), ()

    @abstractmethod
    def value(self, tile: Tile) -> Tensor:
        """The function: [r, k]."""

    @abstractmethod
    def derivative(self, tile: Tile) -> Tensor:
        """Its derivative by the score: [r, k]."""

    def parts(self, tile: Tile) -> Parts:
        """See `Reduction`."""
        return (self.value(tile).sum(1),), ()

    def slope(self, tile: Tile, totals: Totals) -> Tensor:
        """See `Reduction`."""
        (slope,) = totals.row_slopes
        return self.derivative(tile) * slope


@dataclass(frozen=True)
class LogSumExp(Reduction):
    """``log(sum(exp(score)))`` over the keys of each row, and over the rows of each key.

    Args:
        leave_out: pairs that do not count: a row and its ``own`` key, or all ``similar`` ones.
        both: also over the rows of each key.
    """

    leave_out: Literal["nothing", "own", "similar"] = "nothing"
    both: bool = False

    @property
    def joins(self) -> Joins:
        """See `Reduction`."""
        return (LOGSUMEXP,), (LOGSUMEXP,) if self.both else ()

    def _counted(self, tile: Tile) -> Tensor:
        """Scores, -inf where a pair does not count."""
        out = {"nothing": None, "own": tile.own, "similar": tile.similar}[self.leave_out]
        return tile.scores if out is None else tile.scores.masked_fill(out, -torch.inf)

    def parts(self, tile: Tile) -> Parts:
        """See `Reduction`."""
        scores = self._counted(tile)
        return (scores.logsumexp(1),), (scores.logsumexp(0),) if self.both else ()

    def fast_parts(self, tile: Tile) -> Parts:
        """See `Reduction`; each exponential serves both directions."""
        if not self.both or not tile.scores.numel():
            return self.parts(tile)
        scores = self._counted(tile)
        shift = scores.max()
        weights = (scores - shift).exp_()
        sums = weights.sum(1), weights.sum(0)
        # Below this a row or key far from the tile's largest score has lost its digits.
        if not min(x.min() for x in sums) > _LEAST_SUM[scores.dtype]:
            return self.parts(tile)
        row, key = (x.log_().add_(shift) for x in sums)
        return (row,), (key,)

    def slope(self, tile: Tile, totals: Totals) -> Tensor:
        """See `Reduction`: the softmax weights of both directions."""
        scores = self._counted(tile)
        (row_lse, *_), (by_row, *_) = totals.rows, totals.row_slopes
        if not self.both:
            return _softmax(scores, row_lse).mul_(by_row)
        (key_lse,), (by_key,) = totals.keys, totals.key_slopes
        # exp(score - lse) of both directions is one exponential times a factor, as long as that
        # factor and the exponential keep their digits.
        shift = row_lse.max()
        factors = (shift - row_lse), (shift - key_lse)
        if not max(x.abs().max() for x in factors) <= _MOST_SPREAD:  # NaN where nothing counts
            return _softmax(scores, row_lse) * by_row + _softmax(scores, key_lse) * by_key
        factor = by_row * factors[0].exp() + by_key * factors[1].exp()
        return (scores - shift).exp_().mul_(factor)


# A sum of 2**20 terms, each of which may have lost up to the smallest normal number.
_LEAST_SUM = {
    dtype: torch.finfo(dtype).tiny * 2**20 / torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.float64)
}
_MOST_SPREAD = 30.0


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(score - lse), 0 for rows or keys that have nothing to be compared with."""
    return (scores - torch.where(lse == -torch.inf, torch.inf, lse)).exp_()


@dataclass(frozen=True)
class LogSumExpAndPositives(LogSumExp):
    """`LogSumExp` of each row, and the sum and the number of its positives' scores."""

    @property
    def joins(self) -> Joins:
        """See `Reduction`: log-sum-exp, sum of positive scores, number of positives."""
        return (LOGSUMEXP, SUM, SUM), ()

    def parts(self, tile: Tile) -> Parts:
        """See `Reduction`."""
        positive = tile.positive().to(tile.scores.dtype)
        (lse,), keys = super().parts(tile)
        return (lse, (tile.scores * positive).sum(1), positive.sum(1)), keys

    def fast_parts(self, tile: Tile) -> Parts:
        """See `Reduction`."""
        return self.parts(tile)

    def slope(self, tile: Tile, totals: Totals) -> Tensor:
        """See `Reduction`."""
        _, by_sum, _ = totals.row_slopes
        return super().slope(tile, totals) + tile.positive() * by_sum
