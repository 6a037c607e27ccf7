"""Reductions of numbers of points over the points of each label: with no atomics, in one order.

Labels are ids from 0 to below L; with L = 1 there is one label, and ids are not looked at.
"""

import torch
from torch import Tensor

from dist_contrastive.losses.force.kernel_calls import launch, tile_of


def label_counts(labels: Tensor, num_labels: int) -> Tensor:
    """Numbers of points [n] of each label: [L] fp64."""
    counts = torch.zeros(num_labels, dtype=torch.float64, device=labels.device)
    if num_labels == 1:
        return counts.fill_(len(labels))
    ones = torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    return counts.scatter_add_(0, labels.long(), ones)  # of whole numbers, in any order exact


def label_sums(x: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Sums over the points of each label: [..., n] fp64 -> [..., L]."""
    if num_labels == 1:
        return x.sum(-1, keepdim=True)
    ordered, order = labels.long().sort(stable=True)
    number = torch.arange(num_labels, device=x.device)
    begins, ends = (torch.searchsorted(ordered, number, right=y) for y in (False, True))
    sums, tile = x.new_empty(*x.shape[:-1], num_labels), tile_of("segments", 8)
    launch(
        "segment_sum",
        sums.numel(),
        tile,
        [x.index_select(-1, order), begins, ends, sums],
        [len(labels), num_labels],
        {"BN": tile.keys},
    )
    return sums


def label_log_sums(x: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Log-sum-exps over the points of each label, likewise; -inf where there are none."""
    if num_labels == 1:
        return x.logsumexp(-1, keepdim=True)
    index = labels.long().expand(x.shape)
    top = x.new_full((*x.shape[:-1], num_labels), -torch.inf)
    top = top.scatter_reduce_(-1, index, x, "amax")
    top = torch.where(top == -torch.inf, 0.0, top)
    return top + label_sums((x - top.gather(-1, index)).exp(), labels, num_labels).log()
