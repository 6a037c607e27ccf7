"""What every rank is about to send, told to all before any data is.

On gloo ranks that send different shapes end each other's processes; with other backends they hang
or mix up rows. So each rank first says what it holds, and every rank sees the same table: whatever
is wrong is then raised on all of them, with the same words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.collectives.group import (
    Group,
    accumulation_dtype,
    all_gather_single,
    world_size,
)

MAX_DIMS = 6
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.uint8, torch.int8, torch.bool]

_ABSENT, _UNKNOWN = -1, -2  # nothing given; something that cannot be sent
_FIXED = 6  # numbers before the trailing dimensions


@dataclass(frozen=True)
class RowHeader:
    """One rank's tensor, without its numbers."""

    rows: int
    trailing: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that cannot be sent
    needs_grad: bool
    bad_rows: int  # rows that hold NaN or infinity, or numbers whose squares overflow
    lowest: int  # of integers; 0 for others

    @property
    def fits(self) -> tuple[object, ...]:
        """What must be equal on all ranks."""
        return self.trailing, self.dtype, self.needs_grad

    def __str__(self) -> str:
        if self.dtype is None:
            return "something that is no dense tensor of a known dtype"
        shape = ", ".join(["rows", *map(str, self.trailing)])
        return f"[{shape}] {self.dtype} {'with' if self.needs_grad else 'without'} gradient"


def exchange_headers(
    tensors: Mapping[str, Tensor | None], group: Group = None
) -> dict[str, list[RowHeader | None]]:
    """For every name the headers of all ranks, in the order of ranks; None where one has nothing.

    Args:
        tensors: the same names on all ranks. What is no tensor, or none that could be sent, is told
            as a header without dtype, so that no rank stops while others wait.

    Collectives: one all-gather of a few numbers (none without other ranks), which waits for the
    device, as every size that is needed to allocate memory does.
    """
    codes = torch.tensor([_encode(x) for x in tensors.values()], dtype=torch.int64)
    if world_size(group) > 1:
        devices = [x.device for x in tensors.values() if isinstance(x, Tensor)]
        mine = codes.flatten().to(devices[0] if devices else _device_of(group))
        everyones = mine.new_empty(world_size(group) * len(mine))
        all_gather_single(everyones, mine, group=group)
        codes = everyones.view(world_size(group), len(tensors), -1).transpose(0, 1)
    else:
        codes = codes[:, None]
    table = codes.tolist()
    return {name: [_decode(c) for c in line] for name, line in zip(tensors, table, strict=True)}


def describe(headers: list[RowHeader | None]) -> str:
    """Who holds what: ``[rows, 3] torch.float32 with gradient on rank 0; nothing on rank 1``."""
    ranks_of: dict[str, list[int]] = {}
    for number, header in enumerate(headers):
        ranks_of.setdefault("nothing" if header is None else str(header), []).append(number)
    parts = [f"{what} on rank {', '.join(map(str, who))}" for what, who in ranks_of.items()]
    return "; ".join(parts)


def _device_of(group: Group) -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _encode(x: Tensor | None) -> list[int]:
    if x is None:
        return [_ABSENT, *[0] * (_FIXED + MAX_DIMS - 2)]
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dtype not in DTYPES:
        return [1, _UNKNOWN, *[0] * (_FIXED + MAX_DIMS - 3)]
    dims = min(x.dim(), MAX_DIMS + 1)  # one too many is told as such
    trailing = list(x.shape[1:MAX_DIMS])
    trailing += [0] * (MAX_DIMS - 1 - len(trailing))
    rows = x.shape[0] if dims else 0
    needs_grad = int(x.requires_grad and torch.is_grad_enabled())
    numbers = [rows, needs_grad, _count_bad_rows(x), _lowest(x)]
    return [dims, DTYPES.index(x.dtype), *numbers, *trailing]


def _lowest(x: Tensor) -> int:
    return 0 if x.is_floating_point() or x.numel() == 0 else int(x.min())


def _count_bad_rows(x: Tensor) -> int:
    if not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        return 0
    # NaN and infinity survive in the extremes of a row, which cost no copy of x.
    low, high = x.detach().flatten(1).aminmax(dim=1)
    largest = torch.maximum(low.abs(), high.abs()).to(accumulation_dtype(x.dtype))
    # A norm is the root of a sum of squares; normalising by an infinite one would give zeros.
    # Differences of rows are twice as large, and the sum of two of these squares eight times.
    limit = math.sqrt(torch.finfo(largest.dtype).max / (8 * x[0].numel()))
    return int((~(largest <= limit)).sum())


def _decode(code: list[int]) -> RowHeader | None:
    dims, dtype, rows, needs_grad, bad_rows, lowest, *trailing = code
    if dims == _ABSENT:
        return None
    sendable = 1 <= dims <= MAX_DIMS and dtype != _UNKNOWN
    kept = tuple(trailing[: max(dims - 1, 0)])
    found = DTYPES[dtype] if sendable else None
    return RowHeader(rows, kept, found, bool(needs_grad), bad_rows, lowest)
