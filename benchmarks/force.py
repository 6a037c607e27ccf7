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
is the median over pairs of neighbours, so that a busy machine slows both sides of it. Memory is the
growth of the peak, in further processes, as in memory.py; of ranks, the largest. Ratios are the
baseline's over ours. Errors are relative (norm of the difference over the norm), of the loss and of
the gradient, to the dense code in fp64.
"""

import argparse
import os
from collections.abc import Callable, Sequence
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

from dist_contrastive.losses.force_presets import PRESETS

RANKS = 2


class Sizes(NamedTuple):
    """How much of everything."""

    points: Shape
    large: Shape
    groups: Shape
    repeats: int


SIZES = {
    "full": Sizes((2048, 256), (16384, 256), (256, 64, 64), 5),
    "small": Sizes((64, 16), (128, 16), (64, 8, 16), 2),
}
COMPILERS = {"default flags": "", "-march=native -ffast-math": "-march=native -ffast-math"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args(arguments)
    for name in args.tables:
        print(f"{name}, at a load of {os.getloadavg()[0]:.1f}:\n")
        TABLES[name](SIZES[args.sizes])
        print(flush=True)


def dense_table(sizes: Sizes) -> None:
    """Every preset against dense code."""
    print_head()
    for name in BASELINES:
        if name.endswith("recorded"):
            print_versus(name, name, "gather", sizes.points, sizes.repeats)


def products_table(sizes: Sizes) -> None:
    """Ours in units of the matrix products."""
    print("| preset | s ours / products | ratio | ratio of the fastest runs |")
    print("| --- | --- | --- | --- |")
    for preset in PRESETS:
        (times,) = in_own_process(against_products, preset, sizes.points, 2 * sizes.repeats)
        mine, products = np.array(times)
        seconds = f"{np.median(mine):.3g} / {np.median(products):.3g}"
        ratio = f"{np.median(mine / products):.2f} | {mine.min() / products.min():.2f}"
        print(f"| {preset} | {seconds} | {ratio} |", flush=True)


def large_table(sizes: Sizes) -> None:
    """Ours where matrices would not fit."""
    print("| preset | M = N | D | s | MiB | loss |")
    print("| --- | --- | --- | --- | --- | --- |")
    for preset in PRESETS:
        ours = name_of(preset, "gather")
        ((seconds, loss),) = in_own_process(once, ours, sizes.large)
        shape = " | ".join(map(str, sizes.large))
        peak = peak_in_own_process(ours, sizes.large)
        print(f"| {preset} | {shape} | {seconds:.1f} | {peak:.0f} | {loss:.6g} |", flush=True)


def keops_table(sizes: Sizes) -> None:
    """The drift field with LazyTensors, which by default takes minutes."""
    if not HAS_KEOPS:
        print("KeOps is not installed")
        return
    print_head(f"pykeops {version('pykeops')}")
    for title, flags in COMPILERS.items():
        repeats = sizes.repeats if flags else 1
        print_versus(title, "drift, KeOps", "gather", sizes.points, repeats, flags=flags)


def ranks_table(sizes: Sizes) -> None:
    """One global batch on several ranks."""
    print_head("keys_from")
    baseline = "drift, computed on all ranks"
    for keys_from in ("gather", "ring"):
        print_versus(keys_from, baseline, keys_from, sizes.points, sizes.repeats, ranks=RANKS)


def groups_table(sizes: Sizes) -> None:
    """Many small groups."""
    print_head(f"{sizes.groups[0]} groups")
    for name in ("seed, not recorded", "drift, not recorded", "paper, not recorded"):
        print_versus(name, name, "gather", sizes.groups, sizes.repeats)


TABLES: dict[str, Callable[[Sizes], None]] = {
    "dense": dense_table,
    "products": products_table,
    "large": large_table,
    "keops": keops_table,
    "ranks": ranks_table,
    "groups": groups_table,
}


def print_head(title: str = "") -> None:
    """Of a table of `print_versus`."""
    print(f"| {title} | s baseline / ours | ratio | MiB baseline / ours | ratio | baseline errs | ")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)


def print_versus(
    title: str,
    baseline: str,
    keys_from: str,
    shape: Shape,
    repeats: int,
    *,
    ranks: int = 1,
    flags: str = "",
) -> None:
    """Measure one of the BASELINES and ours of the same preset, and print a line.

    Args:
        flags: what KeOps compiles with.
    """
    preset = baseline.partition(",")[0]
    names = baseline, name_of(preset, keys_from)
    found = in_own_process(timed, names, preset, shape, repeats, ranks=ranks, CXXFLAGS=flags)
    times, errors = (np.max(x, axis=0) for x in zip(*found, strict=True))  # over ranks
    peaks = [peak_in_own_process(name, shape, ranks=ranks, CXXFLAGS=flags) for name in names]
    print(as_row(title, times, errors, peaks), flush=True)


def as_row(title: str, times: np.ndarray, errors: np.ndarray, peaks: list[float]) -> str:
    """A line of the table.

    Args:
        times: [2, repeats] in s. errors: [2, 2], of loss and gradient. peaks: [2] in MiB. The
            baseline comes first in each.
    """
    took = [f"{x:.3g}" for x in np.median(times, axis=1)]
    held = [f"{x:.3g}" if x < 10 else f"{x:.0f}" for x in peaks]
    off = [f"{loss:.0e}, {gradient:.0e}" for loss, gradient in errors]
    cells = [title, " / ".join(took), f"{np.median(times[0] / times[1]):.1f}"]
    cells += [" / ".join(held), f"{peaks[0] / peaks[1]:.1f}", *off]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
