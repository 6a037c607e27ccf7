"""The contrastive force (seed of this project; family of "Generative Modeling via Drifting",
Deng et al., arXiv 2602.04770): every generated point is pulled by data and pushed by the others.

Notation: n_j the M generated points (negatives), p_i the N data points (positives), x = [n; p],
d Euclidean distances, t a temperature, A the weights of pairs. Per group and temperature::

    A      = sqrt(softmax_rows(-d / t) * softmax_columns(-d / t))
    F_j    = sum_i sum_{k != j} A[j, i] A[j, k] (p_i - n_k)                   [M, D]
    F      = F / unit
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.force import passes
from dist_contrastive.losses.force.affinity import Affinity, Powers
from dist_contrastive.losses.force.inputs import ForceInputs, KindOfPoints, amid, force_inputs
from dist_contrastive.losses.force.points import Points
from dist_contrastive.losses.force.sums import (
    AttachGradient,
    Pool,
    Scope,
    log_largest,
    log_length,
    root_mean_square,
    with_unit_rms,
)

Preset = Literal["seed", "drift", "paper"]


@dataclass(frozen=True)
class ForceRules:
    """What distinguishes the presets; `ContrastiveForce` tells what they mean."""

    temperatures: tuple[float, ...]
    affinity: Affinity
    unit: Literal["lengths", "force"]
    """What a force is divided by: sqrt(mean((d A)^2)), or its own root mean square."""
    scale_scope: Scope
    norm_scope: Scope
    scale_gradient: bool
    """Whether gradients flow through the mean distance."""
    per_dimension: bool
    """Whether coordinates, rather than distances, are brought to order 1: times sqrt(D)."""


_SEED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)

PRESETS: dict[str, ForceRules] = {
    "seed": ForceRules(
        temperatures=_SEED_TEMPERATURES,
        affinity=Affinity(square=True, mask_self=False),
        unit="lengths",
        scale_scope="group",
        norm_scope="group",
        scale_gradient=True,
        per_dimension=False,
    ),
    "drift": ForceRules(
        temperatures=_SEED_TEMPERATURES,
        affinity=Affinity(square=True, mask_self=True),
        unit="lengths",
        scale_scope="group",
        norm_scope="group",
        scale_gradient=False,
        per_dimension=False,
    ),
    "paper": ForceRules(
        temperatures=(0.02, 0.05, 0.2),
        affinity=Affinity(square=False, mask_self=True),
        unit="force",
        scale_scope="global",
        norm_scope="global",
        scale_gradient=False,
        per_dimension=True,
    ),
}


def rules_of(
    preset: str,
    temperatures: tuple[float, ...] | None,
    scale_scope: Scope | None,
    norm_scope: Scope | None,
    affinity_floor: float,
) -> ForceRules:
    """Rules of a preset, with what is given, rather than None, in the place of its own."""
    rules = PRESETS[preset]
    return replace(
        rules,
        temperatures=temperatures or rules.temperatures,
        affinity=replace(rules.affinity, floor=affinity_floor),
        scale_scope=scale_scope or rules.scale_scope,
        norm_scope=norm_scope or rules.norm_scope,
    )


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
    ``global`` cross ranks; ``impl="auto"`` is ``chunked``; ``dense`` with a ring has tiles as large
    as blocks.

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
        cache_mb: NonNegativeFloat = 24.0
        """Distances kept from pass to pass, in MiB; those beyond are computed again in each of the
        four (three for `contrastive_force`). Of a ring nothing is kept."""

    settings: Config

    def __init__(self, *args: Any, diagnostics: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        chosen = self.settings
        self.rules = rules_of(
            chosen.preset,
            chosen.temperatures,
            chosen.scale_scope,
            chosen.norm_scope,
            chosen.affinity_floor,
        )
        self._pool_scale = Pool(self.rules.scale_scope, self.keys_from == "local", self.group)
        self._pool_norm = Pool(self.rules.norm_scope, self.keys_from == "local", self.group)
        self.diagnostics = diagnostics

    @property
    def temperatures(self) -> tuple[float, ...]:
        """As given."""
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
        """
        given = self._inputs(
            KindOfPoints(negative, negative_labels, negative_weights),
            KindOfPoints(positive, positive_labels, positive_weights),
            None if fixed is None else KindOfPoints(fixed, fixed_labels, fixed_weights),
        )
        # Mixed precision would compute distances in bf16, which t = 0.01 makes errors of A.
        with torch.autocast(given.rows.device.type, enabled=False):
            return self._loss(given)

    @torch.no_grad()
    def force(self, negative: Tensor, positive: Tensor, fixed: Tensor | None = None) -> Tensor:
        """Sum of the forces at all temperatures, without rescaling: the shape of negative."""
        others = None if fixed is None else KindOfPoints(fixed)
        given = self._inputs(KindOfPoints(negative), KindOfPoints(positive), others)
        with torch.autocast(given.rows.device.type, enabled=False):
            points = self._points(given)
            scale = points.rows.new_ones(len(points.rows), given.num_labels)
            force = self._force(points, given, scale)
            return force.transpose(0, 1).reshape(negative.shape)

    def _inputs(
        self, negative: KindOfPoints, positive: KindOfPoints, fixed: KindOfPoints | None
    ) -> ForceInputs:
        further = {} if fixed is None else {"fixed": fixed}
        given = {"negative": negative, "positive": positive, **further}
        return force_inputs(self.group, self.keys_from != "local", given)

    def _loss(self, given: ForceInputs) -> Tensor:
        with torch.no_grad():
            points = self._points(given)
            mean, slopes = self._mean_distance(points, given)
            scale = torch.where(mean > 0, mean, 1.0)
            force = self._force(points, given, scale)
        if self.rules.scale_gradient:
            labels, pool = given.tags[:, 1], self._pool_scale.sum
            scale = AttachGradient.apply(given.rows, scale, slopes, labels, pool)
        unit = scale / math.sqrt(given.rows.shape[-1]) if self.rules.per_dimension else scale
        mine = given.labels_of_generated
        scaled = given.rows[: len(mine)] / unit.T[mine, :, None]
        # n - sg(n + F), bracketed so that a small F does not vanish beside n.
        error = ((scaled - scaled.detach()) - force).square()
        return self.mean(error.sum(), error.numel())

    def _points(self, given: ForceInputs) -> Points:
        """This rank's rows, seen from amid all points, and the keys of all ranks."""
        rows = given.rows.detach()
        rows = rows - amid(rows, given.sizes, self.keys_from != "local", self.group)
        chunk_size = max(given.sizes) if self.impl == "dense" else self.chunk_size
        pairs = self.pairs(rows, rows, given.sizes, given.tags)
        return Points(pairs, chunk_size, self.settings.cache_mb)

    def _mean_distance(self, points: Points, given: ForceInputs) -> tuple[Tensor, Tensor | None]:
        """Mean of d [G, L], and its derivative by the rows [R, G, D] where gradients need it."""
        kinds = given.with_gradient if self.rules.scale_gradient else frozenset()
        total, count, slopes = passes.distance_sums(
            points, self.rules.affinity, given.weights, given.num_labels, kinds
        )
        total, count = self._pool_scale.sum(torch.stack([total, count]))
        count = torch.where(count > 0, count, 1.0)  # 0 where nothing interacts
        if slopes is not None:
            slopes = slopes.transpose(0, 1) / count.T[given.tags[:, 1], :, None].to(slopes.dtype)
        return (total / count).to(points.rows.dtype), slopes

    def _force(self, points: Points, given: ForceInputs, scale: Tensor) -> Tensor:
        """Force on the generated points, in units of scale [G, L]: [m, G, D]."""
        engine = self._engine(points, given, scale, 1.0)
        labels, by_force = given.labels_of_generated, self.rules.unit == "force"
        sums, pool = engine.log_sums(with_square=not by_force), self._pool_norm
        # In units of each scale, since a unit may be a mean over several of these.
        log_scale = scale.double().log()
        sums = replace(sums, square=sums.square - 2 * log_scale)
        log_unit = log_largest(sums, labels, pool) if by_force else log_length(sums, pool)
        force = engine.accumulate(sums, log_unit + log_scale, by_force or self.diagnostics)
        self.metrics = {}
        if self.diagnostics:
            rms = root_mean_square(force, labels, given.num_labels, pool)
            half = self._engine(points, given, scale, 0.5).row_logsumexp()
            order = math.sqrt(force.shape[-1]) if self.rules.per_dimension else 1.0
            whole = rms * order * log_unit.exp() if by_force else rms
            self._report(given, scale, whole, engine.row_logsumexp(), half)
        if by_force:
            force = with_unit_rms(force, labels, given.num_labels, pool)
        force = force.sum(0, keepdim=True)
        if self.settings.normalise_total:
            force = with_unit_rms(force, labels, given.num_labels, pool)
        return force[0].transpose(0, 1)

    def _engine(
        self, points: Points, given: ForceInputs, scale: Tensor, factor: float
    ) -> passes.StreamedForce | passes.DenseForce:
        """At temperatures times factor."""
        temperatures = scale.new_tensor(self.temperatures)[:, None, None] * factor
        settings = points, self.rules.affinity, -1 / (temperatures * scale), given.weights
        if self.impl == "dense" and self.keys_from != "ring":
            return passes.DenseForce(*settings)
        return passes.StreamedForce(*settings, Powers(self.temperatures))

    def _report(
        self, given: ForceInputs, scale: Tensor, rms: Tensor, lse: Tensor, lse_of_half: Tensor
    ) -> None:
        """Set `metrics`; lse [T, G, R] at each temperature, and at half of it."""
        m = given.num_generated
        # sum(softmax^2) is exp(lse at t/2) / exp(lse)^2; who sees nobody has 0 neighbours.
        neighbours = (2 * lse[..., :m] - lse_of_half[..., :m]).exp().nan_to_num(0.0)
        self.metrics = {"scale": self._plain_mean(scale)}
        for number, t in enumerate(self.temperatures):
            self.metrics[f"force_rms/{t:g}"] = self._plain_mean(rms[number])
            self.metrics[f"neighbours/{t:g}"] = self._plain_mean(neighbours[number])

    def _plain_mean(self, x: Tensor) -> Tensor:
        """Over all numbers of all ranks, of which some may have none."""
        return collectives.global_mean(x.double().sum(), x.numel(), self.group)


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
