"""Very many samples: how an index opens, a part of it is taken, and a training run starts.

    python benchmarks/index_size.py [--samples 100000000] [--shards 10000] [--folder FOLDER]

What is real: the index, which every process opens, checks and maps as any other; the samples, which
are read from a tar, compared with their checksums, decoded and trained on; `train` itself, from the
command to its steps, by one process and by four. What is not: all shards are one tar of small
pictures under as many names, so that their pixels are the same; the keys in the index are
different ones, SHARD/NUMBER. A tenth of the samples is taken by a file of keys, drawn at random.

Private memory is what a process has written; what is mapped belongs to all of a machine. That of a
run is compared with that of the same run on one of the shards.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import torch

from dist_contrastive.data import BlockCache, Filter, ShardStream, Subset, load_index, open_subset
from dist_contrastive.data.fields import Fields
from dist_contrastive.data.keyed_random import combine
from dist_contrastive.data.shards.index_file import IndexWriter
from dist_contrastive.data.shards.scan import index_shard
from dist_contrastive.data.shards.storage import ShardFiles
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.metrics import read_rows

torch.set_num_threads(1)  # this process forks
RANKS, BATCH = 64, 65_536
CONFIG = Path(__file__).parents[1] / "configs/digits_encoder.yaml"
SETTINGS = (
    *("data.test=null", "data.label=null", "data.num_classes=null", "data.global_batch_size=64"),
    *("task.encoder={name: residual, widths: [8]}", "task.head={hidden: 16, out: 8}"),
    *("train.steps=1000000", "train.log_every=1", "optim.warmup_steps=0"),
)


def main() -> None:
    """Measure, and print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="for the index; removed afterwards")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 4], help="of training runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write(folder, args.samples // args.shards, args.shards)
        print(f"{args.samples} samples in {args.shards} shards, an index of {size / 2**20:.0f} MiB")
        print("\n| step | s | CPU s | private MiB |\n| --- | --- | --- | --- |", flush=True)
        in_child(measure, folder)
        print("\n| run | ranks | s to the first step | CPU s of a rank | private MiB of a rank |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        sources = {
            "one shard": f"{folder}/all/0000000.tar",
            "all": f"{folder}/all",
            "a tenth": f"{{shards: '{folder}/all', filter: {{keys: '{folder}/keys.parquet'}}}}",
        }
        for ranks in args.ranks:
            for what, source in sources.items():
                seconds, used, private = start(folder, source, ranks)
                cells = what, str(ranks), f"{seconds:.1f}", f"{used:.1f}", f"{private:.0f}"
                print(f"| {' | '.join(cells)} |", flush=True)


def in_child(work, *args) -> None:
    """Call it in a process without what this one has written."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        work(*args)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)


def write(folder: Path, per_shard: int, shards: int) -> int:
    """One tar under many names, their index, and keys of a tenth; returns the bytes of the
    index."""
    (folder / "all").mkdir()
    rng, base = np.random.default_rng(0), folder / "base.tar"
    samples = (
        {"__key__": f"{n:08d}", "png": rng.integers(0, 256, (1, 8, 8), np.uint8), "cls": n % 10}
        for n in range(per_shard)
    )
    write_samples(base, samples)
    part = index_shard(str(base), ShardFiles(BlockCache()))
    for number in range(shards):
        (folder / "all" / f"{number:07d}.tar").symlink_to(base)
    numbers = words([f"{n:08d}" for n in range(per_shard)])
    schema = pa.schema({"key": pa.string()})
    path = folder / "all" / "index.npz"
    with (
        IndexWriter(path) as writer,
        parquet.ParquetWriter(folder / "keys.parquet", schema) as keys,
    ):
        for number in range(shards):
            # `key_hashes` of f"{number:07d}/{n:08d}": two words of 8 bytes.
            hashes = combine(16, int(words([f"{number:07d}/"])[0]), numbers).numpy()
            name = str(folder / "all" / f"{number:07d}.tar")
            writer.add(replace(part, shards=(name,), sample_key=hashes.view(np.uint64)))
            chosen = np.flatnonzero(rng.random(per_shard) < 0.1)
            keys.write_table(pa.table({"key": [f"{number:07d}/{n:08d}" for n in chosen.tolist()]}))
        writer.save({})
    return path.stat().st_size


def words(texts: list[str]) -> torch.Tensor:
    """Texts of 8 signs as the numbers that `key_hashes` combines."""
    return torch.from_numpy(np.array([text.encode() for text in texts], "S8").view("<i8"))


def measure(folder: Path) -> None:
    """Lines of the table."""
    begin = time.perf_counter(), time.process_time(), private_mb()

    def line(step: str) -> None:
        now = time.perf_counter(), time.process_time(), private_mb()
        taken = [after - before for after, before in zip(now, begin, strict=True)]
        print(f"| {step} | {taken[0]:.2f} | {taken[1]:.2f} | {taken[2]:.0f} |", flush=True)

    index = load_index(folder / "all")
    line("index opened")
    Fields("png", "cls", num_classes=10).check(index)
    line("all samples have the fields")
    settings = {"global_batch_size": BATCH, "lanes": RANKS}
    for rank in range(RANKS):
        stream = ShardStream(index, rank=rank, world_size=RANKS, seed=0, **settings)
        for lane in stream.lanes:
            stream.order.samples(lane, 0, BATCH // RANKS)
    line(f"numbers of a batch of {BATCH} on {RANKS} ranks")
    wanted = Filter(keys=str(folder / "keys.parquet"))
    begin = time.perf_counter(), time.process_time(), private_mb()
    subset = open_subset(index, wanted, folder / "subsets")
    line(f"from there, {len(subset)} samples taken by their keys")
    begin = time.perf_counter(), time.process_time(), private_mb()
    subset = open_subset(index, wanted, folder / "subsets")
    line("the same by the next process")
    once(subset, folder, len(index))


def once(subset: Subset, folder: Path, samples: int) -> None:
    """Refuse to go on unless an epoch has each sample that the keys name exactly once."""
    settings = {"global_batch_size": BATCH, "lanes": RANKS, "seed": 0}
    expected = np.zeros(samples, np.uint8)
    with parquet.ParquetFile(folder / "keys.parquet") as file:
        per_shard = samples // file.num_row_groups
        for batch in file.iter_batches(1 << 20):
            keys = np.array(batch.column(0).to_pylist(), "S16").view("S1").reshape(-1, 16)
            shard, number = keys[:, :7].copy().view("S7"), keys[:, 8:].copy().view("S8")
            expected[shard.astype(np.int64) * per_shard + number.astype(np.int64)] += 1
    seen = np.zeros(samples, np.uint8)
    order = ShardStream(subset, **settings).order
    for lane in range(RANKS):
        stop = order.position(lane, order.samples_per_epoch)
        for first in range(0, stop, 1 << 16):
            epochs, numbers = order.samples(lane, first, min(first + (1 << 16), stop))
            assert not epochs.any()
            np.add.at(seen, subset.numbers[numbers], 1)
    assert expected.max() == 1
    assert np.array_equal(seen, expected)
    print(f"\nAn epoch has each of the {int(seen.sum())} exactly once.")


def start(folder: Path, source: str, ranks: int) -> tuple[float, float, float]:
    """Seconds from the command to the first step of a run; of the rank that has most, processor
    time until then, and private memory after 20 steps."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    cache = f"data.cache.folder={folder}/cache"
    train = [str(CONFIG), f"data.train={source}", cache, *SETTINGS, f"run_dir={run}"]
    launcher = ["-m", "launch.local"] if ranks > 1 else ["-m", "dist_contrastive", "train"]
    more = ["--ranks", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *launcher, *train, *more],
        cwd=CONFIG.parents[1],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not read_rows(run):
            assert process.poll() is None, "the run has ended"
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        used = max(sum(member.cpu_times()[:2]) for member in family)
        while len(read_rows(run)) < 20:  # all of the first batches' memory
            time.sleep(0.05)
        return seconds, used, max(private_mb(member.pid) for member in family)
    finally:
        for member in psutil.Process(process.pid).children(True):
            member.kill()
        process.kill()
        process.wait()


def private_mb(process: int | str = "self") -> float:
    """Memory that a process has written, in MiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_Dirty")) / 1024


if __name__ == "__main__":
    main()
