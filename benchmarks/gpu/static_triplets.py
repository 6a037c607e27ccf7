"""What the kernels of triplets and of KoLeo become on a card that need not be there; see static.py.

    python benchmarks/gpu/static_triplets.py [--cards 80 90 100] [--dim 768]

Of each kernel registers of a thread, bytes spilled, shared memory, blocks that an SM holds, and
instructions of tensor cores. What searches, and a panel, is a product with a slow branch for close
pairs, which takes the registers of a second block on an SM; the others read a panel once or twice,
and what they cost follows from the numbers of positives, which no table of cycles has.
"""

import argparse
import dataclasses
import sys
from typing import Any

import static
from static import CARDS, Report

from dist_contrastive.pairwise.kernel_calls import kernel_of
from dist_contrastive.pairwise.mined import _POSITIVES, _SPANS, MINING_STEPS
from dist_contrastive.pairwise.tile_shapes import tile_of

_INTS = {"M", "N", "K", "own", "first", "first_row", "stride", "steps"}
_LISTS = {"ROW_IDS", "KEY_IDS", "ORDER", "PLACES", "BEGINS", "ENDS", "ROW_ORDER"}
_LISTS |= {"KEY_BEGINS", "KEY_ENDS"}
_LONGS = {"BEST", "TOTALS", "NUMBERS", "ENTRIES"}
_OPERANDS = {"X", "Y", "EXACT_X", "EXACT_Y", "G"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel, and what it is compiled for."""

    name: str
    flags: dict[str, Any]
    continuous: bool = False

    def _operand(self, dtype: str) -> str:
        """Dtype of what is multiplied: panels of differences are moved to the middle, in fp32."""
        return "fp32" if self.flags.get("METRIC", "cosine") != "cosine" else dtype

    def constants(self, dtype: str, card: int, dim: int) -> tuple[dict[str, Any], dict[str, int]]:
        """What is known when it is compiled, and options of the compiler."""
        log, keys, warps = MINING_STEPS
        known = {"D": dim, "WIDTH": dim + 8, "BP": _POSITIVES, "BK": 128, "BM": 16}
        options = {"num_warps": 4}
        if self.name in ("all", "semihard"):
            known |= {"LOG": log, "BN": keys, "WITH_GRADIENT": True}
            options = {"num_warps": warps}
        if self.name in ("panel", "extreme"):
            operand = self._operand(dtype)
            size = 4 if operand == "fp32" else 2
            tile = tile_of(self.name, size, card // 10, continuous=self.continuous)
            known |= {"BM": tile.rows, "BN": tile.keys, "BK": tile.dims, "PARTS": tile.parts}
            known |= {"PRECISION": "tf32x3" if operand == "fp32" else "ieee"}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
        known |= self.flags
        return {
            name: known[name] for name in kernel_of(self.name).arg_names if name in known
        }, options

    def signature(self, dtype: str) -> dict[str, str]:
        """Triton's type of each argument that is no constant."""
        types = dict.fromkeys(kernel_of(self.name).arg_names, "*fp32")
        types |= dict.fromkeys(_INTS & types.keys(), "i32")
        types |= dict.fromkeys((_LISTS | {"COUNTS"}) & types.keys(), "*i32")
        types |= dict.fromkeys(_LONGS & types.keys(), "*i64")
        types |= dict.fromkeys(_OPERANDS & types.keys(), f"*{dtype}")
        if self.name in ("all", "semihard"):
            types |= {"SUMS": "*fp64"}
        types |= dict.fromkeys({"X", "Y"} & types.keys(), f"*{self._operand(dtype)}")
        if self.name == "extreme":
            types |= {"NUMBERS": "*i32"}
        if self.continuous:
            types |= dict.fromkeys(("ROW_IDS", "KEY_IDS"), "*fp64")
        if self.name.startswith("chosen"):
            types |= dict.fromkeys({"BEGINS", "ENDS"} & types.keys(), "*i64")
        types |= {"margin": "fp32"} if "margin" in types else {}
        types |= {"eps": "fp32"} if "eps" in types else {}
        return types


def _extreme(farthest: bool, **more: bool) -> Variant:
    flags = {"COSINE": False, "FARTHEST": farthest, "HAS_FACTORS": False}
    return Variant("extreme", flags | more)


VARIANTS = {
    "nearest (KoLeo)": _extreme(False, HAS_FACTORS=True),
    "hard": _extreme(True),
    "hard, cosine": _extreme(True, COSINE=True, HAS_FACTORS=True),
    "hard, continuous": dataclasses.replace(_extreme(True), continuous=True),
    "hard, cosine, continuous": dataclasses.replace(
        _extreme(True, COSINE=True, HAS_FACTORS=True), continuous=True
    ),
    "spans": Variant("spans", {"BM": _SPANS}, continuous=True),
    "panel": Variant("panel", {"METRIC": "euclidean"}),
    "panel, cosine": Variant("panel", {"METRIC": "cosine"}),
    "all": Variant("all", {"METRIC": "euclidean"}),
    "all, cosine": Variant("all", {"METRIC": "cosine"}),
    "semihard": Variant("semihard", {"METRIC": "euclidean"}),
    "semihard, cosine": Variant("semihard", {"METRIC": "cosine"}),
    "positives": Variant("positive", {}),
    "hard, distances": Variant("chosen", {"COSINE": False, "HAS_FACTORS": False, "BM": 8}),
    "hard, by rows": Variant("chosen_rows", {"COSINE": False, "HAS_FACTORS": False, "BM": 8}),
    "hard, by keys": Variant("chosen_keys", {"COSINE": True, "HAS_FACTORS": True}),
}
"""The kernels by what they are for."""


def compiled(variant: Variant, card: int, dim: int = 768, dtype: str = "bf16") -> Report:
    """The kernel of a variant on a card."""
    kernel = kernel_of(variant.name)
    constants, options = variant.constants(dtype, card, dim)
    return static.compiled_kernel(kernel, variant.signature(dtype), constants, card, options)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[90], choices=[*CARDS])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    args = parser.parse_args()
    print(f"{'kernel':20} card dtype regs spill shared blocks  mma")
    for card, dtype in ((card, dtype) for card in args.cards for dtype in args.dtypes):
        for name, variant in VARIANTS.items():
            if args.only in name:
                found = compiled(variant, card, args.dim, dtype)
                print(
                    f"{name:20} {card:4} {dtype:5} {found.registers:4} {found.spilled:5} "
                    f"{found.shared >> 10:5}K {found.blocks:6} {found.tensor:4}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
