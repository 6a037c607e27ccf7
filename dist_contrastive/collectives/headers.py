"""Headers: what every rank holds, known to all ranks before any rows are exchanged.

On gloo, ranks that send different shapes end each other's processes; other backends hang or mix up
rows. So each rank first sends a header, and every rank sees the same table: whatever is wrong is
then raised on all of them, in the same words. Shapes, dtypes and gradient flags are known without
waiting for the device; `Values`, which are measured on it, are kept apart from them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.collectives.group import (
    Group,
    accumulation_dtype,
    all_gather_single,
    host_device,
    is_distributed,
    world_size,
)
from dist_contrastive.errors import NonFiniteError, UserError

MAX_DIMS = 6
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.uint8, torch.int8, torch.bool]

_ABSENT = -1  # nothing given
_PROBLEMS = (  # what was given where it cannot be sent, as another number of dimensions
    "tensors of different shapes or dtypes",
    "texts, no dense tensor of a known dtype",
    "a NumPy array, no dense tensor of a known dtype",
    "something that is no dense tensor of a known dtype",
)

Tensors = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Values:
    """Measures of one rank's numbers."""

    bad_rows: int = 0  # rows that hold NaN or infinity, or numbers whose squares overflow
    lowest: int = 0  # of integers; 0 for others
    highest: int = 0


@dataclass(frozen=True)
class RowHeader:
    """One rank's tensor without its numbers; of several tensors alike, as of their stack."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that cannot be sent
    grad_flags: int  # one bit for each tensor that needs a gradient
    values: Values = Values()
    problem: str = ""  # why it cannot be sent

    @property
    def rows(self) -> int:
        """Size of the first dimension."""
        return self.shape[0] if self.shape else 0

    def fits(self, row_dim: int = 0) -> tuple[object, ...]:
        """What must be equal on all ranks: everything but the number of rows."""
        return self.shape[:row_dim], self.shape[row_dim + 1 :], self.dtype, self.grad_flags

    def text(self, row_dim: int = 0) -> str:
        """Shape, dtype and gradient, for messages."""
        if self.problem:
            return self.problem
        sizes = ["rows" if dim == row_dim else str(n) for dim, n in enumerate(self.shape)]
        gradient = "with" if self.grad_flags else "without"
        return f"[{', '.join(sizes)}] {self.dtype} {gradient} gradient"


Headers = list[RowHeader | None]


def exchange_headers(
    tensors: Mapping[str, Tensors | None],
    group: Group = None,
    values: Mapping[str, Values] | None = None,
) -> dict[str, Headers]:
    """Headers of all ranks for every name, in the order of ranks; None where a rank has nothing.

    Args:
        tensors: the same names on all ranks. What is no tensor, or none that could be sent, gets a
            header without dtype, so that no rank stops while others wait.
        values: measures by name, to be sent with the headers.

    Collectives: one all-gather of a few numbers (none without other ranks), by the CPU; in a group
        that has none, as of NCCL alone, it waits for the device.
    """
    values = values or {}
    lines = [[*_encoded(x), *astuple(values.get(name, Values()))] for name, x in tensors.items()]
    table = [[line] for line in lines]
    if world_size(group) > 1:
        local = torch.tensor(lines, device=host_device(group)).flatten()
        gathered = local.new_empty(world_size(group) * len(local))
        all_gather_single(gathered, local, group=group)
        table = gathered.view(world_size(group), len(tensors), -1).transpose(0, 1).tolist()
    return {name: [_decoded(c) for c in line] for name, line in zip(tensors, table, strict=True)}


def describe(headers: Headers, row_dim: int = 0) -> str:
    """Who holds what: ``[rows, 3] torch.float32 with gradient on rank 0; nothing on rank 1``."""
    ranks_of: dict[str, list[int]] = {}
    for number, header in enumerate(headers):
        text = "nothing" if header is None else header.text(row_dim)
        ranks_of.setdefault(text, []).append(number)
    parts = [f"{what} on rank {', '.join(map(str, ranks))}" for what, ranks in ranks_of.items()]
    return "; ".join(parts)


def integer_range(x: Any) -> Tensor | None:
    """Lowest and highest of integers: [2] int64 on their device; None where there are none."""
    if not _can_be_sent(x) or x.is_floating_point() or x.numel() == 0:
        return None
    return torch.stack(x.to(torch.int64).aminmax())


def bad_rows(x: Any, row_dim: int = 0) -> Tensor | None:
    """Rows with numbers that are not finite, or too large to be squared: how many, as a number on
    their device; None where there are no rows.

    Args:
        row_dim: the last dimension of rows; those before it count as rows, too.
    """
    if not _can_be_sent(x) or not x.is_floating_point() or x.dim() <= row_dim or x.numel() == 0:
        return None
    rows = x.detach().reshape(math.prod(x.shape[: row_dim + 1]), -1)
    # NaN and infinity survive in the extremes of a row, which cost no copy of x.
    low, high = rows.aminmax(dim=1)
    largest = torch.maximum(-low, high).to(accumulation_dtype(x.dtype))
    # A norm is the root of a sum of squares; normalising by an infinite one would give zeros.
    # Differences of rows are twice as large, and the sum of two of these squares eight times.
    limit = math.sqrt(torch.finfo(largest.dtype).max / (8 * rows.shape[1]))
    return (~(largest <= limit)).sum()


def _can_be_sent(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.dtype in DTYPES


def _encoded(x: Tensors | None) -> list[int]:
    """Number of dimensions, dtype, gradient flags, sizes."""
    if x is None or (isinstance(x, Sequence) and len(x) == 0):
        return [_ABSENT, *[0] * (2 + MAX_DIMS)]
    tensors = list(x) if isinstance(x, Sequence) else [x]
    stacked = [len(tensors)] if isinstance(x, Sequence) else []
    shape = [*stacked, *getattr(tensors[0], "shape", ())]
    if (problem := _problem(tensors, len(shape))) is not None:
        return [_ABSENT - 1 - problem, *[0] * (2 + MAX_DIMS)]
    flags = sum((y.requires_grad and torch.is_grad_enabled()) << i for i, y in enumerate(tensors))
    sizes = (shape + [0] * MAX_DIMS)[:MAX_DIMS]
    return [len(shape), DTYPES.index(tensors[0].dtype), flags, *sizes]


def _problem(tensors: list[Any], dims: int) -> int | None:
    """Why these cannot be sent, as a place in `_PROBLEMS`."""
    bad = [y for y in tensors if not _can_be_sent(y)]
    if not bad and 1 <= dims <= MAX_DIMS:
        return 0 if len({(y.shape, y.dtype) for y in tensors}) > 1 else None
    kinds = [isinstance(bad[0], kind) for kind in (str, np.ndarray)] if bad else []
    return 1 + kinds.index(True) if any(kinds) else len(_PROBLEMS) - 1


def _decoded(code: list[int]) -> RowHeader | None:
    dims, dtype, flags, *rest = code
    if dims == _ABSENT:
        return None
    if dims < _ABSENT:
        return RowHeader((), None, 0, problem=_PROBLEMS[_ABSENT - 1 - dims])
    return RowHeader(tuple(rest[:dims]), DTYPES[dtype], flags, Values(*rest[MAX_DIMS:]))


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """Small picklable value of every rank, in the order of ranks. Collectives: two all-gathers."""
    values = [value] * world_size(group)
    if is_distributed(group):
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def raised_together(group: Group = None) -> Iterator[None]:
    """An error that one rank raises inside is raised on all ranks, at the end of the block.

    For work that ranks do by themselves (open files, write a checkpoint), without collectives
    inside: a rank that failed alone would leave the others waiting in their next one. A rank's own
    error is raised again as it is; the others raise its class with "rank N: " before the message.

    Collectives: two all-gathers of objects.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if is_distributed(group):
        failures = gather_objects(None if own is None else (type(own), str(own)), group)
        for number, failure in enumerate(failures):
            if failure is not None and own is None:
                kind, message = failure
                kind = kind if issubclass(kind, UserError | NonFiniteError) else RuntimeError
                raise kind(f"rank {number}: {message}")
    if own is not None:
        raise own
