"""Contrastive force on whole matrices: the specification, in plain torch.

Points x [G, K, D] are G independent groups of K points: generated ones, which move; fixed
negatives; positives p (data). The first two are the negatives n. Points of different labels do not
interact. At temperature t, with w[k] the weight of point k, and all means over a scope::

    scale = sum(d * w) / sum(w)                               over pairs; then x and d over scale
    A     = max(sqrt(softmax_rows(-d / t) * softmax_columns(-d / t)), floor) * w
    F[j]  = sum_i sum_{k != j} A[j, i] A[j, k] (p[i] - n[k])
          = S_neg[j] (A_pos (p - x[j]))[j] - S_pos[j] (A_neg (n - x[j]))[j],   S the row sums of A
    F     = F / sqrt(mean((d A)^2)), or F / sqrt(mean(F^2))
    loss  = mean((n - (n + sum of F over t).detach())^2) of the generated points

Weights are kept as logarithms, because A underflows where the quotient does not. Memory: a few
matrices of [G, K, K]. In fp64 this is what everything else is compared with.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Statistic = Callable[..., Tensor]
"""Reduction (x, dim) -> x without dim: a sum, a log-sum-exp, a maximum."""


class Force(NamedTuple):
    """Force on points, and numbers about it."""

    force: Tensor  # [G, K, D], summed over temperatures; 0 for points that are not generated
    rms: Tensor  # [T, G, K], root mean square over the scope of each point; paper: before division
    neighbours: Tensor  # [T, G, K], 1 / sum(softmax^2) of the points in each row's softmax


class Loss(NamedTuple):
    """Value of the loss, and what it is made of."""

    value: Tensor
    force: Tensor  # [G, K, D], in the coordinates that the loss compares
    scale: Tensor  # [G, K], mean distance of the scope of each point
    rms: Tensor  # [T, G, K]
    neighbours: Tensor  # [T, G, K]


def loss(
    points: Tensor,
    is_generated: Tensor,
    is_positive: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    temperatures: Sequence[float],
    square: bool,
    scale_scope: str,
    scale_gradient: bool,
    per_dimension: bool,
    **settings: Any,
) -> Loss:
    """Loss of all points, differentiable.

    Args:
        is_generated, is_positive: bool [K]. labels: [K] int64. weights: [G, K]; None: 1 each.
        square: whether A has a row for every point; else for generated ones alone.
        scale_scope: over what the mean distance is a mean: label, group or global.
        scale_gradient: whether gradients flow through the mean distance.
        per_dimension: whether coordinates, rather than distances, are of order 1: times sqrt(D).
        settings: the further arguments of `force`.
    """
    scale = mean_distance(points, is_generated, labels, weights, square, scale_scope)
    scaled = (points / scale[..., None]).detach()
    kinds = is_generated, is_positive
    result = force(
        scaled, *kinds, labels, weights, temperatures=temperatures, square=square, **settings
    )
    order = math.sqrt(points.shape[-1]) if per_dimension else 1.0
    unit = (scale if scale_gradient else scale.detach()) / order
    generated = (points / unit[..., None])[:, is_generated]
    error = generated - (generated + result.force[:, is_generated]).detach()
    return Loss(error.square().mean(), result.force, scale, order * result.rms, result.neighbours)


def distances(points: Tensor) -> Tensor:
    """Euclidean distances of all pairs, exactly 0 on the diagonal: [G, K, D] -> [G, K, K]."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(
    points: Tensor,
    is_generated: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    square: bool,
    scope: str,
) -> Tensor:
    """Mean of the distances that A has, each weighted as its key is, over the scope of each point:
    [G, K]; 1 where all points coincide."""
    in_matrix = (labels[:, None] == labels) & (square | is_generated)[:, None]
    pairs = in_matrix.to(points.dtype).expand(len(points), -1, -1)
    pairs = pairs if weights is None else pairs * weights[:, None]
    total = over_scope((distances(points) * pairs).sum(-1), labels, scope, torch.sum)
    count = over_scope(pairs.sum(-1), labels, scope, torch.sum)
    mean = total / torch.where(count > 0, count, 1.0)
    return torch.where(mean > 0, mean, 1.0)


@torch.no_grad()
def force(
    points: Tensor,
    is_generated: Tensor,
    is_positive: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    temperatures: Sequence[float],
    square: bool,
    mask_self: bool,
    divide_by: Literal["lengths", "force"],
    norm_scope: str,
    floor: float = 0.0,
    normalise_total: bool = False,
    of_processes: Callable[[Tensor], Tensor] = lambda x: x[None],
) -> Force:
    """Force on the generated points, in the coordinates as given.

    Args:
        mask_self: whether a point is left out of its own softmaxes.
        divide_by: ``lengths``: sqrt(mean((d A)^2)); ``force``: sqrt(mean(F^2)).
        norm_scope: over what that is a mean: label, group or global.
        floor: the smallest A before weights. normalise_total: divide the sum by its rms.
        of_processes: statistic [] of scope global -> those of all processes that share it [P].
    """
    statistic = partial(over_scope, labels=labels, scope=norm_scope, of_processes=of_processes)
    d = distances(points)
    own = torch.eye(len(labels), dtype=torch.bool, device=d.device)
    in_matrix = (labels[:, None] == labels) & (square | is_generated)[:, None]
    in_softmax = in_matrix & ~(own & mask_self)
    num_pairs = in_matrix.sum(-1).double().expand(points.shape[:-1])
    total, all_rms, neighbours = torch.zeros_like(points), [], []
    for t in temperatures:
        scores = (-d / t).masked_fill(~in_softmax, -torch.inf)
        log_a = (scores.log_softmax(-1) + scores.log_softmax(-2)) / 2
        log_a = log_a.masked_fill(~in_softmax | own, -torch.inf)
        if floor > 0:
            log_a = log_a.clamp(min=math.log(floor)).masked_fill(~in_matrix, -torch.inf)
        if weights is not None:
            log_a = log_a + weights.log()[:, None]
        if divide_by == "lengths":
            log_squares = (2 * (log_a + d.log())).logsumexp(-1).double()
            count = statistic(num_pairs, reduce=torch.sum).clamp(min=1)
            log_unit = (statistic(log_squares, reduce=torch.logsumexp) - count.log()) / 2
        else:  # the largest sum of weights, so that F neither over- nor underflows
            log_sizes = log_force_sizes(d, log_a, is_positive).double()
            log_sizes = log_sizes.masked_fill(~is_generated, -torch.inf)
            log_unit = statistic(log_sizes, reduce=torch.amax)
        f = force_over_unit(points, d, log_a, log_unit, is_positive)
        f = f.masked_fill(~is_generated[:, None], 0.0)
        rms = root_mean_square(f, is_generated, statistic)
        if divide_by == "force":
            f, rms = with_unit_rms(f, rms), rms * log_unit.exp()
        total += f
        all_rms.append(rms)
        neighbours.append((2 * scores.logsumexp(-1) - (2 * scores).logsumexp(-1)).exp())
    if normalise_total:
        total = with_unit_rms(total, root_mean_square(total, is_generated, statistic))
    return Force(total, torch.stack(all_rms), torch.stack(neighbours).nan_to_num(0.0))


def force_over_unit(
    points: Tensor, d: Tensor, log_a: Tensor, log_unit: Tensor, is_positive: Tensor
) -> Tensor:
    """F over a unit, from log A [G, K, K] and the logarithm of the unit [G, K]: [G, K, D]."""
    log_negative, log_positive = log_row_sums(log_a, is_positive)
    log_factor = torch.where(is_positive, log_negative[..., None], log_positive[..., None])
    # Points that coincide with x[j] add nothing to F[j]; their weights could only overflow.
    log_a = log_a.masked_fill(d == 0, -torch.inf)
    log_unit = log_unit.masked_fill(log_unit == -torch.inf, torch.inf).to(d.dtype)
    weight = (log_a + log_factor - log_unit[..., None]).exp()
    weight = torch.where(is_positive, weight, -weight)
    return weight @ points - weight.sum(-1, keepdim=True) * points


def log_force_sizes(d: Tensor, log_a: Tensor, is_positive: Tensor) -> Tensor:
    """Logarithm of the sum of the weights that F has in it: [G, K]."""
    negative, positive = log_row_sums(log_a, is_positive)
    others = log_row_sums(log_a.masked_fill(d == 0, -torch.inf), is_positive)
    return torch.logaddexp(positive + others[0], negative + others[1])


def log_row_sums(log_a: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the sums of A over negatives, and over positives: [G, K] each."""
    negative = log_a.masked_fill(is_positive, -torch.inf)
    return negative.logsumexp(-1), log_a.masked_fill(~is_positive, -torch.inf).logsumexp(-1)


def root_mean_square(f: Tensor, is_generated: Tensor, statistic: Callable[..., Tensor]) -> Tensor:
    """Root of the mean over generated points and dimensions, fp64: [G, K, D] -> [G, K]."""
    count = (is_generated * f.shape[-1]).double().expand(f.shape[:-1])
    squares = statistic(f.double().square().sum(-1), reduce=torch.sum)
    return (squares / statistic(count, reduce=torch.sum).clamp(min=1)).sqrt()


def with_unit_rms(f: Tensor, rms: Tensor) -> Tensor:
    """F over its root mean square; 0 below the dtype's normal numbers, which have lost digits."""
    factor = torch.where(rms >= torch.finfo(f.dtype).tiny, 1 / rms, 0.0)
    return f * factor[..., None].to(f.dtype)


def over_scope(
    x: Tensor,
    labels: Tensor,
    scope: str,
    reduce: Statistic,
    of_processes: Callable[[Tensor], Tensor] = lambda x: x[None],
) -> Tensor:
    """Reduction of numbers of points [G, K] over all points in the scope of each: [G, K]."""
    if scope == "label":
        empty = 0.0 if reduce is torch.sum else -torch.inf
        differs = labels[:, None] != labels
        return reduce(x[:, None].expand(-1, len(labels), -1).masked_fill(differs, empty), -1)
    if scope == "group":
        return reduce(x, -1)[:, None].expand_as(x)
    return reduce(of_processes(reduce(x.flatten(), 0)), 0).expand_as(x)
