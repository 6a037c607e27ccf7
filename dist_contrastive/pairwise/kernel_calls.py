"""Calls of the Triton kernels: where they can run, and their operands."""

import ast
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_contrastive.pairwise.ids import ids_of
from dist_contrastive.pairwise.pairs import Block, Pairs
from dist_contrastive.pairwise.reductions import (
    LogSumExp,
    LogSumExpAndPositives,
    PairSum,
    Reduction,
)
from dist_contrastive.pairwise.tile_shapes import HOPPER, TileShape, tile_of

_HAS_TRITON = importlib.util.find_spec("triton") is not None
LOG2E = 1 / math.log(2)
_OLDEST = (8, 0)  # compute capability: the first with products of bf16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp32 operands in three products of tensor cores, or in fp32 arithmetic; never in one of tf32.
_FP32_PRODUCT = "tf32x3"
_COUNTED = TileShape(64, 128, 0, 4, 1)  # of a kernel without a product
_KEYS = 128  # multiples of which the keys of every tile divide
_ROWS, _DIMS = 8, 256  # a program of a kernel of rows, and a step of it
_LARGEST = 80.0  # power of 2 that no exponential exceeds: a sum of 2^40 of them is finite


def _generation(device: torch.device) -> int:
    """The first digit of a card's capability; where there is none, of the most usual."""
    return torch.cuda.get_device_properties(device).major if device.type == "cuda" else HOPPER


def unfit(reduction: Reduction, pairs: Pairs) -> str | None:
    """Why kernels cannot reduce these pairs; None if they can."""
    if (reason := unfit_rows(pairs.rows, pairs.keys)) is not None:
        return reason
    if isinstance(reduction, PairSum):
        known = reduction.expression is not None
    else:
        known = type(reduction) in (LogSumExp, LogSumExpAndPositives) and pairs.bias is None
    if not known:
        return f"{type(reduction).__name__} has no kernel"
    if isinstance(reduction, LogSumExpAndPositives) and pairs.thresholds is not None:
        return "positives are summed, and kernels that do so know no thresholds"
    return None


def unfit_rows(x: Tensor, y: Tensor) -> str | None:
    """Why kernels cannot take these rows; None if they can."""
    if (reason := _no_place(x.device)) is not None:
        return reason
    dtype = torch.promote_types(x.dtype, y.dtype)
    if dtype not in _DTYPES:
        return f"rows are {dtype}, and kernels take float32, bfloat16 and float16"
    return None


def is_interpreted() -> bool:
    """Whether kernels are interpreted, on a CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_place(device: torch.device) -> str | None:
    """Why kernels do not run on a device; None if they do."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"rows are on {device.type}, and kernels run on CUDA"
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    if capability < _OLDEST:
        has, needed = (".".join(map(str, x)) for x in (capability, _OLDEST))
        return f"the compute capability of {device} is {has}, and kernels need {needed}"
    return None


def launch(
    name: str,
    grid: tuple[int, ...],
    tile: TileShape,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    **constants: Any,
) -> None:
    """Run a kernel of pairs, in tiles of this shape."""
    constants |= {"BM": tile.rows, "BN": tile.keys, "BK": tile.dims, "num_warps": tile.warps}
    start(name, grid, tensors, numbers, constants | {"num_stages": tile.stages})


def add_fp32_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to the total, all in fp32, with the digits of fp32 by tensor cores.

    `a` or its transpose has lines of a multiple of 16 numbers, of which any finite ones fill them.
    """
    num_rows, dim = total.shape
    tile = tile_of("add_product", 4, _generation(b.device))
    grid = -(-num_rows // tile.rows), -(-dim // tile.keys)
    constants = {"D": dim, "TRANSPOSED": a.stride(1) != 1, "PRECISION": _FP32_PRODUCT}
    launch("add_product", grid, tile, [a, b, total], [*a.shape, max(a.stride())], **constants)


def launch_of_rows(
    name: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    num_rows: int | None = None,
    **constants: Any,
) -> None:
    """Run a kernel of the rows of the first of the tensors, or of so many pairs of them."""
    dim = tensors[0].shape[1]
    num_rows = len(tensors[0]) if num_rows is None else num_rows
    if num_rows:
        constants |= {"D": dim, "BM": _ROWS, "BK": min(_DIMS, 1 << (dim - 1).bit_length())}
        start(name, (-(-num_rows // _ROWS),), tensors, numbers, constants)


def start(
    name: str,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: dict[str, Any],
) -> None:
    """Start a kernel: the only place where one is. A graph that is compiled holds it as an operator
    of its own, into which the compiler does not look."""
    if torch.compiler.is_compiling():
        first_output = len(tensors) - _OUTPUTS[name]
        text = ";".join(f"{key}={value}" for key, value in constants.items())
        given = list(tensors[:first_output]), list(tensors[first_output:])
        start_compiled(name, list(grid), *given, [float(x) for x in numbers], text)
    else:
        _start(name, grid, tensors, numbers, constants)


def _start(
    name: str,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: dict[str, Any],
) -> None:
    from dist_contrastive.pairwise import kernels

    if "EXPRESSION" in constants:
        constants = constants | {"EXPRESSION": getattr(kernels, constants["EXPRESSION"])}
    with torch.cuda.device_of(tensors[0]):  # Triton starts a kernel on the current one
        kernel_of(name)[grid](*tensors, *numbers, **constants)


@torch.library.custom_op("dist_contrastive::start", mutates_args={"outputs"})
def start_compiled(
    name: str,
    grid: list[int],
    inputs: list[Tensor],
    outputs: list[Tensor],
    numbers: list[float],
    constants: str,
) -> None:
    """`start`, with constants as ``KEY=value;...``."""
    pairs = [pair.split("=") for pair in constants.split(";")]
    values = {key: _value(text) for key, text in pairs}
    whole = [int(x) for x in numbers]
    if name in _WITH_PARAMETER:
        whole[-1] = numbers[-1]  # type: ignore[call-overload]
    _start(name, tuple(grid), [*inputs, *outputs], whole, values)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:  # a word
        return text


@start_compiled.register_fake
def _(*_: Any) -> None:
    """Outputs are there already."""


_OUTPUTS = {  # tensors, the last ones, that a kernel writes
    **{"lse": 3, "running_lse": 2, "lse_gradient": 1},
    **{"pair": 2, "cosine": 2, "unit_gradient": 2, "add_product": 1, "count_similar": 1},
    **{"spans": 2, "panel": 1, "all": 6, "semihard": 7, "positive": 2},
    **{"extreme": 2, "chosen": 1, "chosen_rows": 1, "chosen_keys": 1},
}
# Their last number is a float.
_WITH_PARAMETER = ("pair", "chosen", "chosen_rows", "chosen_keys", "all", "semihard")


def kernel_of(name: str) -> Any:
    """The kernel of that name."""
    from dist_contrastive.pairwise import (
        distance_kernels,
        kernels,
        lse_kernels,
        panel_kernels,
        row_kernels,
        triplet_kernels,
    )

    modules = (kernels, lse_kernels, row_kernels, distance_kernels, panel_kernels, triplet_kernels)
    return next(vars(x)[f"{name}_kernel"] for x in modules if f"{name}_kernel" in vars(x))


@dataclass(frozen=True)
class Operands:
    """Rows and keys of a block as kernels take them."""

    rows: Tensor  # [b, D]
    keys: Tensor  # [k, D]
    factors: tuple[Tensor, Tensor] | None  # of rows [b] and keys [k], fp32, and zeros: `filled`
    ids: tuple[Tensor, Tensor] | None  # of rows and keys, see `ids_of`
    limits: tuple[Tensor, Tensor] | None  # on scores of rows [b] and keys [k], in powers of 2, fp32
    own: int  # the number in the block of the first row's own key
    bias: Tensor | None = None  # one number, fp32
    largest: Tensor | None = None  # what no score exceeds; None: their lengths tell

    @classmethod
    def of(cls, pairs: Pairs, block: Block) -> "Operands":
        """Those of this rank's rows and a block of keys."""
        factors, ids, limits, own = None, None, None, pairs.start - block.first
        if pairs.factors is not None and block.factors is not None:
            factors = filled(pairs.factors[0]), filled(block.factors)
        if pairs.tags is not None and block.tags is not None:
            ids = ids_of(pairs, block)
        if pairs.thresholds is not None:
            of_rows, of_keys = pairs.thresholds[0], block.thresholds
            limits = of_rows, of_rows if of_keys is None else of_keys.contiguous()
        bias = pairs.bias
        bias = None if bias is None else bias.float()
        largest = pairs.scale if isinstance(pairs.scale, Tensor) else None
        rows, keys = pairs.rows.contiguous(), block.keys.contiguous()
        return cls(rows, keys, factors, ids, limits, own, bias, largest)

    def transposed(self) -> "Operands":
        """Keys as rows, rows as keys."""
        pairs = self.factors, self.ids, self.limits
        factors, ids, limits = (x and (x[1], x[0]) for x in pairs)
        return Operands(self.keys, self.rows, factors, ids, limits, -self.own, largest=self.largest)

    def tile(self, name: str) -> TileShape:
        """The tile of a kernel of `TILES`, for this card, dtype and what is known of pairs."""
        continuous = self.ids is not None and self.ids[0].dtype == torch.float64
        size, generation = self.rows.element_size(), _generation(self.rows.device)
        return tile_of(name, size, generation, self.limits is not None, continuous)

    def tensors(self, r: slice, k: slice) -> tuple[Tensor, ...]:
        """Of rows r and keys k, in the order of the kernels; where there are none, others, never
        read."""
        row_factors, key_factors = self.factors or (self.rows, self.keys)
        row_ids, key_ids = self.ids or (self.rows, self.keys)
        factors = row_factors[r], key_factors[k]
        return self.rows[r], self.keys[k], *factors, row_ids[r], key_ids[k]

    def limits_of(self, r: slice, k: slice) -> tuple[Tensor, Tensor]:
        """Limits of rows r and keys k as `tensors`."""
        row_limits, key_limits = self.limits or (self.rows, self.keys)
        return row_limits[r], key_limits[k]

    def sizes(self, r: slice, k: slice) -> tuple[int, int, int]:
        """M, N and own of rows r and keys k."""
        return r.stop - r.start, k.stop - k.start, self.own + r.start - k.start

    @property
    def whole(self) -> tuple[slice, slice]:
        """All rows and all keys."""
        return slice(0, len(self.rows)), slice(0, len(self.keys))

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        precision = _FP32_PRODUCT if self.rows.dtype == torch.float32 else "ieee"
        dim, has_factors = self.rows.shape[1], self.factors is not None
        return {"D": dim, "HAS_FACTORS": has_factors, "PRECISION": precision}

    def shift(self) -> Tensor:
        """What is taken off scores in powers of 2, so that no exponential is too large: scalar."""
        if (largest := self.largest) is None:
            lengths = [
                torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()
                for x in (self.rows, self.keys)
            ]
            largest = lengths[0] * lengths[1]
        return (largest.float() * LOG2E - _LARGEST).clamp(min=0)

    def own_pairs(self) -> tuple[slice, slice]:
        """Rows whose own key is in the block, and these keys."""
        first = min(max(0, -self.own), len(self.rows))
        last = max(first, min(len(self.rows), len(self.keys) - self.own))
        return slice(first, last), slice(first + self.own, last + self.own)


def filled(x: Tensor) -> Tensor:
    """Numbers of keys [k], with zeros up to the end of a tile."""
    missing = -len(x) % _KEYS
    return torch.cat([x, x.new_zeros(missing)]) if missing else x.contiguous()


def num_similar(operands: Operands) -> Tensor:
    """Keys that are similar to each row, but its own: [b] fp64."""
    assert operands.ids is not None, "positives need tags"
    row_ids, key_ids = operands.ids
    if row_ids.dim() > 1:
        (r, k), grid = operands.whole, _COUNTED.row_grid(len(row_ids), len(key_ids))
        counts = row_ids.new_empty(grid[1], len(row_ids), dtype=torch.int32)
        constants = {"BM": _COUNTED.rows, "BN": _COUNTED.keys, "num_warps": _COUNTED.warps}
        start("count_similar", grid, [row_ids, key_ids, counts], operands.sizes(r, k), constants)
        return counts.sum(0, dtype=torch.float64)
    known = key_ids.sort().values
    first, last = (torch.searchsorted(known, row_ids, right=right) for right in (False, True))
    count = (last - first).double()
    count[operands.own_pairs()[0]] -= 1
    return count
