"""The contrastive force (seed of this project; family of "Generative Modeling via Drifting",
Deng et al., arXiv 2602.04770): every generated point is pulled by data and pushed by the others.

Notation: n_j the M generated points (negatives), p_i the N data points (positives), x = [n; p],
d Euclidean distances, t a temperature, A the weights of pairs. Per group and temperature::

    A      = sqrt(softmax_rows(-d / t) * softmax_columns(-d / t))
    F_j    = sum_i sum_{k != j} A[j, i] A[j, k] (p_i - n_k)                   [M, D]
    F      = F / unit
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from dist_contrastive import collectives, pairwise
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.force.affinity import ForceRules, Scope
from dist_contrastive.losses.force.fused import PanelRounds
from dist_contrastive.losses.force.inputs import ForceInputs, PointKind, center, force_inputs
from dist_contrastive.losses.force.kernel_calls import unfit
from dist_contrastive.losses.force.panels import Panels
from dist_contrastive.losses.force.passes import TileRounds
from dist_contrastive.losses.force.points import Counts, Points
from dist_contrastive.losses.force.rounds import RankForce, Rounds, force_in_rounds
from dist_contrastive.losses.force.sums import AttachGradient, Pool

Preset = Literal["seed", "drift", "paper"]

_CACHE_MB = 24.0  # of tiles, which stay in a processor's cache
_MANY = 2**62  # scores: dense only where it is asked for

_SEED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)

PRESETS: dict[str, ForceRules] = {
    "seed": ForceRules(
        temperatures=_SEED_TEMPERATURES,
        square=True,
        mask_self=False,
        divide_by="lengths",
        scale_scope="group",
        norm_scope="group",
        scale_gradient=True,
        per_dimension=False,
    ),
    "drift": ForceRules(
        temperatures=_SEED_TEMPERATURES,
        square=True,
        mask_self=True,
        divide_by="lengths",
        scale_scope="group",
        norm_scope="group",
        scale_gradient=False,
        per_dimension=False,
    ),
    "paper": ForceRules(
        temperatures=(0.02, 0.05, 0.2),
        square=False,
        mask_self=True,
        divide_by="force",
        scale_scope="global",
        norm_scope="global",
        scale_gradient=False,
        per_dimension=True,
    ),
}


class ContrastiveForce(PairLoss):
    """Loss whose gradient moves generated points along the contrastive force.

    Equals, per group, on the rows of all ranks together::

        scale  = mean of the distances that A has
        n, p   = n / scale, p / scale
        target = n + sum(F at t for t in temperatures)
        loss   = ((n - target.detach()) ** 2).mean()

    Its value says little (the force is normalised, so it hardly changes); watch samples, or
    `metrics` with ``diagnostics``.

    Presets:
        ``seed``: x @ x: A is [M + N, M + N], both softmaxes over all points. A point takes part in
            its own (d = 0), which at small temperatures leaves almost no weight to others.
            unit = sqrt(mean((d A)^2)) over all of A. Scale and unit per group; gradients also flow
            through scale.
        ``drift``: the same, but a point is left out of its own softmaxes, and scale is a constant.
        ``paper``: Algorithm 2 of the paper and the normalisers of its official code: A is
            [M, M + N], softmax over each row, and over each column of the M generated points; a
            point is left out of its own. unit = sqrt(mean(F^2)), so that each temperature counts
            alike; temperatures 0.02, 0.05, 0.2. Coordinates are n sqrt(D) / scale. Scale and unit
            are one for all groups of all ranks. ``affinity_floor=1e-3`` is what the official code
            does on top.

    ``keys_from="local"`` gives every rank groups of its own, of which only means with scope
    ``global`` cross ranks. ``impl="auto"`` is ``triton`` on CUDA and else ``chunked``; ``dense``
    with a ring has tiles as large as blocks. ``triton`` takes points in fp32, bf16 or fp16 and
    computes in fp32, distances of close points by differences; products of weights and points are
    as exact, unless torch has been allowed TF32. What depends on data is decided on the device, and
    the host waits for nothing if `counts` are given.

    Args:
        diagnostics: set `metrics`: ``scale`` (mean over groups), and for each temperature
            ``force_rms/t`` (before ``paper`` divides by it) and ``neighbours/t``, the effective
            number 1 / sum(softmax^2) of points that a generated one sees. Costs one more round, and
            a matrix product for each temperature.

    Collectives: all-gathers of a few numbers and of some 256 points, all-reduces of a few numbers
    per group; gather: one all-gather of the points and their tags, two of a few numbers per point
    and temperature, one of weights; ring: four rounds over points and tags, with those numbers.
    Backward: for ``seed`` one all-reduce of a number per group and label, else none.
    """

    takes = "points"

    class Config(PairLoss.Config):
        """The force of data and of other generated points on generated points."""

        name: Literal["contrastive_force"] = "contrastive_force"
        temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
        """One force each, added up, in units of the mean distance; null: those of the preset."""
        preset: Preset = "drift"
        """The form of the force; the further settings change one thing of it."""
        scale_scope: Scope | None = None
        """What the mean distance is a mean over: label (each label of each group), group, or global
        (all groups, labels and ranks); null: the preset's."""
        norm_scope: Scope | None = None
        """The same for what a force is divided by."""
        affinity_floor: float = Field(default=0.0, ge=0, lt=1)
        """Smallest weight of a pair."""
        normalise_total: bool = False
        """Divide the sum over temperatures by its root mean square (norm_scope)."""
        cache_mb: NonNegativeFloat | None = None
        """Distances kept from pass to pass, in MiB; those beyond are computed again in each of the
        four (three for `contrastive_force`). Of a ring nothing is kept. null: 24, or with triton a
        third of the card's memory, at most half of what is free."""

        def rules(self) -> ForceRules:
            """Rules of the preset, with settings other than None in the place of its own."""
            preset = PRESETS[self.preset]
            return replace(
                preset,
                temperatures=self.temperatures or preset.temperatures,
                scale_scope=self.scale_scope or preset.scale_scope,
                norm_scope=self.norm_scope or preset.norm_scope,
                floor=self.affinity_floor,
                normalise_total=self.normalise_total,
            )

    settings: Config

    def __init__(self, *args: Any, diagnostics: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.rules = self.settings.rules()
        self._pool_scale = Pool(self.rules.scale_scope, self.keys_from == "local", self.group)
        self._pool_norm = Pool(self.rules.norm_scope, self.keys_from == "local", self.group)
        self.diagnostics = diagnostics

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One force each."""
        return self.rules.temperatures

    def forward(
        self,
        negative: Tensor,
        positive: Tensor,
        negative_labels: Tensor | None = None,
        positive_labels: Tensor | None = None,
        fixed: Tensor | None = None,
        fixed_labels: Tensor | None = None,
        negative_weights: Tensor | None = None,
        positive_weights: Tensor | None = None,
        fixed_weights: Tensor | None = None,
        counts: Sequence[Counts] | None = None,
    ) -> Tensor:
        """Scalar loss.

        Args:
            negative: [..., m, D] generated points. positive: [..., n, D] data; leading dimensions
                are independent groups, equal on all ranks; m and n may differ between ranks.
            fixed: [..., k, D] further negatives, which push but do not move, as samples without
                their class for guidance.
            negative_labels, positive_labels, fixed_labels: [m], [n], [k] int64: points of different
                labels do not interact; each label may have any number of points on any rank.
            negative_weights, positive_weights, fixed_weights: [m], [n], [k] or [..., m] and so on,
                0 or more: the columns of A are multiplied by them after the softmaxes, and
                distances count with them in scale. None: 1 each.
            counts: numbers (m, k, n) of every rank, of inputs that callers have checked already;
                None checks them here, for which the host waits.
        """
        inputs = self._inputs(
            PointKind(negative, negative_labels, negative_weights),
            PointKind(positive, positive_labels, positive_weights),
            None if fixed is None else PointKind(fixed, fixed_labels, fixed_weights),
            counts,
        )
        # Mixed precision would compute distances in bf16, which t = 0.01 makes errors of A.
        with torch.autocast(inputs.rows.device.type, enabled=False):
            return self._loss(inputs)

    @torch.no_grad()
    def force(self, negative: Tensor, positive: Tensor, fixed: Tensor | None = None) -> Tensor:
        """Sum of the forces at all temperatures, without rescaling: the shape of negative."""
        others = None if fixed is None else PointKind(fixed)
        inputs = self._inputs(PointKind(negative), PointKind(positive), others)
        with torch.autocast(inputs.rows.device.type, enabled=False):
            points = self._points(inputs)
            scale = inputs.rows.new_ones(inputs.rows.shape[1], inputs.num_labels)
            force = self._force(points, inputs, scale)
            return force.transpose(0, 1).reshape(negative.shape)

    def _inputs(
        self,
        negative: PointKind,
        positive: PointKind,
        fixed: PointKind | None,
        counts: Sequence[Counts] | None = None,
    ) -> ForceInputs:
        kinds = {"negative": negative, "positive": positive}
        if fixed is not None:
            kinds["fixed"] = fixed
        points = [x.points for x in kinds.values() if isinstance(x.points, Tensor)]
        return force_inputs(
            self.group, self.keys_from != "local", kinds, counts, not self._may_use_kernels(points)
        )

    def _may_use_kernels(self, points: Sequence[Tensor]) -> bool:
        """Whether kernels will compute with these points, if they are what they must be."""
        if not points or self.impl not in ("auto", "triton"):
            return False
        is_wanted = self.impl == "triton" or points[0].is_cuda
        return is_wanted and unfit(points[0].device, *(x.dtype for x in points)) is None

    def _way(self, rows: Tensor) -> pairwise.Impl:
        """The way to compute with these rows. Raises: ConfigError, on all ranks."""
        return pairwise.choose(self.impl, _MANY, unfit(rows.device, rows.dtype), rows.is_cuda)

    def _loss(self, inputs: ForceInputs) -> Tensor:
        scale, grad_rows, force = self._scale_and_force(inputs)
        if self.rules.scale_gradient:
            labels, pool = inputs.tags[:, 1], self._pool_scale.sum
            scale = AttachGradient.apply(inputs.rows, scale, grad_rows, labels, pool)
        unit = scale / math.sqrt(inputs.rows.shape[-1]) if self.rules.per_dimension else scale
        labels = inputs.labels_of_generated
        scaled = inputs.rows[: len(labels)] / unit.T[labels, :, None]
        # n - sg(n + F), bracketed so that a small F does not vanish beside n.
        error = ((scaled - scaled.detach()) - force).square()
        if error.requires_grad:  # the gradient is the force, held constant: it has no derivative
            error.register_hook(lambda _: collectives.refuse_graph())
        return self.mean(error.sum(), error.numel())

    @torch.no_grad()
    def _scale_and_force(self, inputs: ForceInputs) -> tuple[Tensor, Tensor | None, Tensor]:
        """Unit of the distances [G, L], its derivative by the rows [R, G, D] where gradients need
        it, and the force [m, G, D]. Distances that are kept for these are freed with it."""
        points = self._points(inputs)
        mean, grad_rows = self._mean_distance(points, inputs)
        scale = torch.where(mean > 0, mean, 1.0)
        return scale, grad_rows, self._force(points, inputs, scale)

    def _points(self, inputs: ForceInputs) -> Rounds[Any]:
        """This rank's rows, relative to the center of all points, and the keys of all ranks."""
        rows = inputs.rows.detach()
        rows = rows - center(rows, inputs.sizes, self.keys_from != "local", self.group)
        pairs = self.pairs(rows, rows, inputs.sizes, inputs.tags)
        cache_mb, num_labels = self.settings.cache_mb, inputs.num_labels
        if self._way(rows) == "triton":
            panels = Panels(pairs, inputs.counts, num_labels, self.chunk_size, cache_mb)
            return PanelRounds(panels, self.rules, inputs.weights, inputs.label_counts)
        chunk_size = max(inputs.sizes) if self.impl == "dense" else self.chunk_size
        points = Points(pairs, chunk_size, _CACHE_MB if cache_mb is None else cache_mb)
        return TileRounds(points, self.rules, inputs.weights, num_labels)

    def _mean_distance(
        self, points: Rounds[Any], inputs: ForceInputs
    ) -> tuple[Tensor, Tensor | None]:
        """Mean of d [G, L], and its derivative by the rows [R, G, D] where gradients need it."""
        kinds = inputs.with_gradient if self.rules.scale_gradient else frozenset()
        total, count, grad_points = points.distance_sums(kinds)
        total, count = self._pool_scale.sum(torch.stack([total, count]))
        count = torch.where(count > 0, count, 1.0)  # 0 where nothing interacts
        mean = (total / count).to(inputs.rows.dtype)
        if grad_points is None:
            return mean, None
        count_of_rows = count.T[inputs.tags[:, 1], :, None]
        return mean, grad_points.transpose(0, 1) / count_of_rows.to(grad_points.dtype)

    def _force(self, points: Rounds[Any], inputs: ForceInputs, scale: Tensor) -> Tensor:
        """Force on the generated points, in units of scale [G, L]: [m, G, D]."""
        is_dense = self.impl == "dense" and self.keys_from != "ring"
        if is_dense and isinstance(points, TileRounds):
            found = points.dense(self._pool_norm, scale, self.diagnostics)
        else:
            found = force_in_rounds(points, self.rules, self._pool_norm, scale, self.diagnostics)
        self.metrics = {}
        if self.diagnostics:
            counts = inputs.label_counts
            self._report(found, scale, None if counts is None else counts > 0)
        return found.force.transpose(0, 1)

    def _report(self, found: RankForce, scale: Tensor, has_label: Tensor | None) -> None:
        """Set `metrics`."""
        assert found.rms is not None
        assert found.neighbours is not None
        order = math.sqrt(found.force.shape[-1]) if self.rules.per_dimension else 1.0
        self.metrics["scale"] = self._plain_mean(scale, has_label)
        for number, t in enumerate(self.temperatures):
            rms = order * found.rms[number]
            self.metrics[f"force_rms/{t:g}"] = self._plain_mean(rms, has_label)
            self.metrics[f"neighbours/{t:g}"] = self._plain_mean(found.neighbours[number])

    def _plain_mean(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Mean over all numbers [..., n] of all ranks, of which some may have none; or over those
        that count [n]."""
        if counts is None:
            return collectives.global_mean(x.double().sum(), x.numel(), self.group)
        counts = counts.expand(x.shape)
        return collectives.global_mean(
            x.double().where(counts, 0.0).sum(), counts.sum(), self.group
        )


def contrastive_force(
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    preset: Preset = "seed",
    *,
    fixed: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Force at one temperature on every negative, in the coordinates as given (no rescaling).

    With ``preset="seed"`` exactly the function of that name in the seed: the formula at the top of
    this file. Memory is linear in the number of points, with ``keys_from="ring"`` in that of one
    rank; there is no gradient (the force is a constant in the loss).

    Args:
        positive: [..., n, D] data. negative: [..., m, D] generated; rows of this rank.
        temperature: in units of the coordinates; above 0.
        fixed: [..., k, D] further negatives, which do not move.
        preset, options: see `ContrastiveForce`.

    Collectives: those of the loss's forward without the round that finds the mean distance.

    Returns:
        The shape of negative. 0 where the formula is 0/0: points that coincide all together.
    """
    loss = ContrastiveForce((temperature,), preset, **options)
    return loss.force(negative, positive, fixed)
