"""What the force's kernels become on a card that need not be there; see static.py.

    python benchmarks/gpu/static_force.py [--cards 80 90 100] [--dim 1024] [--temperatures 5]

Of each kernel registers of a thread, bytes spilled, shared memory, blocks that an SM holds, and
instructions of tensor cores; of those that read a panel of distances once also cycles of an SM for
1,024 pairs, where no pairs coincide. The distances and the weighted sums are products.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from typing import Any

import static
import triton
from static import CARDS, Report
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_contrastive.losses.force.kernel_calls import PRECISION, kernel_of, tile_of
from dist_contrastive.pairwise.tile_shapes import TileShape

_INTS = {"M", "P", "N", "R", "G", "first", "stride", "parts", "sides", "split"}
_INTS |= {"num_negative", "out_rows", "n", "num_labels"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel, the name of its tile, and what it is compiled for."""

    name: str
    tile_name: str
    flags: dict[str, Any]

    def constants(self, tile: TileShape, dim: int, temperatures: int) -> dict[str, Any]:
        """What is known when it is compiled."""
        known = {"D": dim, "T": temperatures, "TP": 1 << (temperatures - 1).bit_length()}
        known |= {"BM": tile.rows, "BN": tile.keys, "BK": tile.dims}
        known |= {
            "PRECISION": PRECISION,
            "GROUP": 8,
            "FLAG_ROWS": 32,
            "FLAG_KEYS": 64,
            **self.flags,
        }
        return {name: known[name] for name in kernel_of(self.name).arg_names if name in known}


VARIANTS = {
    "distances": Variant("distance", "distance", {"HAS_LABELS": False}),
    "distances, labels": Variant("distance", "labelled distance", {"HAS_LABELS": True}),
    "distances, small groups": Variant("distance", "small distance", {"HAS_LABELS": False}),
    "close pairs": Variant("difference", "distance", {"HAS_LABELS": False, "ALL": False}),
    "few dimensions": Variant(
        "difference", "labelled distance", {"HAS_LABELS": True, "ALL": True, "D": 3}
    ),
    "mean distance": Variant("distance_sum", "sums", {"HAS_WEIGHTS": True}),
    "softmaxes": Variant("exponential_sum", "sums", {}),
    "sums of A": Variant("affinity_sum", "affinities", {"HAS_FLOOR": False}),
    "sums of A, floor": Variant("affinity_sum", "affinities", {"HAS_FLOOR": True}),
    "weights": Variant("force_weight", "weights", {"HAS_FLOOR": False}),
    "weights, floor": Variant("force_weight", "weights", {"HAS_FLOOR": True}),
    "weights of the scale": Variant("length_weight", "weights", {"HAS_WEIGHTS": True}),
    "near pairs": Variant("near", "weights", {}),
    "product": Variant("product", "product", {"HAS_LABELS": False}),
    "product, labels": Variant("product", "product", {"HAS_LABELS": True}),
    "product, small groups": Variant("product", "small product", {"HAS_LABELS": False}),
    "labels": Variant("segment", "segments", {"KINDS": 3, "HOW": "logsumexp"}),
}
"""The kernels by what they are for."""
NO_PANEL = ("difference", "near", "segment")  # whose loops are over other things


def compiled(
    variant: Variant,
    card: int,
    dim: int = 1024,
    temperatures: int = 5,
    tile: TileShape | None = None,
) -> Report:
    """The kernel of a variant on a card, with its tile of the table unless one is given."""
    tile = tile or tile_of(variant.tile_name, card // 10)
    kernel = kernel_of(variant.name)
    constants, names = variant.constants(tile, dim, temperatures), kernel.arg_names
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(_INTS & {*names}, "i32")
    types |= dict.fromkeys({"OWN", "FLAGS", "CLOSE", "ROW_LABELS", "KEY_LABELS"} & {*names}, "*i32")
    if variant.name == "segment":
        types |= {"X": "*fp64", "OUT": "*fp64", "BOUNDS": "*i64"}
    types |= {"log_floor": "fp32"} if "log_floor" in names else {}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if types[name].startswith("*") or name == "stride"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    report = static._report(built, card)
    if report.tensor:
        return report
    return report._replace(way=way_of_pairs(built.asm["cubin"], temperatures))


def way_of_pairs(cubin: bytes, temperatures: int) -> static.Way:
    """Instructions of a warp for a tile: once around the longest loop, that over keys, and around
    a loop in it, that over temperatures, once for each."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [static.TOOLS / "nvdisasm", "-c", file.name]
        code = static._Code(subprocess.run(command, capture_output=True, text=True).stdout)
    loops = code.loops()
    if not loops:
        return static.Way(0, 0)
    outer = max(loops, key=len)
    around = code.path(outer.start, {outer.stop - 1})
    for inner in loops:
        if inner.start <= outer.start or inner.stop >= outer.stop:
            continue
        turn = code.path(inner.start, {inner.stop - 1})
        before = code.path(outer.start, {inner.start})
        after = code.path(inner.stop, {outer.stop - 1})
        if sum(x.instructions for x in (before, turn, after)) - 1 == around.instructions:
            more = temperatures - 1
            return static.Way(*(x + more * y for x, y in zip(around, turn, strict=True)))
    return around


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", type=int, nargs="+", default=[90], choices=[*CARDS])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--temperatures", type=int, default=5)
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--tile", help="rows,keys,dims,warps,stages in the place of the table's")
    args = parser.parse_args()
    shape = TileShape(*map(int, args.tile.split(","))) if args.tile else None
    print(f"{'kernel':26} card {'tile':>17} regs spill shared blocks  mma cycles")
    for card in args.cards:
        for name, variant in VARIANTS.items():
            if args.only in name:
                print(line(name, variant, card, args.dim, args.temperatures, shape), flush=True)


def line(
    name: str, variant: Variant, card: int, dim: int, temperatures: int, shape: TileShape | None
) -> str:
    """A line of the table."""
    tile = shape or tile_of(variant.tile_name, card // 10)
    text = "x".join(map(str, dataclasses.astuple(tile)))
    try:
        found = compiled(variant, card, dim, temperatures, tile)
    except Exception as error:  # one that does not compile must not end the table
        return f"{name:26} {card:4} {text:>17} {type(error).__name__} {str(error)[:300]}"
    of_panels = not found.tensor and tile.keys and variant.name not in NO_PANEL
    cycles = f"{found.epilogue() * 1024 / (tile.rows * tile.keys):6.0f}" if of_panels else ""
    return (
        f"{name:26} {card:4} {text:>17} {found.registers:4} {found.spilled:5} "
        f"{found.shared >> 10:5}K {found.blocks:6} {found.tensor:4} {cycles}"
    )


if __name__ == "__main__":
    sys.exit(main())
