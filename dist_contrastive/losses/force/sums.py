"""Log-sum-exps over the keys of tiles, and what the force is divided by: sums over a scope.

T temperatures, G groups, L labels, R points of this rank, of which m are generated.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive import collectives
from dist_contrastive.collectives import Group
from dist_contrastive.losses.force.affinity import SAFE, Affinity, Powers
from dist_contrastive.losses.force.points import Points, Tile

Scope = Literal["label", "group", "global"]


def log_sum_exps(
    points: Points, affinity: Affinity, slope: Tensor, powers: Powers
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exps of -d/t [T, G, R], over keys for each row and over rows for each key; and the
    distances of the nearest points that take part in these [G, R]. For square A both are the same.
    """
    shape = *slope.shape[:2], points.rows.shape[1]
    # A point that is in its own softmax adds exp(0).
    lse = [points.rows.new_full(shape, -torch.inf if affinity.mask_self else 0.0)]
    near = [points.rows.new_full(shape[1:], torch.inf)]
    if not affinity.square:
        lse, near = [*lse, lse[0].clone()], [*near, near[0].clone()]
    for tile, _ in points.tiles(affinity.in_softmax, once=affinity.in_softmax):
        by_rows, by_keys = _tile_logsumexp(tile, slope, powers)
        found = [(tile.row_kind, tile.kind, tile.r, by_rows, tile.nearest)]
        if by_keys is not None:
            found.append((tile.kind, tile.row_kind, tile.k, by_keys, tile.nearest_of_keys))
        for row_kind, key_kind, r, part, nearest in found:
            for side in affinity.sides(row_kind, key_kind):
                add_log(lse[side], (slice(None), tile.g, r), part)
                near[side][tile.g, r] = torch.minimum(near[side][tile.g, r], nearest)
    return (lse[0], lse[-1]), (near[0], near[-1])


def _tile_logsumexp(tile: Tile, slope: Tensor, powers: Powers) -> tuple[Tensor, Tensor | None]:
    """Of -d/t over the keys of a tile [T, g, r], and over its rows for the keys [T, g, k] where the
    mirrored tile is left out."""
    slope, d, coinciding = slope[:, tile.g, tile.label], tile.d, tile.coinciding
    by_keys: Tensor | None = None
    if not tile.is_mirrored:
        by_rows = _logsumexp(d, tile.nearest, slope, powers)
    elif _is_even(tile, slope):
        by_rows, by_keys = _logsumexps(tile, slope, powers)
    else:
        by_rows = _logsumexp(d, tile.nearest, slope, powers)
        by_keys = _logsumexp(d.mT.contiguous(), tile.nearest_of_keys, slope, powers)
    if coinciding is not None:
        by_rows = _with_coinciding(by_rows, coinciding)
        by_keys = None if by_keys is None else _with_coinciding(by_keys, coinciding.mT)
    return by_rows, by_keys


def _logsumexp(d: Tensor, nearest: Tensor, slope: Tensor, powers: Powers) -> Tensor:
    """Of slope * d over keys, from slope [T, g] and d [g, r, k]: [T, g, r]. Seen from the nearest
    key, no sum underflows."""
    near = nearest.masked_fill(nearest == torch.inf, 0.0)
    lse = torch.empty(len(slope), *near.shape, dtype=near.dtype, device=near.device)
    seen = torch.sub(d, near[..., None], out=powers.scratch.like("x", d))
    for t, exponential in powers.exponentials(seen, slope):
        lse[t] = exponential.sum(-1)
    return lse.log_().add_(slope[..., None] * near)


def _is_even(tile: Tile, slope: Tensor) -> bool:
    """Whether nearest distances are alike enough for `_logsumexps`; infinite ones are not."""
    nearest = torch.cat([tile.nearest, tile.nearest_of_keys], dim=-1)
    spread = nearest.amax() - nearest.amin()
    return bool(spread * -slope.amin() < 2 * SAFE)


def _logsumexps(tile: Tile, slope: Tensor, powers: Powers) -> tuple[Tensor, Tensor]:
    """`_logsumexp` of rows and of keys from the same exponentials, seen from half of both nearest
    distances."""
    near_row, near_key = tile.nearest, tile.nearest_of_keys
    low = torch.minimum(near_row.amin(), near_key.amin())
    half = slope[..., None] / 2
    row_factor, key_factor = ((half * (x - low)).exp_() for x in (near_row, near_key))
    lse_row, lse_key = torch.empty_like(row_factor), torch.empty_like(key_factor)
    x = torch.sub(tile.d, (near_row / 2)[..., None], out=powers.scratch.like("x", tile.d))
    x -= (near_key / 2)[..., None, :]
    for t, exponential in powers.exponentials(x, slope):
        lse_row[t] = (exponential @ key_factor[t, ..., None])[..., 0]
        lse_key[t] = (row_factor[t, ..., None, :] @ exponential)[..., 0, :]
    return lse_row.log_().add_(half * (near_row + low)), lse_key.log_().add_(
        half * (near_key + low)
    )


def _with_coinciding(lse: Tensor, coinciding: Tensor) -> Tensor:
    """With the keys at a distance of 0, each of which adds exp(0)."""
    return torch.logaddexp(lse, coinciding.sum(-1).to(lse.dtype).log())


def add_log(sums: Tensor, place: tuple[slice | int, ...], part: Tensor) -> None:
    """log(exp(sums) + exp(part)) at a place, in place."""
    sums[place] = torch.logaddexp(sums[place], part)


@dataclass(frozen=True)
class LogSums:
    """Logarithms of sums over the keys of a row, and over pairs."""

    negative: Tensor  # [T, G, R], sum of A over negatives other than the row itself
    positive: Tensor  # [T, G, R], sum of A over positives
    moving: Tensor  # [T, G, R], sum of the weights that the force moves the row with
    square: Tensor  # [T, G, L] fp64, sum of (d * A)**2 over all rows and keys, if it was asked for
    num_pairs: Tensor  # [L] fp64, over how many pairs of a group; not a logarithm


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
