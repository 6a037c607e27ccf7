"""Triplet losses with a margin, from each anchor's distances: how much every distance counts.

A triplet (anchor, positive p, negative n) costs ``relu(d_p + margin - d_n)``, which is linear in
the distances as long as the same triplets are active. So the sum over an anchor's triplets is
``sum_k weight[k] * d[k] + margin * active`` with whole numbers as weights, which are also its
derivative. They are found without going through the triplets: an anchor's P positives are sorted,
and each of its K columns takes its place among them, in O(K log P).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TripletWeights:
    """What the triplets of each anchor add up to; anchors are rows, the points they see columns.

    The sum of an anchor's losses is ``(weight * d).sum(1) + margin * active``. Weights reach K and
    mostly cancel, so this sum is best taken in fp64.
    """

    weight: Tensor  # [r, K], dtype of d: derivative of the anchor's sum by its distances
    active: Tensor  # [r] int64: triplets that violate the margin
    valid: Tensor  # [r] int64: triplets over which a mean is taken


def all_triplets(d: Tensor, positive: Tensor, negative: Tensor, margin: float) -> TripletWeights:
    """Weights of ``sum over positives p and negatives n of relu(d_p + margin - d_n)``.

    Args:
        d: [r, K] distances from every anchor, fp32 or fp64, finite.
        positive, negative: [r, K] bool, disjoint; a column may be neither (the anchor itself).
        margin: in units of d.

    Returns:
        weight: of a positive, how many negatives are nearer than ``d_p + margin``; of a negative,
        minus the number of positives for which it is. valid: positives times negatives. An anchor
        without positives or without negatives has zeros. Memory: a few matrices of [r, K].
    """
    d = d.contiguous()  # searchsorted would copy it, and warn
    reach, columns, is_real = _sorted_positives(d + margin, positive)
    out_of_reach = torch.searchsorted(reach, d, right=True)  # positives whose reach is <= d
    reached_by = (is_real.sum(1, keepdim=True) - out_of_reach).masked_fill_(~negative, 0)
    # Positive number q reaches the negatives that at most q positives do not reach.
    num_beyond = columns.new_zeros(d.shape[0], reach.shape[1] + 1)
    num_beyond.scatter_add_(1, out_of_reach, negative.to(num_beyond.dtype))
    reached = num_beyond.cumsum(1)[:, :-1].masked_fill(~is_real, 0)
    weight = reached_by.neg_().scatter_add_(1, columns, reached)
    return TripletWeights(
        weight=weight.to(d.dtype),
        active=reached.sum(1),
        valid=is_real.sum(1) * negative.sum(1),
    )


def semihard_triplets(
    d: Tensor, positive: Tensor, negative: Tensor, margin: float
) -> TripletWeights:
    """Weights of ``sum over positives p of relu(d_p + margin - d_n)``, one negative n for each p.

    n is the nearest negative farther than p (``d_n > d_p``), or where there is none the farthest
    negative (FaceNet, arXiv 1503.03832); of equally distant ones the first.

    Args:
        d: [r, K] distances from every anchor, fp32 or fp64, finite.
        positive, negative: [r, K] bool, disjoint; a column may be neither (the anchor itself).
        margin: in units of d.

    Returns:
        weight: 1 for an active positive, for a negative minus the number of active positives that
        chose it. valid: the positives, 0 for an anchor without negatives. Memory: a few matrices of
        [r, K].
    """
    d = d.contiguous()  # searchsorted would copy it, and warn
    paired = positive & negative.any(1, keepdim=True)
    near, columns, is_real = _sorted_positives(d, paired)
    if near.shape[1] == 0:  # no pair at all, perhaps no column to choose either
        none = columns.new_zeros(d.shape[0])
        return TripletWeights(weight=torch.zeros_like(d), active=none, valid=none)
    nearest = _first_nearest_farther(d, negative, near)
    farthest = d.masked_fill(~negative, -torch.inf).argmax(1, keepdim=True)
    chosen = torch.where(nearest < d.shape[1], nearest, farthest)
    is_active = is_real & (near + margin > d.gather(1, chosen))
    one = is_active.to(d.dtype)
    weight = torch.zeros_like(d).scatter_add_(1, columns, one).scatter_add_(1, chosen, -one)
    return TripletWeights(weight=weight, active=is_active.sum(1), valid=is_real.sum(1))


def _sorted_positives(values: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The positives of every row in ascending order: values, columns, and which are no padding.

    All three are [r, P] with P the most positives of a row; the padding comes last and is inf.
    """
    count = positive.sum(1, keepdim=True)
    most = int(count.max()) if len(count) else 0
    found, columns = values.masked_fill(~positive, torch.inf).topk(most, largest=False)
    return found, columns, torch.arange(most, device=values.device) < count


def _first_nearest_farther(d: Tensor, negative: Tensor, near: Tensor) -> Tensor:
    """For each of the ascending `near` [r, P] the column of the nearest negative farther than it.

    Of equally distant ones the first; K where there is none.
    """
    rows, num_columns = d.shape
    # Negatives between the same two positives fall into one bucket; each names its nearest.
    bucket = torch.searchsorted(near, d)
    shape = (rows, near.shape[1] + 1)
    distance = d.masked_fill(~negative, torch.inf)
    nearest = d.new_full(shape, torch.inf).scatter_reduce_(1, bucket, distance, "amin")
    column = torch.arange(num_columns, device=d.device).expand(rows, -1)
    is_nearest = negative & (d == nearest.gather(1, bucket))
    column = column.masked_fill(~is_nearest, num_columns)
    first = column.new_full(shape, num_columns).scatter_reduce_(1, bucket, column, "amin")
    # Positive number q is nearer than the negatives of all buckets after bucket q.
    best = nearest[:, 1:].flip(1).cummin(1).indices
    return first[:, 1:].flip(1).gather(1, best).flip(1)


def hard_triplets(d: Tensor, positive: Tensor, negative: Tensor, margin: float) -> TripletWeights:
    """Weights of ``relu(d_p + margin - d_n)``, p the farthest positive and n the nearest negative.

    Args:
        d: [r, K] distances from every anchor, fp32 or fp64, finite; K is 1 or more.
        positive, negative: [r, K] bool, disjoint; a column may be neither (the anchor itself).
        margin: in units of d.

    Returns:
        weight: 1 for p and -1 for n of an anchor that breaks the margin. valid: 1 for an anchor
        with a positive and a negative.
    """
    farthest, p = d.masked_fill(~positive, -torch.inf).max(1, keepdim=True)
    nearest, n = d.masked_fill(~negative, torch.inf).min(1, keepdim=True)
    is_valid = farthest.isfinite() & nearest.isfinite()
    is_active = is_valid & (farthest + margin > nearest)
    one = is_active.to(d.dtype)
    weight = torch.zeros_like(d).scatter_add_(1, p, one).scatter_add_(1, n, -one)
    return TripletWeights(weight, is_active.sum(1), is_valid.sum(1))


WEIGHTS = {"all": all_triplets, "hard": hard_triplets, "semihard": semihard_triplets}
