"""Log-sum-exps of -d/t over the keys of each row, and over the rows of each key, tile by tile.

T temperatures, G groups, L labels, R points of this rank.
"""

import torch
from torch import Tensor

from dist_contrastive.pairwise.affinity import SAFE, Affinity
from dist_contrastive.pairwise.points import Points, Tile
from dist_contrastive.pairwise.powers import Powers


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
