"""What is expected of a card, before there is one: times from cycles, launches and bytes.

    python benchmarks/gpu/predict.py [--card h100]     # the table of docs/gpu.md
    python benchmarks/gpu/predict.py --constants       # tables of planner_constants.py
    ... --measured FILE                                # with what run.py has written there
    ... --write                                        # into its place

Times are those of the planner. Its constants are read here from the machine code of kernels
compiled for sm_90 (static.py) and from steps without data (fake.py); none was timed on a card.
"""

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import lines

from dist_contrastive import planner, planner_constants
from dist_contrastive.planner import Asked, plan
from dist_contrastive.planner_constants import ASSUMED, CARDS, SPECS, Cost, Kernel, Numbers

CONSTANTS = Path(planner_constants.__file__)
DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"
TABLE = re.compile(r"(<!-- predicted -->\n).*?(<!-- end -->)", re.DOTALL)
VIT_B_FLOP = 3 * 35.2e9  # forward and backward of an image of 224 x 224
VIT_B_RATE = 0.4  # of the data sheet's, as training loops reach it
KERNELS_OF = {  # names in static.py
    "infonce": ("InfoNCE", "InfoNCE, gradient"),
    "infonce, symmetric": ("InfoNCE, symmetric", "InfoNCE, symmetric, gradient"),
    "ntxent": ("NT-Xent", "NT-Xent, gradient"),
    "dcl": ("DCL", "DCL, gradient"),
    "siglip": ("SigLIP, value and gradient",),
    "self_diagonal": ("InfoNCE", "InfoNCE, gradient"),
    "supcon": ("SupCon", "SupCon, gradient"),
    "cosine_embedding": ("cosine embedding, value and gradient",),
}


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="h100", choices=[*CARDS])
    parser.add_argument("--write", action="store_true", help="into its place")
    parser.add_argument("--measured", type=Path, help="lines of benchmarks/gpu/run.py")
    parser.add_argument("--constants", action="store_true", help="read them again")
    args = parser.parse_args()
    if args.constants:
        source = constants()
        if args.write:
            before = CONSTANTS.read_text().partition("KERNELS: ")[0]
            CONSTANTS.write_text(before + source)  # to be formatted
        print(source)
        return
    table = "\n".join(table_of(args.card, args.measured)) + "\n"
    if args.write:
        document = TABLE.sub(rf"\g<1>{table}\g<2>", DOCUMENT.read_text())
        DOCUMENT.write_text(document)
    print(table)


# ------------------------------------------------------------------ the table


class Row(NamedTuple):
    """A line of the table, and which line of a benchmark on a card has the same."""

    what: str
    limit: str
    predicted: str
    line: Mapping[str, Any] = {}
    shown: str = "ms"

    def cells(self, found: list[dict[str, Any]]) -> str:
        """Markdown; the last cell is empty where nothing was measured."""
        return f"| {self.what} | {self.limit} | {self.predicted} | {self.measured(found)} |"

    def measured(self, found: list[dict[str, Any]]) -> str:
        """Of the last line that has what `line` has."""
        same = [x for x in found if self.line and self.line.items() <= x.items()]
        if not same or self.shown not in same[-1]:
            return str(same[-1].get("error", ""))[:60] if same else ""
        value, mib = same[-1][self.shown], same[-1].get("mib")
        if self.shown != "ms":
            return f"{100 * value:.0f} %"
        return ms(value / 1e3) + (f", {gib(mib * 2**20)}" if mib else "")


def table_of(card: str, file: Path | None = None) -> Iterator[str]:
    """A line for each thing that a card is to show.

    Args:
        file: lines that benchmarks/gpu/run.py has written on such a card.
    """
    found = [] if file is None else list(lines(file))
    yield f"| on one card ({card}) | to be reached | predicted | measured |"
    yield "| --- | --- | --- | --- |"
    for row in (*pair_rows(card), *force_rows(card), *step_rows(card)):
        yield row.cells(found)


def line_of(loss: str, rows: int, dim: int, dtype: str = "bf16", way: str = "ours") -> dict:
    """What the line of a pair loss has."""
    return {"loss": loss, "rows": rows, "dim": dim, "dtype": dtype, "way": way}


def pair_rows(card: str) -> Iterator[Row]:
    """Pair losses."""
    clip = Asked("infonce", 65536, 768, card=card, symmetric=True)
    siglip = replace(clip, loss="siglip", symmetric=False)
    base = plan(clip).total_s
    for name, asked, limit, part, products in (
        ("symmetric InfoNCE", clip, "55 ms (aim 45), 1.5 GiB", "50 %", 8),
        ("SigLIP, gradients of scale and bias", siglip, "45 ms (aim 40)", "45 %", 6),
    ):
        found, line = plan(asked), line_of(asked.name, 65536, 768)
        beyond = found.total_memory - found.memory["inputs and their gradients"]
        predicted = f"{ms(found.total_s)}, {gib(beyond)}"
        yield Row(f"{name}, bf16, 65,536 x 768", limit, predicted, line)
        rate = products * 65536**2 * 768 / found.total_s / bf16_rate(card)
        name = f"its part of the card's bf16 rate ({products} B²D)"
        yield Row(name, part, f"{100 * rate:.0f} %", line, "of_bf16_rate")
    for loss in ("ntxent", "dcl", "supcon", "cosine_embedding", "self_diagonal"):
        time_s = plan(Asked(loss, 65536 // SPECS[loss].rows, 768, card=card)).total_s
        predicted, line = f"{ms(time_s)}, {time_s / base:.2f} x", line_of(loss, 65536, 768)
        yield Row(f"{loss}, 65,536 rows of scores", "1.3 x symmetric InfoNCE", predicted, line)
    exact = replace(clip, global_batch=32768, dtype="fp32")
    ours, dense = plan(exact).total_s, dense_s(exact)
    name = "symmetric InfoNCE, fp32, 32,768 x 768"
    for way, predicted in (
        ("ours", f"{ms(ours)}, {dense / ours:.1f} times as fast as dense"),
        ("dense", ms(dense)),
    ):
        limit = "1.5 times as fast as dense" if way == "ours" else ""
        line = line_of(clip.name, 32768, 768, "fp32", way)
        yield Row(f"{name}, {way}", limit, predicted, line)
    yield from million_rows(card)


def million_rows(card: str) -> Iterator[Row]:
    """Batches whose matrix of scores would be 2 TB."""
    asked = Asked("infonce", 2**20, 512, card=card, symmetric=True)
    large, small = plan(asked), plan(replace(asked, global_batch=2**16))
    slope = torch.tensor(large.total_memory / small.total_memory).log2().item() / 4
    predicted = f"{large.total_s:.1f} s, {gib(large.total_memory)}, slope {slope:.2f}"
    name, line = "symmetric InfoNCE, bf16, 1,048,576 x 512", line_of(asked.name, 2**20, 512)
    yield Row(name, "completes, slope at most 1.05", predicted, line)
    for ranks in (64, 1024):
        for keys_from in ("gather", "ring"):
            found = plan(replace(asked, dim=768, ranks=ranks, keys_from=keys_from))
            sent = gib(sum(found.sent.values()))
            name = f"the same x 768 over {ranks} ranks, {keys_from} (of several cards)"
            predicted = f"{ms(found.total_s)}, {gib(found.total_memory)}, sends {sent}"
            yield Row(name, "linear, stated", predicted)


def force_rows(card: str) -> Iterator[Row]:
    """The force with five temperatures."""
    for points, dim, limit in (
        (32768, 1024, "0.35 s (aim 0.2)"),
        (8192, 256, "10 x the seed's dense code, 5 x KeOps"),
    ):
        time_s = plan(Asked("force", points, dim, dtype="fp32", card=card)).total_s
        predicted = ms(time_s)
        if points == 8192:
            dense = dense_force_s(points, dim, card)
            predicted += f"; dense {ms(dense)}: {dense / time_s:.0f} x"
        line = {"loss": "force", "shape": [points, dim], "way": "ours"}
        yield Row(f"force, M = N = {points:,}, D = {dim:,}", limit, predicted, line)
    one = plan(Asked("force", 64, 1024, dtype="fp32", card=card))
    seconds = sum(s for part, s in one.seconds.items() if part != "launches")
    together = 4000 * seconds + one.seconds["launches"]
    dense = 4000 * 128 * 128 * 4 * 60 / (CARDS[card].bandwidth * ASSUMED.bandwidth)
    predicted = f"{ms(together)}; dense, batched {ms(together + dense)}"
    line = {"loss": "force", "shape": [4000, 64, 1024], "way": "ours"}
    name = "force, 4,000 groups of 64 + 64, D = 1,024, batched"
    yield Row(name, "beside dense code", predicted, line)


def step_rows(card: str) -> Iterator[Row]:
    """What holds beside the losses."""
    yield Row("host waits of a pair loss, forward and backward", "0", "0 (counted)")
    loss = plan(Asked("ntxent", 256, 128, card=card)).total_s
    step = 512 * VIT_B_FLOP / (VIT_B_RATE * CARDS[card].sms * CARDS[card].clock * CARDS[card].half)
    predicted = f"{ms(step)}, of which the loss {100 * loss / step:.1f} %"
    name = "ViT-B/16 SimCLR step, bf16, 256 samples"
    yield Row(name, "overhead at most 3 %", predicted, {"name": "ViT-B/16, trainer"})


def dense_s(asked: Asked) -> float:
    """Seconds of dense code in fp32: three products without tensor cores, and some ten passes over
    the matrix of scores."""
    card, n = CARDS[asked.card], asked.global_batch
    products = 6 * n**2 * asked.dim / (card.fp32 * ASSUMED.products)
    return products + 10 * 4 * n**2 / (card.bandwidth * ASSUMED.bandwidth)


def dense_force_s(points: int, dim: int, card: str) -> float:
    """Seconds of the seed's code: five temperatures, each with distances of its own in fp32, three
    products, and some 25 passes over the matrix."""
    has, n = CARDS[card], 2 * points
    products = 5 * 3 * 2 * n**2 * dim / (has.fp32 * ASSUMED.products)
    return products + 5 * 25 * 4 * n**2 / (has.bandwidth * ASSUMED.bandwidth)


def bf16_rate(card: str) -> float:
    """What the card is expected to reach in a product."""
    has = CARDS[card]
    return has.sms * has.clock * has.half * ASSUMED.products


def ms(seconds: float) -> str:
    """In ms, or in s."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2g} s"


def gib(num_bytes: float) -> str:
    """In GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


# ------------------------------------------------------------------ the constants


def constants() -> str:
    """Source of the tables of constants, read again."""
    kernels = [f"{key!r}: {of_loss!r}," for key, of_loss in kernel_table().items()]
    costs = [f"{key!r}: {cost!r}," for key, cost in cost_table().items()]
    kinds = "Mapping[tuple[str, str], tuple[Kernel, ...]]", "Mapping[tuple[str, str, str], Cost]"
    parts = [f"KERNELS: {kinds[0]} = {{", *kernels, "}", f"COSTS: {kinds[1]} = {{", *costs, "}", ""]
    return re.sub(r"\b[a-z]\w*=", "", "\n".join(parts))  # without the names of fields


def kernel_table() -> dict[tuple[str, str], tuple[Kernel, ...]]:
    """Cycles of the epilogues, by loss and kind of dtype."""
    return {
        (loss, kind): tuple(read_kernel(name, kind) for name in names)
        for loss, names in KERNELS_OF.items()
        for kind in ("half", "fp32")
    }


def read_kernel(name: str, kind: str) -> Kernel:
    """From the machine code for sm_90, at 768 dimensions."""
    import static

    dtype = "fp32" if kind == "fp32" else "bf16"
    variant = static.VARIANTS[name]
    tile = variant.tile(dtype, 90)
    report = static.compiled(variant, 90, 768, dtype, tile)
    cycles = report.epilogue() / (tile.rows * tile.keys) * 1024
    return Kernel(round(cycles, 1), report.blocks)


def fp32_products() -> float:
    """Cycles in which the products by gradients in fp32 issue a turn of their loops, by those in
    which tensor cores do its three products in TF32; the mean of both, for sm_90."""
    import static

    found = []
    for name in ("product by rows", "product by keys"):
        variant = static.VARIANTS[name]
        tile, report = variant.tile("fp32", 90), static.compiled(variant, 90, dtype="fp32")
        product = 6 * 2 * tile.rows * tile.keys * tile.dims / static.CARDS[90].bf16
        found.append(report.turn * tile.warps / 4 / product)
    return sum(found) / len(found)


def cost_table() -> dict[tuple[str, str, str], Cost]:
    """Bytes and launches, by loss, kind of dtype and source of keys."""
    return {
        (loss, kind, keys_from): read_cost(loss, kind, keys_from)
        for loss in SPECS
        for kind in ("half", "fp32")
        for keys_from in ("gather", "ring")
    }


SHAPES = (  # rows of a rank, dimensions, ranks
    *((65536, 768, 1), (65536, 512, 1), (32768, 768, 1), (32768, 256, 1)),
    *((16384, 768, 4), (16384, 512, 16), (32768, 1024, 8), (8192, 768, 8), (65536, 256, 4)),
)


def read_cost(loss: str, kind: str, keys_from: str) -> Cost:
    """Numbers that give what is counted at several shapes, by least squares."""
    import fake

    size, dtype = (4, "fp32") if kind == "fp32" else (2, "bf16")
    shapes = [s for s in SHAPES if keys_from == "gather" or s[2] > 1]
    lines, peaks, moved, launches, steps = [], [], [], [], []
    for rows, dim, ranks in shapes:
        found = fake.counted(loss, rows // SPECS[loss].rows, dim, dtype, ranks, keys_from)
        keys = rows * ranks if keys_from == "gather" else rows
        lines.append([rows * dim, ranks * rows * dim, rows, ranks * rows])
        known = planner.buffer_bytes(rows, keys, size)
        known += planner.gathered_bytes(rows, dim, ranks, keys_from, size)
        peaks.append(found.peak - known)
        blocks = 1 if keys_from == "gather" else ranks
        chunks = blocks * math.prod(planner.chunks_of_gradients(rows, keys, size))
        moved.append(found.moved)  # products are none of it
        steps.append([1, blocks, chunks])
        launches.append(found.launches + len(found.kernels))
    return Cost(
        memory=fitted(lines, peaks, keys_from == "ring"),
        moved=fitted(lines, moved, False),
        launches=tuple(map(round, solved(steps, launches))),
    )


def fitted(lines: list[list[int]], values: list[int], of_rows_alone: bool) -> Numbers:
    """Bytes for each number; of rows alone, where keys are as many."""
    if of_rows_alone:
        lines = [[line[0], line[2]] for line in lines]
        of_rows, row = map(round, solved(lines, values))
        return Numbers(of_rows, 0, row, 0)
    return Numbers(*map(round, solved(lines, values)))


def solved(lines: list[list[int]], values: list[int]) -> list[float]:
    """Least squares of relative errors."""
    weights = 1 / torch.tensor(values, dtype=torch.float64)
    matrix = torch.tensor(lines, dtype=torch.float64) * weights[:, None]
    scale = matrix.norm(dim=0)
    found = torch.linalg.lstsq(matrix / scale, torch.ones(len(values), 1, dtype=torch.float64))
    return (found.solution[:, 0] / scale).tolist()


if __name__ == "__main__":
    main()
