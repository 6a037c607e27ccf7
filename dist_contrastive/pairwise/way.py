"""What a way to compute a block of pairs has to do."""

from typing import NamedTuple, Protocol

from torch import Tensor

from dist_contrastive.pairwise.pairs import Block, Pairs
from dist_contrastive.pairwise.reductions import Reduction, Statistics

Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # statistics of rows, of keys


class Grads(NamedTuple):
    """Sums that gradients are added to, in place; None where none is wanted."""

    rows: Tensor  # [b, D]
    keys: Tensor | None  # [k, D]
    bias: Tensor | None  # scalar


class Way(Protocol):
    """Computation of the pairs of all rows and a block of keys."""

    def add_statistics(
        self, reduction: Reduction, pairs: Pairs, block: Block, totals: Results
    ) -> None:
        """Join the block's statistics, in place, to those of rows [b] and of its keys [k]."""

    def add_gradients(
        self,
        reduction: Reduction,
        pairs: Pairs,
        block: Block,
        statistics: Statistics,
        grads: Grads,
    ) -> None:
        """Add the block's gradients; those of its keys are 0 before."""
