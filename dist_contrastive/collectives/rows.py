"""Rows of all ranks at once: gathered, reduce-scattered, fetched; with their gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.collectives.group import (
    Group,
    accumulation_dtype,
    all_gather_single,
    host_device,
    is_distributed,
    rank,
    reduce_scatter_single,
    refuse_graph,
)
from dist_contrastive.collectives.headers import DTYPES, MAX_DIMS, describe, exchange_headers
from dist_contrastive.errors import ConfigError


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
    headers = [header for header in exchange_headers({"x": x}, group)["x"] if header is not None]
    if any(header.dtype is None for header in headers):
        raise ConfigError(
            f"rows cannot be gathered: {describe([*headers])}; give dense tensors of 1 to "
            f"{MAX_DIMS} dimensions and one of {', '.join(map(str, DTYPES))}"
        )
    if any(header.fits() != headers[0].fits() for header in headers):
        raise ConfigError(
            f"ranks hold tensors that do not fit together: {describe([*headers])}; give every "
            f"rank the same dtype, dimensions and requires_grad"
        )
    sizes = tuple(header.rows for header in headers)
    return gather_rows(x, sizes, group), sum(sizes[: rank(group)])


def gather_rows(x: Tensor, sizes: tuple[int, ...], group: Group = None) -> Tensor:
    """`all_gather_rows` for ranks that know each other's sizes already: [b, ...] to [B, ...]."""
    return _GatherRows.apply(x, sizes, group) if is_distributed(group) else x


def gather_on_host(x: Tensor, sizes: tuple[int, ...], group: Group = None) -> Tensor:
    """`gather_rows` of what the host knows, on the CPU: no rank waits for what a GPU has to do."""
    return gather_rows(x.to(host_device(group)), sizes, group).cpu() if is_distributed(group) else x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, x.dtype
        padded = _pad_rows(x.contiguous(), max(sizes))
        out = padded.new_empty(len(sizes) * max(sizes), *x.shape[1:])
        all_gather_single(out, padded, group=group)
        if min(sizes) == max(sizes):
            return out
        blocks = out.split(max(sizes)) if max(sizes) else []
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph()
        grad = grad.to(accumulation_dtype(grad.dtype))
        return reduce_scatter_rows(grad, ctx.sizes, ctx.group).to(ctx.dtype), None, None


def reduce_scatter_rows(x: Tensor, sizes: tuple[int, ...], group: Group = None) -> Tensor:
    """The sum of all ranks' x [B, ...], of which each rank gets its own rows [b, ...].

    No gradient. Collectives: one reduce-scatter.
    """
    if not is_distributed(group):
        return x
    most = max(sizes)
    if min(sizes) != most:
        x = torch.cat([_pad_rows(block, most) for block in x.split(sizes)])
    local = x.new_empty(most, *x.shape[1:])
    reduce_scatter_single(local, x.contiguous(), group=group)
    return local[: sizes[rank(group)]]


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def fetch_rows(x: Tensor, index: Tensor, sizes: tuple[int, ...], group: Group = None) -> Tensor:
    """Some rows of all ranks' x: ``all_gather_rows(x)[index]``, without the gather.

    Backward: the gradient of a row is summed over all who fetched it and returned to its owner.

    Args:
        x: [b, D]. index: [m] int64 rows among those of all ranks; m may differ between ranks.
        sizes: b of every rank.

    Returns:
        [m, D]. Memory: O(b + m), whatever the number of ranks.

    Collectives: three all-to-alls (how many, which, the rows); backward one.
    """
    if not is_distributed(group):
        return x.index_select(0, index)
    ends = torch.tensor(sizes, device=x.device).cumsum(0)
    owner = torch.searchsorted(ends, index, right=True)
    order = owner.argsort(stable=True)
    asked = torch.bincount(owner, minlength=len(sizes))
    requested_here = torch.empty_like(asked)
    dist.all_to_all_single(requested_here, asked, group=group)
    incoming, outgoing = asked.tolist(), requested_here.tolist()
    starts = ends - torch.tensor(sizes, device=x.device)
    wanted = (index - starts[owner])[order]
    wanted_here = _all_to_all(wanted, incoming, outgoing, group)
    rows = _ExchangeRows.apply(x.index_select(0, wanted_here), outgoing, incoming, group)
    return rows.index_select(0, order.argsort())


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: list[int], into: list[int], group: Group) -> Tensor:
        ctx.out, ctx.into, ctx.group = out, into, group
        return _all_to_all(x, out, into, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph()
        return _all_to_all(grad, ctx.into, ctx.out, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Rows, of which the first sent[0] go to rank 0, the next sent[1] to rank 1, and so on."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
