"""Commands that index shards and look into them: ``dist-contrastive shards index``."""

import argparse
from pathlib import Path


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them to the parser of `shards`."""
    index = commands.add_parser("index", help="write the index that the stream reads by")
    index.add_argument("folder", type=Path, help="folder of .tar shards")
    index.set_defaults(command=_index)


def _index(args: argparse.Namespace) -> int:
    from dist_contrastive.data import index_folder

    index = index_folder(args.folder)
    print(f"{args.folder}: {len(index)} samples in {len(index.shard_samples)} shards")
    return 0
