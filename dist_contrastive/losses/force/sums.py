"""Log-sum-exps over keys, tile by tile; and sums over a scope, by which the force is divided.

T temperatures, G groups, L labels, R points of this rank, of which m are generated.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Group
from dist_contrastive.losses.force.affinity import SAFE, ForceRules, Powers, Scope
from dist_contrastive.losses.force.points import Points, PointTile


def log_sum_exps(
    points: Points, rules: ForceRules, neg_inv_temperature: Tensor, powers: Powers
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exps of -d/t [T, G, R], over keys for each row and over rows for each key; and the
    distances of the nearest points that take part in these [G, R]. For square A both are the same.

    Args:
        neg_inv_temperature: -1/t in units of the coordinates [T, G, L].

    Collectives: one round over the keys.
    """
    shape = *neg_inv_temperature.shape[:2], points.rows.shape[1]
    # A point that is in its own softmax adds exp(0).
    lse = [points.rows.new_full(shape, -torch.inf if rules.mask_self else 0.0)]
    nearest = [points.rows.new_full(shape[1:], torch.inf)]
    if not rules.square:
        lse, nearest = [*lse, lse[0].clone()], [*nearest, nearest[0].clone()]
    for tile, _ in points.tiles(rules.in_softmax, halved=rules.in_softmax):
        by_rows, by_keys = _tile_logsumexps(tile, neg_inv_temperature, powers)
        parts = [(tile.row_kind, tile.key_kind, tile.r, by_rows, tile.nearest)]
        if by_keys is not None:
            parts.append((tile.key_kind, tile.row_kind, tile.k, by_keys, tile.nearest_of_keys))
        for row_kind, key_kind, r, part, tile_nearest in parts:
            for side in rules.softmax_sides(row_kind, key_kind):
                add_log(lse[side], (slice(None), tile.g, r), part)
                place = nearest[side][tile.g, r]
                nearest[side][tile.g, r] = torch.minimum(place, tile_nearest)
    return (lse[0], lse[-1]), (nearest[0], nearest[-1])


def _tile_logsumexps(
    tile: PointTile, neg_inv_temperature: Tensor, powers: Powers
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exps over the keys of a tile [T, g, r], and over its rows for the keys [T, g, k]
    where the transposed tile is left out."""
    factor, coinciding = neg_inv_temperature[:, tile.g, tile.label], tile.coinciding
    by_keys: Tensor | None = None
    if not tile.is_off_diagonal:
        by_rows = _logsumexp(tile.d, tile.nearest, factor, powers)
    elif _has_even_distances(tile, factor):
        by_rows, by_keys = _logsumexp_both_ways(tile, factor, powers)
    else:
        by_rows = _logsumexp(tile.d, tile.nearest, factor, powers)
        by_keys = _logsumexp(tile.d.mT.contiguous(), tile.nearest_of_keys, factor, powers)
    if coinciding is not None:
        by_rows = _with_coinciding(by_rows, coinciding)
        by_keys = None if by_keys is None else _with_coinciding(by_keys, coinciding.mT)
    return by_rows, by_keys


def _logsumexp(d: Tensor, nearest: Tensor, factor: Tensor, powers: Powers) -> Tensor:
    """Log-sum-exp of factor * d over keys, from factor [T, g] and d [g, r, k]: [T, g, r]. Seen from
    the nearest key, no sum underflows."""
    nearest = nearest.masked_fill(nearest == torch.inf, 0.0)
    lse = torch.empty(len(factor), *nearest.shape, dtype=nearest.dtype, device=nearest.device)
    shifted = torch.sub(d, nearest[..., None], out=powers.scratch.like("x", d))
    for t, exponential in powers.exponentials(shifted, factor):
        lse[t] = exponential.sum(-1)
    return lse.log_().add_(factor[..., None] * nearest)


def _has_even_distances(tile: PointTile, factor: Tensor) -> bool:
    """Whether nearest distances are alike enough for `_logsumexp_both_ways`; infinite ones never
    are."""
    nearest = torch.cat([tile.nearest, tile.nearest_of_keys], dim=-1)
    spread = nearest.amax() - nearest.amin()
    return bool(spread * -factor.amin() < 2 * SAFE)


def _logsumexp_both_ways(tile: PointTile, factor: Tensor, powers: Powers) -> tuple[Tensor, Tensor]:
    """`_logsumexp` of rows and of keys from the same exponentials, seen from half of both nearest
    distances."""
    of_rows, of_keys = tile.nearest, tile.nearest_of_keys
    lowest = torch.minimum(of_rows.amin(), of_keys.amin())
    half = factor[..., None] / 2
    row_factor, key_factor = ((half * (x - lowest)).exp_() for x in (of_rows, of_keys))
    lse_row, lse_key = torch.empty_like(row_factor), torch.empty_like(key_factor)
    x = torch.sub(tile.d, (of_rows / 2)[..., None], out=powers.scratch.like("x", tile.d))
    x -= (of_keys / 2)[..., None, :]
    for t, exponential in powers.exponentials(x, factor):
        lse_row[t] = (exponential @ key_factor[t, ..., None])[..., 0]
        lse_key[t] = (row_factor[t, ..., None, :] @ exponential)[..., 0, :]
    lse_row.log_().add_(half * (of_rows + lowest))
    return lse_row, lse_key.log_().add_(half * (of_keys + lowest))


def _with_coinciding(lse: Tensor, coinciding: Tensor) -> Tensor:
    """Log-sum-exps with the keys at a distance of 0, each of which adds exp(0)."""
    return torch.logaddexp(lse, coinciding.sum(-1).to(lse.dtype).log())


def add_log(sums: Tensor, place: tuple[slice | int, ...], part: Tensor) -> None:
    """log(exp(sums) + exp(part)) at a place, in place."""
    sums[place] = torch.logaddexp(sums[place], part)


@dataclass(frozen=True)
class LogSums:
    """Logarithms of sums over the keys of a row, and over pairs."""

    negative: Tensor  # [T, G, R], sum of A over negatives other than the row itself
    positive: Tensor  # [T, G, R], sum of A over positives
    apart: tuple[Tensor, Tensor]  # both likewise, over keys that do not coincide with the row
    square: Tensor  # [T, G, L] fp64, sum of (d * A)**2 over all rows and keys, if it was asked for
    num_pairs: Tensor  # [L] fp64, over how many pairs of a group; not a logarithm

    def of_force(self) -> Tensor:
        """Logarithms of the sums of the weights that the force on a row has in it: [T, G, R]."""
        negative, positive = self.apart
        return torch.logaddexp(self.positive + negative, self.negative + positive)


class ByLabel(Protocol):
    """Reductions of numbers of the generated points of this rank over the points of each label."""

    labels: Tensor  # [m]
    num_labels: int

    def counts(self) -> Tensor:
        """Numbers of points: [L] fp64."""

    def sums(self, x: Tensor) -> Tensor:
        """Sums: [..., m] fp64 -> [..., L]."""

    def maxima(self, x: Tensor) -> Tensor:
        """The largest, likewise; -inf where there are none."""


class PlainByLabel:
    """`ByLabel` by operators of torch, whose sums on CUDA would have no order."""

    def __init__(self, labels: Tensor, num_labels: int) -> None:
        self.labels, self.num_labels = labels, num_labels

    def counts(self) -> Tensor:
        """Numbers of points: [L] fp64."""
        return self.sums(torch.ones_like(self.labels, dtype=torch.float64))

    def sums(self, x: Tensor) -> Tensor:
        """Sums: [..., m] fp64 -> [..., L]."""
        return x.new_zeros(*x.shape[:-1], self.num_labels).index_add_(-1, self.labels, x)

    def maxima(self, x: Tensor) -> Tensor:
        """The largest, likewise; -inf where there are none."""
        largest = x.new_full((*x.shape[:-1], self.num_labels), -torch.inf)
        return largest.scatter_reduce_(-1, self.labels.expand(x.shape), x, "amax")


@dataclass(frozen=True)
class Pool:
    """Statistics of groups and labels [..., G, L] as those of a scope: one for each label, one
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

    def of_processes(self, x: Tensor) -> Tensor:
        """A statistic of scope global [] as `spec.force` asks for it: [W] where ranks have groups
        of their own; else one process has all points."""
        if not self.own_groups:
            return x[None]
        num_ranks = collectives.world_size(self.group)
        return collectives.gather_rows(x[None], (1,) * num_ranks, self.group)


def log_mean_length(sums: LogSums, log_scale: Tensor, pool: Pool) -> Tensor:
    """log sqrt(mean((d A)^2)): [T, G, L] fp64, of lengths in units of the scale [G, L]."""
    num_pairs = pool.sum(sums.num_pairs.expand(log_scale.shape))
    log_square = pool.logsumexp(sums.square - 2 * log_scale)
    return (log_square - num_pairs.clamp(min=1).log()) / 2


def log_largest_force(sums: LogSums, by_label: ByLabel, pool: Pool) -> Tensor:
    """Logarithm of the largest sum of weights that a force has in it: [T, G, L] fp64."""
    of_rows = sums.of_force()[..., : len(by_label.labels)].double()
    return pool.max(by_label.maxima(of_rows))


def root_mean_square(force: Tensor, by_label: ByLabel, pool: Pool) -> Tensor:
    """Over points and dimensions of each force [T, G, m, D]: [T, G, L] fp64."""
    squares = torch.linalg.vector_norm(force, dim=-1, dtype=torch.float64).square()
    counts = (by_label.counts() * force.shape[-1]).expand(force.shape[1], -1)
    total = pool.sum(by_label.sums(squares))
    return (total / pool.sum(counts).clamp(min=1)).sqrt()


def with_unit_rms(force: Tensor, by_label: ByLabel, pool: Pool) -> Tensor:
    """Forces [T, G, m, D] over their root mean square; 0 where that is 0, or too small for the
    dtype, which has lost the digits of such numbers."""
    rms = root_mean_square(force, by_label, pool)
    factor = torch.where(rms >= torch.finfo(force.dtype).tiny, 1 / rms, 0.0).to(force.dtype)
    return force * (factor if factor.shape[-1] == 1 else factor[..., by_label.labels])[..., None]


class AttachGradient(torch.autograd.Function):
    """scale [G, L] as a function of the rows [R, G, D], with its derivative by these."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, scale: Tensor, grad_rows: Tensor, labels: Tensor, pool: Any
    ) -> Tensor:
        ctx.save_for_backward(grad_rows, labels)
        ctx.pool = pool
        return scale.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        grad_rows, labels = ctx.saved_tensors
        return ctx.pool(grad).T[labels, :, None] * grad_rows, None, None, None, None
