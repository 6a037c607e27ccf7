"""Reductions of a tile of scores to statistics of rows and keys, and their derivatives.

A reduction states in `parts` what it keeps, in plain torch; on the whole matrix, with autograd,
that is its specification. `grad_scores` is the derivative of a tile by its scores, once the
statistics over all tiles are known.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_contrastive.pairwise.exponentials import (
    LEAST_SUM,
    MOST_SPREAD,
    logsumexp,
    weighted_softmax,
    without,
)
from dist_contrastive.pairwise.keys import LOGSUMEXP, SUM, Join
from dist_contrastive.pairwise.pairs import Tile

Parts = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
Joins = tuple[tuple[Join, ...], tuple[Join, ...]]
LeaveOut = Literal["nothing", "own", "similar"]


@dataclass(frozen=True)
class Statistics:
    """Final statistics of a tile's rows [r, 1] and keys [k], and the loss's gradients by them."""

    rows: tuple[Tensor, ...]
    grad_rows: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    grad_keys: tuple[Tensor, ...]

    def of(self, r: slice, k: slice) -> "Statistics":
        """Those of a tile, of statistics that are [b] and [k] for rows and keys of a block."""
        rows, grad_rows = (tuple(x[r, None] for x in xs) for xs in (self.rows, self.grad_rows))
        keys, grad_keys = (tuple(x[k] for x in xs) for xs in (self.keys, self.grad_keys))
        return Statistics(rows, grad_rows, keys, grad_keys)


class Reduction(ABC):
    """Reduction of the score matrix to statistics per row and per key."""

    @property
    @abstractmethod
    def joins(self) -> Joins:
        """Joins of the statistics of several tiles, for each statistic of rows, and of keys."""

    @abstractmethod
    def parts(self, tile: Tile) -> Parts:
        """Statistics of the tile alone: of its rows, each [r], and of its keys, each [k]."""

    def fast_parts(self, tile: Tile) -> Parts:
        """Equals `parts`; a faster way without autograd, where there is one."""
        return self.parts(tile)

    @abstractmethod
    def grad_scores(self, tile: Tile, statistics: Statistics) -> Tensor:
        """Gradient of the loss by each score: [r, k]; may overwrite the scores."""


class PairSum(Reduction):
    """Sum over keys of a function of each pair."""

    leave_out: LeaveOut = "own"
    """Of kernels alone: pairs that do not count."""

    @property
    def expression(self) -> tuple[str, float] | None:
        """Name in `pairwise.kernels` of the same function of pairs that count, and its parameter;
        None: it has no kernel."""
        return None

    @property
    def joins(self) -> Joins:
        return (SUM,), ()

    @abstractmethod
    def value(self, tile: Tile) -> Tensor:
        """The function: [r, k]."""

    @abstractmethod
    def derivative(self, tile: Tile) -> Tensor:
        """Its derivative by the score: [r, k]."""

    def parts(self, tile: Tile) -> Parts:
        return (self.value(tile).sum(1),), ()

    def grad_scores(self, tile: Tile, statistics: Statistics) -> Tensor:
        (grad_sum,) = statistics.grad_rows
        return self.derivative(tile) * grad_sum


@dataclass(frozen=True)
class LogSumExp(Reduction):
    """``log(sum(exp(score)))`` over the keys of each row, and over the rows of each key.

    Args:
        leave_out: pairs that do not count: a row and its ``own`` key, or all ``similar`` ones.
            Those above `Pairs.thresholds` do not count either.
        both: also over the rows of each key.
    """

    leave_out: LeaveOut = "nothing"
    both: bool = False

    @property
    def joins(self) -> Joins:
        return (LOGSUMEXP,), (LOGSUMEXP,) if self.both else ()

    def _counted(self, tile: Tile) -> Tensor:
        """Scores, -inf where a pair does not count; with `both` those above thresholds are left."""
        out = {"own": tile.own, "similar": tile.similar}.get(self.leave_out)
        scores = without(tile.scores, out, -torch.inf)
        return scores if self.both else without(scores, tile.above, -torch.inf)

    def parts(self, tile: Tile) -> Parts:
        scores = self._counted(tile)
        of_rows, of_keys = (without(scores, x, -torch.inf) for x in (tile.above, tile.above_key))
        return (of_rows.logsumexp(1),), (of_keys.logsumexp(0),) if self.both else ()

    def fast_parts(self, tile: Tile) -> Parts:
        """Statistics in fp64; each exponential serves both directions if it can."""
        scores = self._counted(tile)
        if not self.both:
            return (logsumexp(scores, 1),), ()
        if scores.numel():
            shift = scores.max()
            weights = (scores - shift).exp_()
            sums = without(weights, tile.above).sum(1), without(weights, tile.above_key).sum(0)
            # Below this a row or key far from the tile's largest score has lost its digits.
            if min(x.min() for x in sums) > LEAST_SUM[scores.dtype]:
                row, key = (x.double().log_().add_(shift) for x in sums)
                return (row,), (key,)
        of_rows, of_keys = (without(scores, x, -torch.inf) for x in (tile.above, tile.above_key))
        return (logsumexp(of_rows, 1),), (logsumexp(of_keys, 0),)

    def grad_scores(self, tile: Tile, statistics: Statistics) -> Tensor:
        """Softmax weights of both directions, times the gradients by their log-sum-exps."""
        scores = self._counted(tile)
        row_lse, grad_row = statistics.rows[0], statistics.grad_rows[0]
        if not self.both:
            return weighted_softmax(scores, row_lse, grad_row)
        (key_lse,), (grad_key,) = statistics.keys, statistics.grad_keys
        # exp(score - lse) of both directions is one exponential times a factor, as long as that
        # factor and the exponential keep their digits.
        shift = row_lse.max().to(scores.dtype)  # the factors make up for its rounding
        spread = max((shift - x).abs().max() for x in (row_lse, key_lse))
        if not spread <= MOST_SPREAD:  # NaN where nothing counts
            by_rows = weighted_softmax(scores, row_lse, grad_row)
            by_keys = weighted_softmax(scores, key_lse, grad_key)
            return without(by_rows, tile.above) + without(by_keys, tile.above_key)
        row_factor = (grad_row * (shift - row_lse).exp()).to(scores.dtype)
        key_factor = (grad_key * (shift - key_lse).exp()).to(scores.dtype)
        factor = without(row_factor, tile.above) + without(key_factor, tile.above_key)
        # What counts is not above the log-sum-exps; what does not might be infinite.
        return (scores - shift).clamp_(max=2 * MOST_SPREAD).exp_().mul_(factor)


@dataclass(frozen=True)
class LogSumExpAndPositives(LogSumExp):
    """`LogSumExp` of each row, and the sum and the number of its positives' scores."""

    @property
    def joins(self) -> Joins:
        """Log-sum-exp, sum of positive scores, number of positives."""
        return (LOGSUMEXP, SUM, SUM), ()

    def parts(self, tile: Tile) -> Parts:
        return self._with_positives(super().parts(tile), tile)

    def fast_parts(self, tile: Tile) -> Parts:
        return self._with_positives(super().fast_parts(tile), tile)

    def _with_positives(self, parts: Parts, tile: Tile) -> Parts:
        (lse,), keys = parts
        positive = tile.positive().to(tile.scores.dtype)
        return (lse, (tile.scores * positive).sum(1), positive.sum(1)), keys

    def grad_scores(self, tile: Tile, statistics: Statistics) -> Tensor:
        _, grad_sum, _ = statistics.grad_rows
        return super().grad_scores(tile, statistics) + tile.positive() * grad_sum
