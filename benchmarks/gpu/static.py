"""What a kernel becomes on a card that need not be there: compiled ahead of time, its code read.

    python benchmarks/gpu/static.py [--cards 80 90 100] [--dim 768] [--dtypes bf16 fp32]

Triton compiles without a GPU and brings the tools that list machine code. Of each kernel with its
tile the table has registers of a thread, bytes spilled, shared memory, blocks that an SM holds,
instructions of tensor cores, and a bound on time for one tile: cycles of the product on the tensor
cores beside cycles of what follows it (exponentials and logarithms, or the issue of instructions,
whichever takes longer). Two blocks on an SM can overlap these, one cannot. Nothing here has been
measured on a card. Of sm_100 loops are not told apart, and its cycles are left out.
"""

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_contrastive.pairwise import kernels
from dist_contrastive.pairwise.kernel_calls import kernel_of
from dist_contrastive.pairwise.tile_shapes import TileShape, tile_of

LOG2E = 1.4426950408889634
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = {"HMMA", "HGMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "OMMA"}
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


class Card(NamedTuple):
    """What one SM has, and dense operations that its tensor cores do in a cycle."""

    registers: int
    shared: int
    threads: int
    blocks: int
    bf16: int


CARDS = {
    80: Card(65536, 164 << 10, 2048, 32, 2048),
    90: Card(65536, 228 << 10, 2048, 32, 4096),
    100: Card(65536, 228 << 10, 2048, 32, 8192),
}


class Way(NamedTuple):
    """Instructions of a warp on the shortest way through some code."""

    instructions: int
    special: int


class Report(NamedTuple):
    """One kernel on one card."""

    registers: int
    spilled: int
    shared: int
    threads: int
    blocks: int
    ptx: str
    ttir: str
    tensor: int
    way: Way
    turn: int  # instructions in the loop of the product

    def epilogue(self) -> float:
        """Cycles of an SM for what is not the product of a tile."""
        issue = self.way.instructions * self.threads / 32 / 4
        return max(issue, self.way.special * self.threads / 16)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel, and what it is compiled for."""

    name: str
    constants: dict[str, Any]
    ids: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    continuous: bool = False

    def tile(self, dtype: str, card: int) -> TileShape:
        """Its tile of the table."""
        name, constants = self.name, self.constants
        if name == "running_lse":
            name = "lse"
        elif name == "lse" and constants["WITH_POSITIVES"]:
            name = "lse_positives"
        elif name == "lse_gradient" and constants["BOTH"] and not constants["SHARED"]:
            name = "lse_gradient_each"
        limited = constants.get("HAS_LIMITS", False)
        return tile_of(name, 4 if dtype == "fp32" else 2, card // 10, limited, self.continuous)

    def signature(self, operand: str) -> dict[str, str]:
        """Triton's type of each argument that is no constant."""
        ids = "*fp64" if self.continuous else "*i32" if self.ids else f"*{operand}"
        types = dict.fromkeys(("X", "Y", "G"), f"*{operand}")
        types |= dict.fromkeys(("ROW_IDS", "KEY_IDS"), ids)
        types |= dict.fromkeys(("REPEAT", "NEAR"), "*i32")
        sizes = ("M", "N", "own", "shift", "count", "first", "stride", "R", "K")
        types |= dict.fromkeys(sizes, "i32")
        types["parameter"] = "fp32"
        kernel = kernel_of(self.name)
        return {name: types.get(name, "*fp32") for name in kernel.arg_names}


def _lse(name: str, leave_out: str = "nothing", **more: Any) -> Variant:
    flags = {"BOTH": False, "WITH_POSITIVES": False, "HAS_LIMITS": False, **more}
    flags |= {} if name == "lse" else {"SHARED": True, "HAS_PARTNERS": False} | more
    with_ids = leave_out == "similar" or flags["WITH_POSITIVES"]
    return Variant(name, {"LEAVE_OUT": leave_out, **flags}, with_ids)


def _pair(expression: str, values: bool, gradient: bool, leave_out: str = "own") -> Variant:
    is_cosine = expression == "cosine_embedding"
    ids = is_cosine or leave_out == "similar"
    flags = {"HAS_IDS": ids, "HAS_BIAS": not is_cosine, "UNIT": 1.0 if is_cosine else -LOG2E}
    flags |= {"LEAVE_OUT": leave_out}
    flags |= {"WITH_VALUES": values, "WITH_GRADIENT": gradient}
    return Variant("pair", {"EXPRESSION": getattr(kernels, expression), **flags}, ids)


VARIANTS = {
    "InfoNCE, symmetric": _lse("lse", BOTH=True),
    "InfoNCE": _lse("lse"),
    "NT-Xent": _lse("lse", "own"),
    "DCL": _lse("lse", "similar"),
    "SupCon": _lse("lse", "own", WITH_POSITIVES=True),
    "InfoNCE, masks": _lse("lse", "similar", HAS_LIMITS=True),
    "InfoNCE, symmetric, ids": _lse("lse", "similar", BOTH=True),
    "InfoNCE, symmetric, masks": _lse("lse", "similar", BOTH=True, HAS_LIMITS=True),
    "any range": Variant("running_lse", {"LEAVE_OUT": "nothing", "HAS_LIMITS": False}),
    "any range, masks": Variant("running_lse", {"LEAVE_OUT": "similar", "HAS_LIMITS": True}, True),
    "SigLIP, ids": _pair("softplus", True, False, "similar"),
    "SigLIP": _pair("softplus", True, False),
    "cosine embedding": _pair("cosine_embedding", True, False),
    "InfoNCE, symmetric, gradient": _lse("lse_gradient", BOTH=True, HAS_PARTNERS=True),
    "any range, gradient": _lse("lse_gradient", BOTH=True, SHARED=False, HAS_PARTNERS=True),
    "InfoNCE, gradient": _lse("lse_gradient", HAS_PARTNERS=True),
    "NT-Xent, gradient": _lse("lse_gradient", "own", HAS_PARTNERS=True),
    "InfoNCE, masks, gradient": _lse("lse_gradient", "similar", HAS_LIMITS=True),
    "InfoNCE, symmetric, ids, gradient": _lse("lse_gradient", "similar", BOTH=True),
    "InfoNCE, symmetric, masks, gradient": _lse(
        "lse_gradient", "similar", BOTH=True, HAS_LIMITS=True
    ),
    "any range, masks, gradient": _lse(
        "lse_gradient", "similar", BOTH=True, SHARED=False, HAS_LIMITS=True
    ),
    "DCL, gradient": _lse("lse_gradient", "similar"),
    "SupCon, gradient": _lse("lse_gradient", "own", WITH_POSITIVES=True),
    "SigLIP, value and gradient": _pair("softplus", True, True),
    "SigLIP, ids, value and gradient": _pair("softplus", True, True, "similar"),
    "SigLIP, gradient": _pair("softplus", False, True),
    "cosine embedding, value and gradient": _pair("cosine_embedding", True, True),
    "product by rows": Variant("add_product", {"TRANSPOSED": False}, dtypes=("fp32",)),
    "product by keys": Variant("add_product", {"TRANSPOSED": True}, dtypes=("fp32",)),
}
for _name in ("SupCon", "SupCon, gradient", "cosine embedding, value and gradient"):
    VARIANTS[f"{_name}, continuous"] = dataclasses.replace(VARIANTS[_name], continuous=True)
"""The kernel of each loss; of labelled ones also that of continuous labels."""


def compiled(
    variant: Variant,
    card: int,
    dim: int = 768,
    dtype: str = "bf16",
    tile: TileShape | None = None,
    factors: bool = True,
    precision: str | None = None,
    **options: Any,
) -> Report:
    """The kernel of a variant on a card, with its tile of the table unless one is given."""
    tile = tile or variant.tile(dtype, card)
    kernel = kernel_of(variant.name)
    constants = {**variant.constants, "D": dim, "BM": tile.rows, "BN": tile.keys, "BK": tile.dims}
    constants["HAS_FACTORS"] = factors  # as losses of every dtype have them
    constants["PRECISION"] = precision or ("tf32x3" if dtype == "fp32" else "ieee")
    constants["PARTS"] = tile.parts
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    return compiled_kernel(kernel, variant.signature(dtype), constants, card, options)


def compiled_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], card: int, options: Any
) -> Report:
    """A kernel on a card, as it is for tensors and strides that are aligned."""
    names, types = kernel.arg_names, signature | dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if types[name].startswith("*") or name == "stride"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    return _report(built, card)


def _report(built: Any, card: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True)
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stderr
    registers, spilled = map(int, found.groups())
    threads, shared, sm = 32 * built.metadata.num_warps, built.metadata.shared, CARDS[card]
    in_eights = -(-registers // 8) * 8
    blocks = min(
        sm.blocks,
        sm.threads // threads,
        sm.registers // (in_eights * threads),
        sm.shared // (shared + 1024),
    )
    texts = built.asm["ptx"], built.asm["ttir"]
    return Report(registers, spilled, shared, threads, blocks, *texts, *_read(code.stdout))


class _Code:
    """Instructions, and where each can go on."""

    def __init__(self, text: str) -> None:
        labels: dict[str, int] = {}
        lines: list[tuple[str, str, str]] = []
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(lines)
            elif found := _INSTRUCTION.match(line):
                lines.append((found[1] or "", found[2].split(".")[0], found[3]))
        self.ops = [op for _, op, _ in lines]
        self._next = [self._after(at, *line, labels) for at, line in enumerate(lines)]

    def _after(
        self, at: int, predicate: str, op: str, rest: str, labels: dict[str, int]
    ) -> set[int]:
        label = re.search(r"\.L_\w+", rest) if op == "BRA" else None
        after = {labels[label[0]]} if label and label[0] in labels else set()
        is_certain = op in ("BRA", "EXIT") and not predicate and not re.match(r"\s*!?U?P\d", rest)
        return after if is_certain else after | {at + 1}

    def loops(self) -> list[range]:
        """Loops, which are the jumps back; the one at the end of all code is none."""
        back = [(to, at) for at, after in enumerate(self._next) for to in after if to < at - 2]
        return [range(first, last + 1) for first, last in back]

    def path(self, start: int, ends: set[int]) -> Way:
        """The shortest way from an instruction to one of the ends: that of a tile inside of the
        matrix without own pairs, for which nothing is masked."""
        before, queue = {start: start}, collections.deque([start])
        while queue:
            at = queue.popleft()
            if at in ends:
                break
            for to in sorted(self._next[at] - before.keys()):
                if to < len(self.ops):
                    before[to] = at
                    queue.append(to)
        else:
            raise ValueError("no way leads there")
        found = [at]
        while found[-1] != start:
            found.append(before[found[-1]])
        return Way(len(found), sum(self.ops[i] == "MUFU" for i in found))


def _read(text: str) -> tuple[int, Way, int]:
    """Instructions of tensor cores, the way around the loop of the product, and what that has."""
    code = _Code(text)
    tensor = [i for i, op in enumerate(code.ops) if op in TENSOR_CORES]
    loops = code.loops()
    # The smallest of the loops that hold the most of the products.
    product = max(
        loops, key=lambda loop: (sum(i in loop for i in tensor), -len(loop)), default=None
    )
    if product is None or not tensor:
        return len(tensor), Way(0, 0), 0
    around = [loop for loop in loops if set(product) < set(loop)]
    if around:  # a loop over keys, of which a tile is one turn
        outer = min(around, key=len)
        first, ends = outer.start, {outer.stop - 1}
    else:
        first, ends = 0, {i for i, op in enumerate(code.ops) if op == "EXIT"}
    ways = code.path(first, {product.start}), code.path(product.stop, ends)
    return len(tensor), Way(*map(sum, zip(*ways, strict=True))), len(product)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", type=int, nargs="+", default=[90], choices=[*CARDS])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--tile", help="rows,keys,dims,warps,stages in the place of the table's")
    args = parser.parse_args()
    shape = TileShape(*map(int, args.tile.split(","))) if args.tile else None
    print(f"{'kernel':30} card dtype {'tile':>17} regs spill shared blocks  mma product  rest")
    for card, dtype in ((card, dtype) for card in args.cards for dtype in args.dtypes):
        for name, variant in VARIANTS.items():
            if args.only in name and dtype in variant.dtypes:
                print(line(name, variant, card, args.dim, dtype, shape), flush=True)


def line(
    name: str, variant: Variant, card: int, dim: int, dtype: str, shape: TileShape | None
) -> str:
    """A line of the table."""
    tile = shape or variant.tile(dtype, card)
    text = "x".join(map(str, dataclasses.astuple(tile)))
    try:
        found = compiled(variant, card, dim, dtype, tile)
    except Exception as error:  # one that does not compile must not end the table
        return f"{name:30} {card:4} {dtype:5} {text:>17} {type(error).__name__}"
    operations = 2 * tile.rows * tile.keys * dim
    product = operations / CARDS[card].bf16 * (6 if dtype == "fp32" else 1)  # three of tf32
    cycles = f"{product:7.0f} {found.epilogue():5.0f}" if card < 100 else ""
    return (
        f"{name:30} {card:4} {dtype:5} {text:>17} {found.registers:4} {found.spilled:5} "
        f"{found.shared >> 10:5}K {found.blocks:6} {found.tensor:4} {cycles}"
    )


if __name__ == "__main__":
    sys.exit(main())
