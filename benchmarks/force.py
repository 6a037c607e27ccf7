"""Time and memory of the contrastive force, forward and backward, against other ways to compute it.

    python benchmarks/force.py [--sizes full] [--tables dense products large keops ranks groups]

fp32, on Linux, two threads, as many generated points as data. The other ways are in
force_baselines.py:

- dense: the seed's code in plain torch, and Algorithm 2 of the paper.
- products: the two matrix products that nothing can do without, x @ x.T and w @ x of all points.
- large: more points than fit into matrices.
- keops: LazyTensors, compiled as by default and for this processor (`pip install pykeops`).
- ranks: one global batch on two ranks of one thread each; the baseline computes it on both.
- groups: many small ones, whose matrices are no burden.

A line is timed in a process of its own, where both sides take turns: seconds are medians, the ratio
is the median over pairs of neighbours, so that a busy machine slows both sides of it, and beside it
stands that of the fastest runs. Memory is the growth of the peak, in further processes, as in
memory.py; of ranks, the largest. Ratios are the baseline's over ours, of products ours over theirs.
Errors are relative (norm of the difference over the norm), of the loss and of the gradient, to the
dense code in fp64; nan is what dense fp32 code computes where its weights underflow.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from force_baselines import HAS_KEOPS
from force_runs import (
    BASELINES,
    Shape,
    against_products,
    in_own_process,
    once,
    ours,
    peak_in_own_process,
    timed,
)

from dist_contrastive.losses.force import PRESETS
from dist_contrastive.pairwise import KeysFrom

RANKS = 2
PAGE_MIB = 4 / 1024


class Sizes(NamedTuple):
    """How much of everything."""

    points: Shape
    large: Shape
    groups: Shape
    repeats: int


SIZES = {
    "full": Sizes((2048, 256), (16384, 256), (256, 64, 64), 5),
    "small": Sizes((64, 16), (128, 16), (64, 8, 16), 1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print one table after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args(arguments)
    for name in args.tables:
        print(f"{name}, at a load of {os.getloadavg()[0]:.1f}:\n")
        for line in TABLES[name](SIZES[args.sizes]):
            print(line, flush=True)
        print()


def dense_table(sizes: Sizes) -> Iterator[str]:
    """Every preset against dense code."""
    yield from head("preset", *COMPARED)
    for name in BASELINES:
        if name.endswith("recorded"):
            yield row(name, *compared(name, sizes.points, sizes.repeats))


def products_table(sizes: Sizes) -> Iterator[str]:
    """Ours in units of the matrix products."""
    yield from head("preset", "s ours / products", "ratio", "fastest")
    (times,) = in_own_process(against_products, sizes.points, 2 * sizes.repeats)
    *all_mine, products = np.array(times)
    for preset, mine in zip(PRESETS, all_mine, strict=True):
        took = f"{np.median(mine):.3g} / {np.median(products):.3g}"
        fastest = mine.min() / products.min()
        yield row(preset, took, f"{np.median(mine / products):.2f}", f"{fastest:.2f}")


def large_table(sizes: Sizes) -> Iterator[str]:
    """Ours where matrices would not fit."""
    points, dim = map(str, sizes.large)
    yield from head("preset", "M = N", "D", "s", "MiB", "loss")
    for preset in PRESETS:
        ((seconds, loss),) = in_own_process(once, ours(preset), sizes.large)
        peak = peak_in_own_process(ours(preset), sizes.large)
        yield row(preset, points, dim, f"{seconds:.1f}", f"{peak:.0f}", f"{loss:.6g}")


def keops_table(sizes: Sizes) -> Iterator[str]:
    """The drift field with LazyTensors, which take minutes as they are compiled by default."""
    if not HAS_KEOPS:
        yield "KeOps is not installed"
        return
    yield from head(f"pykeops {version('pykeops')}", *COMPARED)
    for flags, repeats in (("", 1), ("-march=native -ffast-math", sizes.repeats)):
        cells = compared("drift, KeOps", sizes.points, repeats, flags=flags)
        yield row(flags or "default flags", *cells)


def ranks_table(sizes: Sizes) -> Iterator[str]:
    """One global batch on several ranks."""
    yield from head("keys_from", *COMPARED)
    baseline = "drift, computed on all ranks"
    ways: tuple[KeysFrom, ...] = ("gather", "ring")
    for keys_from in ways:
        cells = compared(baseline, sizes.points, sizes.repeats, keys_from=keys_from, ranks=RANKS)
        yield row(keys_from, *cells)


def groups_table(sizes: Sizes) -> Iterator[str]:
    """Many small groups."""
    yield from head("preset", *COMPARED)
    for preset in PRESETS:
        name = f"{preset}, not recorded"
        yield row(name, *compared(name, sizes.groups, sizes.repeats))


TABLES: dict[str, Callable[[Sizes], Iterator[str]]] = {
    "dense": dense_table,
    "products": products_table,
    "large": large_table,
    "keops": keops_table,
    "ranks": ranks_table,
    "groups": groups_table,
}
COMPARED = (
    "s baseline / ours", "ratio", "fastest", "MiB baseline / ours", "ratio", "baseline is off by",
    "ours by",
)  # fmt: skip


def compared(
    baseline: str,
    shape: Shape,
    repeats: int,
    *,
    keys_from: KeysFrom = "gather",
    ranks: int = 1,
    flags: str = "",
) -> list[str]:
    """Cells below `COMPARED`: one of BASELINES and ours of the same preset, measured.

    Args:
        flags: what KeOps compiles with.
    """
    preset = baseline.partition(",")[0]
    names = baseline, ours(preset, keys_from)
    found = in_own_process(timed, names, preset, shape, repeats, ranks=ranks, CXXFLAGS=flags)
    times, errors = (np.max(x, axis=0) for x in zip(*found, strict=True))  # over ranks
    peaks = [peak_in_own_process(name, shape, ranks=ranks, CXXFLAGS=flags) for name in names]
    return as_cells(times, errors, peaks)


def as_cells(times: np.ndarray, errors: np.ndarray, peaks: list[float]) -> list[str]:
    """Cells below `COMPARED`.

    Args:
        times: [2, repeats] in s. errors: [2, 2], of loss and gradient. peaks: [2] in MiB. The
            baseline comes first in each.
    """
    took = " / ".join(f"{x:.3g}" for x in np.median(times, axis=1))
    held = " / ".join(f"{x:.0f}" for x in peaks)
    fastest = times.min(axis=1)
    times_ratios = f"{np.median(times[0] / times[1]):.1f}", f"{fastest[0] / fastest[1]:.1f}"
    memory_ratio = f"{peaks[0] / max(peaks[1], PAGE_MIB):.1f}"
    off = [f"{loss:.0e}, {gradient:.0e}" for loss, gradient in errors]
    return [took, *times_ratios, held, memory_ratio, *off]


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*titles), row(*["---"] * len(titles))]


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
