"""The contrastive force (seed of this project; family of "Generative Modeling via Drifting",
Deng et al., arXiv 2602.04770): every generated point is pulled by data and pushed by the others.

Notation: p_i the N positives (data), n_j the M negatives (generated), x = [n; p], B = M + N,
d the Euclidean distances of x, t a temperature. Per group and temperature::

    A      = sqrt(softmax_rows(-d / t) * softmax_columns(-d / t))             [B, B]
    F_j    = sum_i sum_{k != j} A[j, i] A[j, k] (p_i - n_k)                   [M, D]
    F      = F / sqrt(mean((d * A)**2))                                       mean over B**2
"""

import math
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive import collectives
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss, PairOptions
from dist_contrastive.losses.force_layout import Layout, sort_rows
from dist_contrastive.losses.inputs import check_points
from dist_contrastive.pairwise import dense, distances
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
            ``impl="auto"`` is ``chunked``.

    Scope: scale and normaliser are per group (leading dimensions), over the group's points on all
    ranks. Labels divide a group further: pairs of different labels do not interact, but scale and
    normaliser are one for all labels, means over the pairs that do.

    Collectives: gathers of the points of both kinds and of one number per point and temperature,
    all-reduces of a few numbers per group; backward of ``seed`` one all-reduce of G numbers.
    """

    known_keys_from: ClassVar = ("gather", "local")

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
            rows, m = _grouped(negative, positive)
            check_points(self.group, rows.transpose(0, 1), self.keys_from != "local")
            labels = _joined_labels(negative_labels, positive_labels, rows, m)
            return self._loss(rows, m, labels)

    def _loss(self, rows: Tensor, m: int, labels: Tensor) -> Tensor:
        order = sort_rows(labels, m)  # the mean does not mind the order of rows
        rows = rows[:, order]
        layout = Layout(self._gather, labels[order], m)
        points = self._points(rows, layout)
        with torch.no_grad():
            mean, direction = self._mean_distance(points)
            scale = torch.where(mean > 0, mean, 1.0)[:, None, None]
            force = self._force(points.scaled(1 / scale), m, layout)
        if self.preset == "seed":
            scale = _AttachGradient.apply(rows, scale, direction, self._sum)
        scaled = rows[:, :m] / scale
        # n - sg(n + F), bracketed so that a small F does not vanish beside n.
        error = ((scaled - scaled.detach()) - force).square()
        return self.mean(error.sum(), error.numel())

    @torch.no_grad()
    def force(self, negative: Tensor, positive: Tensor) -> Tensor:
        """Sum of the forces at all temperatures, without rescaling: the shape of negative."""
        with torch.autocast(negative.device.type, enabled=False):
            rows, m = _grouped(negative, positive)
            layout = Layout(self._gather, _joined_labels(None, None, rows, m), m)
            return self._force(self._points(rows, layout), m, layout).reshape(negative.shape)

    def _gather(self, rows: Tensor) -> tuple[Tensor, int]:
        if self.keys_from == "local":
            return rows, 0
        return collectives.all_gather_rows(rows, self.group)

    def _points(self, rows: Tensor, layout: Layout) -> passes.Points:
        """This rank's rows [G, R, D] and all keys, centred, without gradient.

        Gathered with their gradient all the same, so that a rank whose points need none is refused
        here rather than awaited for ever in backward.
        """
        if layout.num_negative < 1 or layout.num_positive < 1:
            raise ConfigError(
                f"the ranks together hold {layout.num_negative} negative (generated) and "
                f"{layout.num_positive} positive (data) points; the force needs one of each"
            )
        keys = layout.keys(rows.transpose(0, 1)).transpose(0, 1).detach()
        return passes.Points(
            *distances.centre(rows.detach(), keys),
            num_negative=layout.num_negative,
            self_key=layout.self_key,
            blocks=layout.blocks(),
            num_pairs=layout.num_pairs(),
            chunk_size=self.chunk_size,
        ).keeping_tiles()

    def _sum(self, x: Tensor) -> Tensor:
        """Over the ranks that share the groups."""
        return x if self.keys_from == "local" else collectives.all_reduce_sum(x, self.group)

    def _mean_distance(self, points: passes.Points) -> tuple[Tensor, Tensor | None]:
        """Mean of d over interacting pairs [G], and for ``seed`` its derivative by the rows."""
        total, direction = passes.sum_of_distances(points, self.preset == "seed")
        mean = self._sum(total) / points.num_pairs
        if direction is not None:
            direction = direction * (2 / points.num_pairs)
        return mean.to(points.rows.dtype), direction

    def _force(self, points: passes.Points, m: int, layout: Layout) -> Tensor:
        """Force on the first m rows, summed over temperatures: [G, m, D]."""
        mask_diagonal = self.preset == "drift"
        if self.impl == "dense":  # which repeats on every rank what the others compute
            settings = points.num_negative, self.temperatures, mask_diagonal, layout.labels
            return dense.force(points.keys, *settings)[:, points.self_key[:m]]
        row_lse = passes.row_logsumexp(points, self.temperatures, mask_diagonal)
        key_lse = layout.keys(row_lse.movedim(-1, 0)).movedim(0, -1)
        sums = passes.log_sums(points, self.temperatures, row_lse, key_lse)
        log_square = sums.square.logsumexp(-1)
        if self.keys_from == "gather":
            log_square = collectives.logsumexp_over_ranks(log_square, self.group)
        log_norm = (log_square - math.log(points.num_pairs)) / 2
        lse = row_lse[..., :m], key_lse
        return passes.accumulate(points.first(m), self.temperatures, *lse, sums.first(m), log_norm)


def contrastive_force(
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    preset: Preset = "seed",
    **options: Unpack[PairOptions],
) -> Tensor:
    """Force at one temperature on every negative, in the coordinates as given (no rescaling).

    With ``preset="seed"`` exactly the function of that name in the seed: the formula at the top of
    this file. Memory is linear in the number of points; there is no gradient (the force is a
    constant in the loss).

    Args:
        positive: [..., n, D] data. negative: [..., m, D] generated; rows of this rank.
        temperature: in units of the coordinates; above 0.
        preset, options: see `ContrastiveForce`.

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


def _grouped(negative: Tensor, positive: Tensor) -> tuple[Tensor, int]:
    """Both as one [G, m + n, D] in at least fp32, and m."""
    shapes = tuple(negative.shape), tuple(positive.shape)
    fits = negative.dim() == positive.dim() >= 2 and shapes[0][:-2] == shapes[1][:-2]
    if not fits or shapes[0][-1] != shapes[1][-1]:
        raise ConfigError(
            f"negative and positive have shapes {shapes[0]} and {shapes[1]}; give [..., m, dim] "
            f"and [..., n, dim] with equal leading dimensions and dim"
        )
    if not (negative.is_floating_point() and positive.is_floating_point()):
        raise ConfigError(f"points must be floating, not {negative.dtype} and {positive.dtype}")
    if 0 in (*shapes[0][:-2], shapes[0][-1]):
        raise ConfigError(f"points of shape {shapes[0]} hold no group or no dimension; give some")
    dtype = collectives.accumulation_dtype(torch.promote_types(negative.dtype, positive.dtype))
    rows = torch.cat([negative.to(dtype), positive.to(dtype)], dim=-2)
    return rows.reshape(math.prod(shapes[0][:-2]), *rows.shape[-2:]), shapes[0][-2]


def _joined_labels(
    negative: Tensor | None, positive: Tensor | None, rows: Tensor, m: int
) -> Tensor:
    """Labels of all rows; 0 for all where none are given."""
    if negative is None and positive is None:
        return torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
    n = rows.shape[1] - m
    if negative is None or positive is None or (len(negative), len(positive)) != (m, n):
        raise ConfigError(
            f"labels must be given for both kinds of points: {m} negative_labels and {n} "
            f"positive_labels"
        )
    return torch.cat([negative, positive]).to(torch.int64)
