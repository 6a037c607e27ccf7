"""The specification: every reduction on the whole matrix, in plain torch."""

import math

import torch
from torch import Tensor

from dist_contrastive.pairwise.keys import gathered
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.reductions import Parts, Reduction


def reduce(reduction: Reduction, pairs: Pairs) -> Parts:
    """See `pairwise.reduce`; keys gathered. Memory: a few matrices of [b, B]."""
    keys = gathered(pairs, pairs.keys)
    tags = None if pairs.tags is None else gathered(pairs, pairs.tags)
    row_parts, key_parts = reduction.parts(pairs.tile(slice(0, len(pairs.rows)), 0, keys, tags))
    if pairs.keys_from != "local":
        joined = zip(reduction.joins[1], key_parts, strict=True)
        key_parts = tuple(join.over_ranks(part, pairs.group) for join, part in joined)
    mine = slice(pairs.start, pairs.start + len(pairs.keys))
    return row_parts, tuple(part[mine] for part in key_parts)


def distances(points: Tensor) -> Tensor:
    """Euclidean distances of all pairs, exactly 0 on the diagonal: [..., K, D] -> [..., K, K]."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def force(
    points: Tensor,
    num_negative: int,
    temperatures: tuple[float, ...],
    mask_diagonal: bool,
    labels: Tensor | None = None,
) -> Tensor:
    """Contrastive force on the first `num_negative` points, summed over temperatures.

    Per temperature t: ``A = sqrt(softmax_rows(-d/t) * softmax_columns(-d/t))``,
    ``F_j = sum_i sum_{k != j} A[j, i] A[j, k] (p_i - n_k) / sqrt(mean((d * A)**2))``.
    Written with logarithms, because A underflows where the quotient does not.

    Args:
        points: [G, K, D], in each group the negatives (generated) before the positives (data).
        mask_diagonal: whether a point leaves itself out of the softmaxes.
        labels: [K] or None; points with different labels do not interact.

    Returns:
        [G, num_negative, D]; 0 where points have nothing to interact with. Memory: a few [G, K, K].
    """
    number = torch.arange(points.shape[-2], device=points.device)
    is_self = number[:, None] == number
    apart = labels[:, None] != labels if labels is not None else torch.zeros_like(is_self)
    is_positive = number >= num_negative
    d = distances(points)
    total = torch.zeros_like(points[:, :num_negative])
    for temperature in temperatures:
        scores = (-d / temperature).masked_fill(apart | (is_self & mask_diagonal), -torch.inf)
        log_a = (scores.log_softmax(-1) + scores.log_softmax(-2)) / 2
        log_a = log_a.masked_fill(scores == -torch.inf, -torch.inf)
        log_sum_square = (2 * (log_a + d.log())).flatten(1).logsumexp(-1)
        log_norm = (log_sum_square - math.log(int((~apart).sum()))) / 2
        log_a = log_a.masked_fill(is_self, -torch.inf)
        log_pos = log_a.masked_fill(~is_positive, -torch.inf)
        log_neg = log_a.masked_fill(is_positive, -torch.inf)
        # F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j, S the row sums of A.
        # Points that coincide with x_j add nothing to it; their weights could only overflow.
        log_s_neg, log_s_pos = log_neg.logsumexp(-1), log_pos.logsumexp(-1)
        log_pos, log_neg = (x.masked_fill(d == 0, -torch.inf) for x in (log_pos, log_neg))
        pull = torch.exp(log_pos + (log_s_neg - log_norm[:, None])[..., None])
        push = torch.exp(log_neg + (log_s_pos - log_norm[:, None])[..., None])
        weight = torch.where((log_norm > -torch.inf)[:, None, None], pull - push, 0.0)
        force = weight @ points - weight.sum(-1, keepdim=True) * points
        total += force[:, :num_negative]
    return total
