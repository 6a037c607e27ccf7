"""Time and memory of the contrastive force, forward and backward, against other ways to compute it.

    python benchmarks/force.py [--sizes full] [--tables dense products large keops ranks groups]

fp32, on Linux, two threads, M = N points. What it is compared with is in force_baselines.py:

- dense: the seed's code in plain torch, recorded by autograd as in the seed, and without; Algorithm
  2 of the paper.
- products: the two matrix products that no way can do without, x @ x.T and w @ x of all points.
- large: more points than fit into matrices.
- keops: LazyTensors, compiled as by default, and for this processor.
- ranks: the global batch over two ranks of one thread each; the baseline computes it on both.
- groups: many small ones, where matrices are no burden.

Every line is timed in a process of its own, in which the two sides take turns: seconds are medians,
the ratio is the median over pairs of neighbouring runs, so that a busy machine slows both sides.
Memory is the growth of the peak in further processes, as in memory.py; of ranks, the largest. Errors
are relative (norm of the difference over the norm), against the dense code in fp64.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from force_baselines import (
    HAS_KEOPS,
    Loss,
    clouds,
    gathered_loss,
    keops_loss,
    paper_loss,
    seed_loss,
)
from memory import growth_mib
from torch import Tensor

from dist_contrastive import collectives, losses
from dist_contrastive.losses.force_presets import PRESETS
from dist_contrastive.testing import run_ranks

THREADS = 2  # of one process; ranks have one each
LIMIT_S = 3600.0
FOR_THIS_PROCESSOR = "-march=native -ffast-math"

Shape = tuple[int, ...]
"""[m, D] or [groups, m, D], of the generated points and of the data each."""
T = TypeVar("T")


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
BASELINES: dict[str, Loss] = {
    "seed": seed_loss,
    "seed, no graph": partial(seed_loss, with_graph=False),
    "drift": partial(seed_loss, masked=True),
    "drift, no graph": partial(seed_loss, masked=True, with_graph=False),
    "paper, no graph": paper_loss,
    "drift, KeOps": keops_loss,
    "drift, gathered": gathered_loss,
}
EXACT = {name: BASELINES[f"{name}, no graph"] for name in PRESETS}
HEAD = "| {} | s baseline / ours | ratio | MiB baseline / ours | ratio | off fp64, loss and gradient: baseline | ours |"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables that are asked for, or answer a call of `in_own_process`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.call:
        print(json.dumps(answer(*json.loads(args.call))))
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name in args.tables:
        print()
        TABLES[name](SIZES[args.sizes])
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")
