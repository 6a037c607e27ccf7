"""Calls of the force's Triton kernels: where they can run, their tiles, how they are started."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_contrastive.pairwise import kernel_calls
from dist_contrastive.pairwise.tile_shapes import TileShape

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Distances want the digits of fp32: three products of tensor cores, never one of tf32.
PRECISION = "tf32x3"
_PROGRAMS = 264  # among which keys are split, where rows are few: two for each SM of a large card

# By name and generation of the card: as large as spills no register; of small groups, small ones.
TILES = {
    ("distance", 8): TileShape(128, 64, 16, 8, 3),
    ("distance", 9): TileShape(128, 128, 32, 8, 3),
    ("distance", 10): TileShape(128, 128, 32, 8, 3),
    ("labelled distance", 8): TileShape(128, 64, 16, 8, 3),
    ("labelled distance", 9): TileShape(128, 64, 32, 8, 3),
    ("small distance", 8): TileShape(32, 32, 32, 4, 3),
    ("sums", 8): TileShape(32, 64, 0, 4, 1),
    ("affinities", 8): TileShape(32, 32, 0, 4, 1),
    ("affinities", 9): TileShape(16, 64, 0, 4, 1),
    ("weights", 8): TileShape(32, 64, 64, 4, 1),
    ("product", 8): TileShape(64, 128, 16, 8, 3),
    ("product", 9): TileShape(128, 128, 32, 8, 3),
    ("product", 10): TileShape(128, 128, 32, 8, 3),
    ("small product", 8): TileShape(64, 64, 32, 4, 3),
    ("segments", 8): TileShape(1, 256, 0, 2, 1),
}


def tile_of(name: str, generation: int) -> TileShape:
    """The tile of a kernel on a card; of unknown ones as on the oldest."""
    return TILES.get((name, generation)) or TILES[name, 8]


def unfit(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why kernels cannot compute with points of these dtypes on a device; None if they can."""
    if (reason := kernel_calls._no_place(device)) is not None:
        return reason
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"points are {dtype}, and kernels take float32, bfloat16 and float16"
    return None


def generation_of(device: torch.device) -> int:
    """The first digit of the compute capability; 9 where kernels are interpreted."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def product_precision() -> str:
    """Of the products of weights, which need not be exact where torch has been allowed TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else PRECISION


def num_parts(num_rows: int, num_groups: int, num_keys: int, tile: TileShape) -> int:
    """Parts that keys are split into: one, unless rows are few. Panels do not matter, so that sums
    are made in one order whatever memory there is."""
    blocks = max(1, num_groups * -(-num_rows // tile.rows))
    return max(1, min(-(-num_keys // tile.keys), _PROGRAMS // blocks))


def launch(
    name: str,
    programs: int,
    tile: TileShape,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: Mapping[str, Any],
) -> None:
    """Run a kernel of the force: the only place where one is started."""
    with torch.cuda.device_of(tensors[0]):  # Triton starts a kernel on the current one
        kernel_of(name)[(programs,)](
            *tensors, *numbers, **constants, num_warps=tile.warps, num_stages=tile.stages
        )


def kernel_of(name: str) -> Any:
    """The kernel of that name."""
    from dist_contrastive.losses.force import kernels, sum_kernels, weight_kernels

    modules = (kernels, sum_kernels, weight_kernels)
    return next(vars(x)[f"{name}_kernel"] for x in modules if f"{name}_kernel" in vars(x))
