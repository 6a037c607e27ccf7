"""Commands that make shards: ``dist-contrastive shards pack``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What `shards pack` can write: how, given dist_contrastive.data and a folder, and what it is.
_SOURCES: dict[str, tuple[Callable[[Any, Path], dict[str, Any]], str]] = {
    "digits": (
        lambda data, folder: data.pack_digits(folder),
        "scikit-learn's 1,797 handwritten digits",
    ),
    "glyphs": (
        lambda data, folder: data.pack_glyphs(folder),
        "14,688 images of 34 digits and capitals in 27 fonts",
    ),
    "eight_gaussians": (
        lambda data, folder: data.pack_toy("eight_gaussians", folder),
        "10,240 points of the plane about the corners of an octagon",
    ),
    "checkerboard": (
        lambda data, folder: data.pack_toy("checkerboard", folder),
        "10,240 points in the black squares of a board",
    ),
    "swiss_roll": (
        lambda data, folder: data.pack_toy("swiss_roll", folder),
        "10,240 points along a spiral",
    ),
}


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them to the parser of `shards`."""
    pack = commands.add_parser("pack", help="write a data set as shards, and index them")
    sources = "; ".join(f"{name}: {what}" for name, (_, what) in _SOURCES.items())
    pack.add_argument("source", choices=_SOURCES, help=sources)
    pack.add_argument("folder", type=Path, help="gets one folder of shards per split")
    pack.set_defaults(command=_pack)


def _pack(args: argparse.Namespace) -> int:
    from dist_contrastive import data

    write, _ = _SOURCES[args.source]
    for split, index in write(data, args.folder).items():
        print(f"{args.folder / split}: {len(index)} samples in {len(index.shard_samples)} shards")
    return 0
