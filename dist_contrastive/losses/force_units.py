"""What the contrastive force is divided by, and the scope over which that is a mean.

T temperatures, G groups, L labels, m generated points of this rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive import collectives
from dist_contrastive.collectives import Group
from dist_contrastive.pairwise.force import LogSums

Scope = Literal["label", "group", "global"]


@dataclass(frozen=True)
class Pool:
    """Makes numbers of groups and labels [..., G, L] those of the scope: one for each label, one
    for all labels of a group, or one for all. The results have the shape of the numbers.

    Collectives: an all-reduce of what is left of the numbers (of logarithms two), unless ranks have
    groups of their own and the scope does not join these.
    """

    scope: Scope
    own_groups: bool  # whether every rank has groups of its own
    group: Group

    @property
    def _merged(self) -> tuple[int, ...]:
        return {"label": (), "group": (-1,), "global": (-2, -1)}[self.scope]

    @property
    def _crosses_ranks(self) -> bool:
        return not self.own_groups or self.scope == "global"

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the scope."""
        total = x.sum(self._merged, keepdim=True) if self._merged else x
        if self._crosses_ranks:
            total = collectives.all_reduce_sum(total, self.group)
        return total.expand(x.shape)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Logarithms of sums of exponentials."""
        total = x.logsumexp(self._merged, keepdim=True) if self._merged else x
        if self._crosses_ranks:
            total = collectives.logsumexp_over_ranks(total, self.group)
        return total.expand(x.shape)

    def max(self, x: Tensor) -> Tensor:
        """The largest."""
        largest = x.amax(self._merged, keepdim=True) if self._merged else x
        if self._crosses_ranks:
            largest = collectives.all_reduce_max(largest, self.group)
        return largest.expand(x.shape)


def log_length(sums: LogSums, pool: Pool) -> Tensor:
    """log sqrt(mean((d A)^2)): [T, G, L] fp64."""
    num_pairs = pool.sum(sums.num_pairs.expand(sums.square.shape[1:]))
    return (pool.logsumexp(sums.square) - num_pairs.clamp(min=1).log()) / 2


def log_largest(sums: LogSums, labels: Tensor, pool: Pool) -> Tensor:
    """Logarithm of the largest sum of weights that a force has in it: [T, G, L] fp64.

    Args:
        labels: of the generated points [m].
    """
    of_rows = sums.moving[..., : len(labels)].double()
    largest = torch.full_like(sums.square, -torch.inf)
    largest.scatter_reduce_(-1, labels.expand(of_rows.shape), of_rows, "amax")
    return pool.max(largest)


def root_mean_square(force: Tensor, labels: Tensor, num_labels: int, pool: Pool) -> Tensor:
    """Over points and dimensions of each force [T, G, m, D]: [T, G, L] fp64."""
    sums = force.new_zeros(*force.shape[:2], num_labels, dtype=torch.float64)
    sums.index_add_(-1, labels, force.double().square().sum(-1))
    counts = sums.new_zeros(sums.shape[1:])
    counts.index_add_(-1, labels, counts.new_full((len(counts), len(labels)), force.shape[-1]))
    return (pool.sum(sums) / pool.sum(counts).clamp(min=1)).sqrt()


def with_unit_rms(force: Tensor, labels: Tensor, num_labels: int, pool: Pool) -> Tensor:
    """The forces [T, G, m, D] over their root mean square; 0 where that is 0, or too small for the
    dtype, which has lost the digits of such numbers."""
    rms = root_mean_square(force, labels, num_labels, pool)
    factor = torch.where(rms >= torch.finfo(force.dtype).tiny, 1 / rms, 0.0).to(force.dtype)
    return force * factor[..., labels, None]


class AttachGradient(torch.autograd.Function):
    """scale [G, L] as a function of the rows [R, G, D], with its derivative given."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, scale: Tensor, slopes: Tensor, labels: Tensor, pool: Any
    ) -> Tensor:
        ctx.save_for_backward(slopes, labels)
        ctx.pool = pool
        return scale.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes, labels = ctx.saved_tensors
        return ctx.pool(grad).T[labels, :, None] * slopes, None, None, None, None
