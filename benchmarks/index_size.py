"""Start of a stream over very many samples: time, and memory of the process, without the pixels.

    python benchmarks/index_size.py [--samples 100000000] [--shards 10000] [--folder FOLDER]

Writes an index of shards that are holes in files (36 bytes a sample, two fields), opens it as
training does, and takes the numbers of a batch of each of 64 ranks. Private memory is that which
the process has written; what is mapped belongs to all processes of a machine.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from dist_contrastive.data import load_index
from dist_contrastive.data.fields import Fields
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.index_file import save_index
from dist_contrastive.data.stream.shard_stream import ShardStream

SAMPLE_BYTES, HEADER_BYTES, FIELD_BYTES = 3072, 512, 900
RANKS, BATCH = 64, 65_536


def main() -> None:
    """Measure, and print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="for the index; removed afterwards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write(Path(folder), args.samples // args.shards, args.shards)
        print(f"{args.samples} samples in {args.shards} shards, an index of {size / 2**20:.0f} MiB")
        print("| step | s | private MiB |\n| --- | --- | --- |")
        child = os.fork()  # without what the index was written with
        if child == 0:
            measure(Path(folder))
            os._exit(0)
        os.waitpid(child, 0)


def write(folder: Path, per_shard: int, shards: int) -> int:
    """Shards without content and their index; returns the bytes of the index."""
    paths = [folder / f"s-{number:06d}.tar" for number in range(shards)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(per_shard * SAMPLE_BYTES + 1024)
    samples = per_shard * shards
    starts = np.array([0, SAMPLE_BYTES // 2], np.uint32)
    index = ShardIndex(
        shards=tuple(map(str, paths)),
        shard_bytes=np.full(shards, per_shard * SAMPLE_BYTES + 1024, np.int64),
        shard_sha256=tuple(f"{number:064x}" for number in range(shards)),
        shard_samples=np.full(shards, per_shard, np.int64),
        fields=("cls", "png"),
        sample_offset=np.tile(np.arange(per_shard, dtype=np.int64) * SAMPLE_BYTES, shards),
        member_start=np.broadcast_to(starts, (samples, 2)),
        member_header=np.broadcast_to(np.uint16(HEADER_BYTES), (samples, 2)),
        member_size=np.broadcast_to(np.uint32(FIELD_BYTES), (samples, 2)),
        member_crc32=np.broadcast_to(np.uint32(0), (samples, 2)),
    )
    return save_index(index, folder / "index.npz").stat().st_size


def measure(folder: Path) -> None:
    """Lines of the table."""
    begin, before = time.perf_counter(), private_mb()

    def line(step: str) -> None:
        print(f"| {step} | {time.perf_counter() - begin:.2f} | {private_mb() - before:.0f} |")

    index = load_index(folder)
    line("index opened")
    Fields("png", "cls", num_classes=10).check(index)
    line("all samples have the fields")
    settings = {"global_batch_size": BATCH, "lanes": RANKS}
    for rank in range(RANKS):
        stream = ShardStream(index, rank=rank, world_size=RANKS, seed=0, **settings)
        for lane in stream.lanes:
            stream.order.samples(lane, 0, BATCH // RANKS)
    line(f"numbers of a batch of {BATCH} on {RANKS} ranks")


def private_mb() -> float:
    """Memory that this process has written, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_Dirty")) / 1024


if __name__ == "__main__":
    main()
