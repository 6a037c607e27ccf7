"""The contrastive force (seed of this project; family of "Generative Modeling via Drifting",
Deng et al., arXiv 2602.04770): every generated point is pulled by data and pushed by the others.

Notation: p_i the N positives (data), n_j the M negatives (generated), x = [n; p], B = M + N,
d the Euclidean distances of x, t a temperature. Per group and temperature::

    A      = sqrt(softmax_rows(-d / t) * softmax_columns(-d / t))             [B, B]
    F_j    = sum_i sum_{k != j} A[j, i] A[j, k] (p_i - n_k)                   [M, D]
    F      = F / sqrt(mean((d * A)**2))                                       mean over B**2
"""

import math
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive import collectives
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss, PairOptions
from dist_contrastive.losses.force_inputs import ForceInputs, force_inputs
from dist_contrastive.pairwise import force as passes

Preset = Literal["seed", "drift"]
PRESETS = ("seed", "drift")


class ContrastiveForce(PairLoss):
    """Loss whose gradient moves generated points along the contrastive force.

    Equals, per group, on the rows of all ranks together::

        scale = cdist(x, x).mean();  n, p = n / scale, p / scale
        target = n + sum(contrastive_force(p, n, t) for t in temperatures)
        loss = ((n - target.detach()) ** 2).mean()

    Its value says little (the force is normalised, so it hardly changes); watch samples instead.

    Presets:
        ``seed``: literally the above. A point takes part in its own softmax (d = 0), which at small
            temperatures leaves almost no weight to others; gradients also flow through scale.
        ``drift``: a point is left out of its own softmax, and scale is a constant.

    Args:
        temperatures: one force each, added up; all above 0, in units of the mean distance.
        options: see `PairLoss`. ``keys_from="local"`` gives every rank groups of its own;
            ``impl="auto"`` is ``chunked``; ``dense`` with a ring has tiles as large as blocks.

    Scope: scale and normaliser are per group (leading dimensions), over the group's points on all
    ranks. Labels divide a group further: pairs of different labels do not interact, but scale and
    normaliser are one for all labels, means over the pairs that do.

    Collectives: all-gathers of a few numbers and all-reduces of one point and a few numbers per
    group; gather: one all-gather of the points, their tags, and one number per point and
    temperature; ring: four rounds over points and tags, two of them with those numbers. Backward:
    for ``seed`` one all-reduce of a number per group, for ``drift`` none.
    """

    takes = "points"

    def __init__(
        self,
        temperatures: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2),
        preset: Preset = "drift",
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(**options)
        _check_settings(temperatures, preset)
        self.temperatures = tuple(temperatures)
        self.preset = preset

    def forward(
        self,
        negative: Tensor,
        positive: Tensor,
        negative_labels: Tensor | None = None,
        positive_labels: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss.

        Args:
            negative: [..., m, D] generated points. positive: [..., n, D] data; leading dimensions
                are independent groups, equal on all ranks; m and n may differ between ranks.
            negative_labels, positive_labels: [m], [n] int64: points of different labels do not
                interact; each label may have any number of points on any rank.
        """
        # Mixed precision would compute distances in bf16, which t = 0.01 makes errors of A.
        with torch.autocast(negative.device.type, enabled=False):
            return self._loss(self._inputs(negative, positive, negative_labels, positive_labels))

    def _loss(self, given: ForceInputs) -> Tensor:
        with torch.no_grad():
            points = self._points(given)
            mean, direction = self._mean_distance(points)
            scale = torch.where(mean > 0, mean, 1.0)[:, None]
            force = self._force(points, scale)
        if self.preset == "seed":
            scale = _AttachGradient.apply(given.rows, scale, direction, self._sum)
        scaled = given.rows[: len(force)] / scale  # the mean does not mind the order of rows
        # n - sg(n + F), bracketed so that a small F does not vanish beside n.
        error = ((scaled - scaled.detach()) - force).square()
        return self.mean(error.sum(), error.numel())

    @torch.no_grad()
    def force(self, negative: Tensor, positive: Tensor) -> Tensor:
        """Sum of the forces at all temperatures, without rescaling: the shape of negative."""
        with torch.autocast(negative.device.type, enabled=False):
            points = self._points(self._inputs(negative, positive))
            force = self._force(points, points.rows.new_ones(len(points.rows), 1))
            return force.transpose(0, 1).reshape(negative.shape)

    def _inputs(self, negative: Tensor, positive: Tensor, *labels: Tensor | None) -> ForceInputs:
        return force_inputs(self.group, self.keys_from != "local", negative, positive, *labels)

    def _points(self, given: ForceInputs) -> passes.Points:
        """This rank's rows, seen from the middle of all points, and the keys of all ranks."""
        rows = given.rows - self._sum(given.rows.sum(0)) / sum(given.sizes)
        chunk_size = max(given.sizes) if self.impl == "dense" else self.chunk_size
        return passes.Points(self.pairs(rows, rows, given.sizes, given.tags), chunk_size)

    def _sum(self, x: Tensor) -> Tensor:
        """Over the ranks that share the groups, without gradient."""
        return x if self.keys_from == "local" else collectives.all_reduce_sum(x, self.group)

    def _mean_distance(self, points: passes.Points) -> tuple[Tensor, Tensor | None]:
        """Mean of d over interacting pairs [G], and for ``seed`` its derivative by the rows."""
        total, num_pairs, direction = passes.sum_of_distances(points, self.preset == "seed")
        totals = self._sum(torch.cat([total, total.new_tensor([num_pairs])]))
        if direction is not None:
            direction = (direction * (2 / totals[-1])).transpose(0, 1)
        return (totals[:-1] / totals[-1]).to(points.rows.dtype), direction

    def _force(self, points: passes.Points, scale: Tensor) -> Tensor:
        """Force on the negatives, summed over temperatures in units of scale [G, 1]: [m, G, D]."""
        mask_diagonal = self.preset == "drift"
        if self.impl == "dense" and self.keys_from != "ring":
            settings = scale[:, None], self.temperatures, mask_diagonal
            return passes.dense_force(points, *settings).transpose(0, 1)
        slope = -1 / (scale.new_tensor(self.temperatures)[:, None, None, None] * scale[:, None])
        lse = passes.row_logsumexp(points, slope, mask_diagonal)
        sums = passes.log_sums(points, slope, lse)
        mean_square = torch.stack([sums.square, sums.num_pairs])
        if self.keys_from != "local":
            mean_square = collectives.logsumexp_over_ranks(mean_square, self.group)
        log_norm = (mean_square[0] - mean_square[1]) / 2
        return passes.accumulate(points, slope, lse, sums, log_norm).transpose(0, 1)


def contrastive_force(
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    preset: Preset = "seed",
    **options: Unpack[PairOptions],
) -> Tensor:
    """Force at one temperature on every negative, in the coordinates as given (no rescaling).

    With ``preset="seed"`` exactly the function of that name in the seed: the formula at the top of
    this file. Memory is linear in the number of points, with ``keys_from="ring"`` in that of one
    rank; there is no gradient (the force is a constant in the loss).

    Args:
        positive: [..., n, D] data. negative: [..., m, D] generated; rows of this rank.
        temperature: in units of the coordinates; above 0.
        preset, options: see `ContrastiveForce`.

    Collectives: those of the loss's forward without the round that finds the mean distance.

    Returns:
        The shape of negative. 0 where the formula is 0/0: points that coincide all together.
    """
    return ContrastiveForce((temperature,), preset, **options).force(negative, positive)


class _AttachGradient(torch.autograd.Function):
    """scale as a function of the rows, with its derivative given; rows are spread over ranks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, scale: Tensor, direction: Tensor, sum_over_ranks: Any
    ) -> Tensor:
        ctx.save_for_backward(direction)
        ctx.sum_over_ranks = sum_over_ranks
        return scale.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return ctx.sum_over_ranks(grad) * direction, None, None, None


def _check_settings(temperatures: tuple[float, ...], preset: str) -> None:
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r} is not known; use one of {', '.join(PRESETS)}")
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise ConfigError(
            f"temperatures={tuple(temperatures)} must be one or more positive numbers, "
            f"for instance (0.02, 0.05, 0.2)"
        )
