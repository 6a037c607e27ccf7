"""Training where every sample of a very large batch is compared with every other.

One notation in the whole package:

    W       number of ranks (world size)
    b, B    rows on this rank, rows of the global batch (B = sum of b over ranks)
    D       dimension of an embedding
    M, N    generated points (negative) and data points (positive) of the contrastive force
    G       independent groups of points
    rows    the samples whose loss this rank computes; keys: what they are compared with
    lse     logarithm of a sum of exponentials
    lane    one of the L equal parts in which an epoch is read
"""

import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC_MODULES = ("collectives", "losses", "testing")


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: `import dist_contrastive` does not import torch."""
    if name == "train":
        return import_module("dist_contrastive.trainer").train
    if name in _PUBLIC_MODULES:
        return import_module(f"dist_contrastive.{name}")
    raise AttributeError(f"module 'dist_contrastive' has no attribute {name!r}")


def without_current_folder() -> None:
    """Keep Python, and what it starts, from importing modules that lie in the current folder: by
    `python -m` a folder of data with a queue.py or numpy.py in it would be run.

    Nothing changes where the current folder is that of this package.
    """
    here = os.path.realpath(".")
    if here == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        return
    is_first = sys.path[:1] != [] and os.path.realpath(sys.path[0]) == here
    if sys.argv[:1] == ["-m"] and is_first and not sys.flags.safe_path:
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"


if sys.argv[:1] == ["-m"]:  # this package is being found by `python -m`
    without_current_folder()
