"""Exchanges of tensors between ranks, and their gradients.

Everything works without a process group too: then there is one rank and nothing is sent.

The gradient contract of the package rests on two functions of this file. `all_gather_rows` sums
the gradient of a row over all ranks and brings it home; `global_mean` makes every rank's backward
leave W times its share, so that the mean over ranks that DDP and ZeRO take is the exact gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_contrastive.errors import ConfigError, UserError

Group = Any  # torch.distributed.ProcessGroup, or None for all ranks
GradReduction = Literal["mean", "sum"]

# torch 2.13 renamed these two and warns about the old names; torch 2.11 knows only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MAX_DIMS = 6
_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
_DTYPES += [torch.uint8, torch.int8, torch.bool]


def is_distributed(group: Group = None) -> bool:
    """Whether there is more than one rank to talk to."""
    return world_size(group) > 1


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This rank's place in the group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_gather_rows(x: Tensor, group: Group = None) -> tuple[Tensor, int]:
    """Rows of all ranks, in the order of ranks, and where this rank's rows begin among them.

    Equals ``torch.cat([x of rank 0, x of rank 1, ...])``. Ranks may hold different numbers of
    rows, also none. Backward: the gradient of each row is summed over the ranks and returned to
    the rank that owns it (in fp32 where x is bf16 or fp16).

    Args:
        x: [b, ...], any number type; all but the first dimension equal on all ranks.
        group: process group; None means all ranks.

    Returns:
        rows [B, ...] with B the sum of b over ranks, and the offset of this rank's first row.

    Raises:
        ConfigError: dtypes, trailing shapes or requires_grad differ between ranks (on every rank,
            naming them, before any data is sent).

    Collectives: one all-gather of sizes, one of the rows; backward one reduce-scatter.
    """
    if not is_distributed(group):
        return x, 0
    sizes = _exchange_sizes(x, group)
    offset = sum(sizes[: rank(group)])
    return _AllGatherRows.apply(x, sizes, group), offset


def _exchange_sizes(x: Tensor, group: Group) -> list[int]:
    """Rows of every rank, after checking that the ranks' tensors fit together."""
    if x.dim() < 1 or x.dim() > _MAX_DIMS or x.dtype not in _DTYPES:
        raise ConfigError(
            f"a tensor of {x.dim()} dimensions and {x.dtype} cannot be gathered by rows; "
            f"give it 1 to {_MAX_DIMS} dimensions and one of {', '.join(map(str, _DTYPES))}"
        )
    needs_grad = int(x.requires_grad and torch.is_grad_enabled())
    trailing = [*x.shape[1:], *[-1] * (_MAX_DIMS - x.dim())]
    header = torch.tensor(
        [x.shape[0], needs_grad, _DTYPES.index(x.dtype), *trailing], device=x.device
    )
    headers = header.new_empty(world_size(group) * len(header))
    _all_gather(headers, header, group=group)
    table = headers.view(world_size(group), -1).tolist()
    if any(row[1:] != table[0][1:] for row in table):
        raise ConfigError("ranks hold tensors that do not fit together: " + _describe(table))
    return [row[0] for row in table]


def _describe(table: list[list[int]]) -> str:
    def one(row: list[int]) -> str:
        shape = ", ".join(["rows", *[str(size) for size in row[3:] if size >= 0]])
        grad = "with" if row[1] else "without"
        return f"[{shape}] {_DTYPES[row[2]]} {grad} gradient"

    ranks_of: dict[str, list[int]] = {}
    for number, row in enumerate(table):
        ranks_of.setdefault(one(row), []).append(number)
    parts = [f"{what} on rank {', '.join(map(str, who))}" for what, who in ranks_of.items()]
    return "; ".join(parts) + "; give every rank the same dtype, dimensions and requires_grad"


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, x.dtype
        padded = _pad_rows(x.contiguous(), max(sizes))
        out = padded.new_empty(len(sizes) * max(sizes), *x.shape[1:])
        _all_gather(out, padded, group=group)
        if min(sizes) == max(sizes):
            return out
        blocks = out.split(max(sizes)) if max(sizes) else []
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        most = max(ctx.sizes)
        grad = grad.to(accumulation_dtype(grad.dtype))
        padded = torch.cat([_pad_rows(block, most) for block in grad.split(ctx.sizes)])
        mine = grad.new_empty(most, *grad.shape[1:])
        _reduce_scatter(mine, padded.contiguous(), group=ctx.group)
        return mine[: ctx.sizes[rank(ctx.group)]].to(ctx.dtype), None, None


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, otherwise fp32: what scores and sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


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


def global_mean(
    local_sum: Tensor, count: int, group: Group = None, grad_reduction: GradReduction = "mean"
) -> Tensor:
    """Mean over all ranks' elements: sum of `local_sum` over ranks / sum of `count` over ranks.

    The value is the same on every rank. Backward gives ``W / total count`` for each element with
    ``grad_reduction="mean"`` (for reducers that average over ranks, as DDP and ZeRO do) and
    ``1 / total count`` with ``"sum"`` (for those that add up).

    Args:
        local_sum: scalar, this rank's sum. count: number of elements in it; may be 0.

    Collectives: one all-reduce of two numbers; none in backward.
    """
    return _GlobalMean.apply(local_sum, count, group, grad_reduction)


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local_sum: Tensor, count: int, group: Group, grad_reduction: GradReduction
    ) -> Tensor:
        pair = local_sum.new_tensor([0.0, count], dtype=torch.float64)
        pair[0] = local_sum
        total, elements = all_reduce_sum(pair, group).unbind()
        ctx.slope = (world_size(group) if grad_reduction == "mean" else 1) / elements.item()
        return (total / elements).to(local_sum.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.slope, None, None, None


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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        partial, total = ctx.saved_tensors
        share = torch.where(partial == -torch.inf, 0.0, (partial - total).exp())
        return all_reduce_sum(grad, ctx.group) * share, None


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """A small picklable value of every rank, in the order of ranks. Costs two all-gathers."""
    values = [value] * world_size(group)
    if is_distributed(group):
        dist.all_gather_object(values, value, group=group)
    return values


def max_over_ranks(value: int, device: torch.device, group: Group = None) -> int:
    """The largest of the ranks' values. Collectives: one all-reduce of one number."""
    return int(all_reduce_max(torch.tensor(value, device=device), group))


@contextmanager
def raised_together(group: Group = None) -> Iterator[None]:
    """An error that one rank raises inside is raised on all ranks, at the end of the block.

    For work that ranks do by themselves (open files, write a checkpoint), without collectives
    inside: a rank that failed alone would leave the others waiting in their next one. A rank's own
    error is raised again as it is; the others raise its class with "rank N: " before the message.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if is_distributed(group):
        told = None if own is None else (type(own), str(own))
        for number, failure in enumerate(gather_objects(told, group)):
            if failure is not None and own is None:
                kind, message = failure
                kind = kind if issubclass(kind, UserError) else RuntimeError
                raise kind(f"rank {number}: {message}")
    if own is not None:
        raise own
