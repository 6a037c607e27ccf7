"""Sums, maxima, log-sum-exps and means over ranks."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.collectives.group import (
    Group,
    host_device,
    is_distributed,
    refuse_graph,
    world_size,
)

GradReduction = Literal["mean", "sum"]


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks, without gradient; x itself is left alone. Collectives: one all-reduce."""
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, group: Group = None) -> Tensor:
    """Largest value over ranks, without gradient. Collectives: one all-reduce."""
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def _all_reduce(x: Tensor, op: Any, group: Group) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed(group):
        dist.all_reduce(total, op=op, group=group)
    return total


def max_over_ranks(value: int, group: Group = None) -> int:
    """The largest of the ranks' values. Collectives: one all-reduce of one number, by the CPU."""
    if not is_distributed(group):
        return value
    return int(all_reduce_max(torch.tensor(value, device=host_device(group)), group))


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks of a tensor that has the same shape on all, differentiable.

    Backward: the gradients of all ranks' sums are summed, since each of them contains x.

    Collectives: one all-reduce; backward one.
    """
    return _SumOverRanks.apply(x, group) if is_distributed(group) else x


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph()
        return all_reduce_sum(grad, ctx.group), None


def global_mean(
    local_sum: Tensor,
    count: int | Tensor,
    group: Group = None,
    grad_reduction: GradReduction = "mean",
) -> Tensor:
    """Mean over all ranks' elements: sum of `local_sum` over ranks / sum of `count` over ranks.

    The value is the same on every rank; 0, with zero gradient, where there are no elements at all.
    Backward gives ``W / total count`` for each element with ``grad_reduction="mean"`` (for
    reducers that average over ranks, as DDP and ZeRO do) and ``1 / total count`` with ``"sum"``
    (for those that add up).

    Args:
        local_sum: scalar, this rank's sum. count: number of elements in it; may be 0.

    Collectives: one all-reduce of two numbers; none in backward.
    """
    return _GlobalMean.apply(local_sum, count, group, grad_reduction)


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local_sum: Tensor,
        count: int | Tensor,
        group: Group,
        grad_reduction: GradReduction,
    ) -> Tensor:
        pair = local_sum.new_zeros(2, dtype=torch.float64)
        pair[0], pair[1] = local_sum, count
        total, elements = all_reduce_sum(pair, group).unbind()
        ctx.group = group
        factor = world_size(group) if grad_reduction == "mean" else 1
        ctx.grad_sum = torch.where(elements > 0, factor / elements, 0.0).to(local_sum.dtype)
        return (total / elements.clamp(min=1)).to(local_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if is_distributed(ctx.group):
            refuse_graph()
        return grad * ctx.grad_sum, None, None, None


def logsumexp_over_ranks(partial: Tensor, group: Group = None) -> Tensor:
    """Elementwise ``log(sum over ranks of exp(partial))``, differentiable.

    Args:
        partial: any shape, the same on all ranks; -inf where a rank has nothing to add.

    Collectives: two all-reduces of the shape of partial (maximum, sum); backward one.
    """
    return _LogSumExpOverRanks.apply(partial, group) if is_distributed(group) else partial


class _LogSumExpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        shift = all_reduce_max(partial, group)
        shift = torch.where(shift.isfinite(), shift, 0.0)
        total = shift + all_reduce_sum((partial - shift).exp(), group).log()
        ctx.save_for_backward(partial, total)
        ctx.group = group
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph()
        partial, total = ctx.saved_tensors
        share = torch.where(partial == -torch.inf, 0.0, (partial - total).exp())
        return all_reduce_sum(grad, ctx.group) * share, None
