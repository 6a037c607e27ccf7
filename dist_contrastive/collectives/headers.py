"""What every rank is about to send, told to all before any data is.

On gloo ranks that send different shapes end each other's processes; with other backends they hang
or mix up rows. So each rank first says what it holds, and every rank sees the same table: whatever
is wrong is then raised on all of them, with the same words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.collectives.group import Group, all_gather_single, world_size

MAX_DIMS = 6
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.uint8, torch.int8, torch.bool]

_ABSENT, _UNKNOWN = -1, -2
_FIXED = 6  # numbers before the trailing dimensions


@dataclass(frozen=True)
class RowHeader:
    """One rank's tensor, without its numbers."""

    rows: int
    trailing: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that cannot be sent
    needs_grad: bool
    bad_rows: int  # rows that hold NaN or infinity
    lowest: int  # of integers; 0 for others

    @property
    def fits(self) -> tuple[object, ...]:
        """What must be equal on all ranks."""
        return self.trailing, self.dtype, self.needs_grad

    def __str__(self) -> str:
        shape = ", ".join(["rows", *map(str, self.trailing)])
        return f"[{shape}] {self.dtype} {'with' if self.needs_grad else 'without'} gradient"


def exchange_headers(
    tensors: dict[str, Tensor | None], group: Group = None
) -> dict[str, list[RowHeader | None]]:
    """For every name the headers of all ranks, in the order of ranks; None where one has nothing.

    Args:
        tensors: the same names on all ranks, at least one of them present.

    Collectives: one all-gather of a few numbers (none without other ranks), which waits for the
    device, as every size that is needed to allocate memory does.
    """
    codes = torch.tensor([_encode(x) for x in tensors.values()], dtype=torch.int64)
    device = next(x.device for x in tensors.values() if x is not None)
    if world_size(group) > 1:
        mine = codes.flatten().to(device)
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


def _encode(x: Tensor | None) -> list[int]:
    if x is None:
        return [_ABSENT, *[0] * (_FIXED + MAX_DIMS - 2)]
    dims = min(x.dim(), MAX_DIMS + 1)  # one too many is told as such
    trailing = list(x.shape[1:MAX_DIMS])
    trailing += [0] * (MAX_DIMS - 1 - len(trailing))
    dtype = DTYPES.index(x.dtype) if x.dtype in DTYPES else _UNKNOWN
    rows = x.shape[0] if dims else 0
    needs_grad = int(x.requires_grad and torch.is_grad_enabled())
    return [dims, dtype, rows, needs_grad, _count_bad_rows(x), _lowest(x), *trailing]


def _lowest(x: Tensor) -> int:
    return 0 if x.is_floating_point() or x.numel() == 0 else int(x.min())


def _count_bad_rows(x: Tensor) -> int:
    if not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        return 0
    # NaN and infinity survive in the extremes of a row, which cost no copy of x.
    low, high = x.detach().flatten(1).aminmax(dim=1)
    return int((~(low.isfinite() & high.isfinite())).sum())


def _decode(code: list[int]) -> RowHeader | None:
    dims, dtype, rows, needs_grad, bad_rows, lowest, *trailing = code
    if dims == _ABSENT:
        return None
    sendable = 1 <= dims <= MAX_DIMS and dtype != _UNKNOWN
    kept = tuple(trailing[: max(dims - 1, 0)])
    found = DTYPES[dtype] if sendable else None
    return RowHeader(rows, kept, found, bool(needs_grad), bad_rows, lowest)
