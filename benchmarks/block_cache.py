"""Blocks of remote shards against fsspec's cache of whole files: what the first batch costs.

    python benchmarks/block_cache.py [--shard-mb 125] [--quick]

Eight lanes read shuffled samples of 128 KiB from eight shards on a server of this machine, from the
start of an epoch and from its middle, as a resumed run does.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
from range_server import RangeServer
from stream_shards import random_bytes

from dist_contrastive.data import BlockCache, ShardStream, load_index
from dist_contrastive.data.shards.storage import ShardFiles

SAMPLE = 128 << 10  # bytes
GIGABIT = 125e6  # bytes a second


class WholeFiles(ShardFiles):
    """Reads shards through fsspec's `filecache`."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        super().__init__(BlockCache())
        self._system = fsspec.filesystem(
            "filecache", target_protocol="http", cache_storage=str(folder)
        )

    def read(self, shard: str, size: int, start: int, length: int) -> bytes:
        """Bytes of a shard, which is fetched whole before."""
        if shard not in self._files:
            self._files[shard] = self._system.open(shard, "rb")
        self._files[shard].seek(start)
        return self._files[shard].read(length)

    def close(self) -> None:
        """Close all files."""
        super().close()
        while self._files:
            self._files.popitem()[1].close()

    def prefetch(self, shard: str, size: int, start: int, length: int) -> None:
        """Nothing: whole files have no parts to fetch."""


def first_batch(shards: Path, consumed: int, is_whole: bool, batches: int) -> list[float]:
    """Seconds to the first batch, MiB sent until then, and MiB sent until the last batch."""
    with tempfile.TemporaryDirectory() as cache, RangeServer(shards) as server:
        index = load_index(server.url, BlockCache.Config(folder=Path(cache)))
        if is_whole:
            index = replace(index, files=WholeFiles(Path(cache)))
        begin = time.perf_counter()
        stream = iter(
            ShardStream(
                index,
                global_batch_size=64,
                lanes=8,
                seed=0,
                consumed=consumed,
                epochs=1,
                shuffle_window=128,
            )
        )
        next(stream)
        seconds, first = time.perf_counter() - begin, server.bytes_sent
        for _ in range(batches - 1):
            next(stream)
        time.sleep(1)  # blocks that are being fetched
        index.files.close()
        return [seconds, first / 2**20, server.bytes_sent / 2**20]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard-mb", type=int, default=125)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which tell nothing")
    args = parser.parse_args(arguments)
    per_shard, batches = (64, 2) if args.quick else ((args.shard_mb << 20) // SAMPLE, 20)
    print(
        "| from sample | cache | s to first batch | MiB to it | s at 1 Gbit/s | MiB to the last |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        shards = random_bytes(Path(folder) / "shards", SAMPLE, 8, per_shard)
        for consumed in (0, 4 * per_shard):
            for name in ("blocks", "whole files"):
                found = first_batch(shards, consumed, name == "whole files", batches)
                cells = (f"{found[0]:.2f}", f"{found[1]:.0f}", f"{found[1] * 2**20 / GIGABIT:.1f}")
                print(f"| {consumed} | {name} | {' | '.join(cells)} | {found[2]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
