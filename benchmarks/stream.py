"""The sample stream: its speed beside webdataset's, seeking, shuffling, and the memory of workers.

    python benchmarks/stream.py [--tables throughput http sources seek shuffle memory] [--quick]

The plain side is webdataset's usual pipeline: `WebDataset(urls, shardshuffle=...)`, a shuffle
buffer, `map_dict`, `to_tuple`, `batched`, in a `WebLoader` with as many workers. Both sides read
the same tars, decode with the same function (Pillow), shuffle among 1024 samples at a time, and
give batches of equal size. Samples are crops of the two photographs that come with scikit-learn,
as JPEG of quality 90, of 224x224 pixels and of 64x64. Files lie in the page cache.

Sides take turns within one process; an epoch counts from the construction of its side to the last
batch. Rates are medians over turns, and so are the ratios of what ran in the same turn. Time of
processors tells more on a busy machine: it is that of the main process and its workers.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import stream_memory
import stream_shuffle
from stream_runs import Figures, in_own_process, rates, seek, source_rates
from stream_shards import SERVER, as_files, photographs, random_bytes, served


class Sizes(NamedTuple):
    """How much each table measures."""

    crops: dict[int, int]  # samples in each shard, by the pixels of a side
    shards: int
    batch: int
    workers: tuple[int, ...]
    turns: int
    seek: tuple[int, int]  # shards, and samples of each
    shuffle: stream_shuffle.Layout
    windows: tuple[int, ...]
    prefetch: tuple[int, ...]  # batches
    batches: list[int]  # after which memory is measured
    index: tuple[int, int]  # shards, and samples of each


FULL = Sizes(
    {224: 512, 64: 2048}, 8, 256, (0, 1, 2), 5, (100, 1000),
    stream_shuffle.Layout(100_000, 100, 100, 256), (256, 1024, 4096), (2, 8), [20, 400],
    (1000, 1000),
)  # fmt: skip
QUICK = Sizes(
    {32: 16}, 2, 16, (1,), 1, (4, 64),
    stream_shuffle.Layout(2_000, 10, 20, 32), (16,), (2,), [2, 4], (4, 1000),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print one table after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which tell nothing")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stream-") as folder:
        for name in args.tables:
            print(f"{name}, at a load of {os.getloadavg()[0]:.1f} before:\n")
            for line in TABLES[name](QUICK if args.quick else FULL, Path(folder)):
                print(line, flush=True)
            print(f"\n(load after: {os.getloadavg()[0]:.1f})\n")


def throughput_table(sizes: Sizes, folder: Path) -> Iterator[str]:
    """Local files: ours against webdataset."""
    took = ("samples/s plain / ours", "ratio", "CPU us a sample plain / ours", "ratio")
    yield from head("crop", "workers", *took)
    for side, shards in crops(sizes, folder):
        for workers in sizes.workers:
            found = in_own_process(
                rates, str(shards), "", sizes.shards, sizes.batch, workers, sizes.turns
            )
            cells = []
            for column in (0, 1):
                plain, ours = (of(found, name, column) for name in ("plain, local", "ours, local"))
                cells += [f"{np.median(plain):.0f} / {np.median(ours):.0f}", ratio(ours, plain)]
            yield row(str(side), str(workers), *cells)


def http_table(sizes: Sizes, folder: Path) -> Iterator[str]:
    """The same over HTTP, all sides against webdataset's from that server."""
    yield f"server: {SERVER}\n"
    took = ("samples/s", "to plain", "CPU us a sample", "to plain")
    yield from head("crop", "workers", "side", *took)
    for side, shards in crops(sizes, folder):
        with served(shards) as url:
            for workers in sizes.workers:
                found = in_own_process(
                    rates, str(shards), url, sizes.shards, sizes.batch, workers, sizes.turns
                )
                for name in found:
                    cells = []
                    for column in (0, 1):
                        mine = of(found, name, column)
                        compared = ratio(mine, of(found, "plain", column))
                        cells += [f"{np.median(mine):.0f}", compared]
                    yield row(str(side), str(workers), name, *cells)


def sources_table(sizes: Sizes, folder: Path) -> Iterator[str]:
    """The kinds of source with the same images, without workers."""
    yield from head("crop", "source", "samples/s", "to packed", "CPU us a sample", "to packed")
    for side, per_shard in sizes.crops.items():
        root = as_files(folder / f"files-{side}", side, sizes.shards * per_shard // 8)
        found = in_own_process(source_rates, str(root), sizes.batch, sizes.turns)
        for name in found:
            cells = []
            for column in (0, 1):
                mine = of(found, name, column)
                cells += [f"{np.median(mine):.0f}", ratio(mine, of(found, "packed", column))]
            yield row(str(side), name, *cells)


def seek_table(sizes: Sizes, folder: Path) -> Iterator[str]:
    """From the construction of a stream in the middle of an epoch to its first batch."""
    count, per_shard = sizes.seek
    shards = random_bytes(folder / "small", 1024, count, per_shard)
    yield f"{count * per_shard} samples of 1 KiB in {count} shards, batches of {sizes.batch}\n"
    took = ("s to read half", "s to seek", "ratio", "s to begin at 0", "MiB read, half / seek")
    yield from head("workers", *took, "s webdataset skips half", "seek to that")
    for workers in sorted({sizes.workers[0], sizes.workers[-1]}):
        found = in_own_process(seek, str(shards), count, sizes.batch, workers, sizes.turns)
        half, sought, first, plain = (
            np.array(found[name]) for name in ("half", "seek", "begin", "plain")
        )
        read = [np.median(found[f"{name} bytes"]) / 2**20 for name in ("half", "seek")]
        yield row(
            str(workers),
            f"{np.median(half):.2f}",
            f"{np.median(sought):.3f}",
            f"{np.median(sought / half):.2%}",
            f"{np.median(first):.3f}",
            f"{read[0]:.1f} / {read[1]:.1f}" if workers == 0 else "in workers",
            f"{np.median(plain):.2f}",
            f"{np.median(sought / plain):.2%}",
        )


def shuffle_table(sizes: Sizes, folder: Path) -> Iterator[str]:
    """Orders of shards that are sorted by class."""
    layout = sizes.shuffle
    expected = stream_shuffle.expected_classes(layout)
    yield f"{layout.samples} samples in {layout.shards} shards, {layout.classes} classes in order;"
    yield f"a random batch of {layout.batch} has {expected:.1f} classes\n"
    measures = (
        "corr. of neighbours",
        "within a lane",
        "classes",
        "TV",
        "TV / full",
        "epochs corr.",
    )
    yield from head("order", *measures)
    orders = {"full permutation": stream_shuffle.full(layout)}
    for lanes in (8, 32):
        for window in (*sizes.windows, layout.samples):
            name = "whole" if window == layout.samples else str(window)
            orders[f"{lanes} lanes, window {name}"] = stream_shuffle.ours(layout, lanes, window)
    for buffer in sizes.windows:
        orders[f"webdataset, buffer {buffer}"] = stream_shuffle.plain(layout, buffer)
    best = None
    for name, epoch in orders.items():
        found = stream_shuffle.quality(layout, epoch)
        best = best or found.distance
        cells = (f"{found.neighbours:.3f}", f"{found.within_lane:.3f}", f"{found.classes:.1f}")
        distance = (f"{found.distance:.3f}", f"{found.distance / best:.2f}")
        yield row(name, *cells, *distance, f"{found.epochs:.3f}")


def memory_table(sizes: Sizes, folder: Path) -> Iterator[str]:
    """Of workers as they go on, and of a large index."""
    after = [f"after {number} batches" for number in sizes.batches]
    yield "Largest of 2 workers, MiB; what it has sent ahead lies in shared memory:\n"
    columns = [f"USS / PSS / sent {x}" for x in after]
    yield from head("crop", "prefetch", "part of a batch", *columns)
    for side, shards in crops(sizes, folder):
        for prefetch in sizes.prefetch:
            found = in_own_process(
                stream_memory.of_workers, str(shards), sizes.batch, 2, prefetch, sizes.batches
            )
            used = zip(found["uss"], found["pss"], found["sent"], strict=True)
            cells = [" / ".join(f"{x:.0f}" for x in figures) for figures in used]
            yield row(str(side), str(prefetch), f"{found['part']:.1f}", *cells)
    count, per_shard = sizes.index
    large = folder / "large"
    large.mkdir()
    stream_memory.make_large_index(large, count, per_shard)
    found = in_own_process(stream_memory.of_index, str(large), sizes.turns)
    yield f"\nAn index of {count * per_shard} samples of 2 fields in {count} shards, MiB:\n"
    others = [f"{way}ed process USS / PSS" for way in ("fork", "spawn")]
    yield from head("s to open", "file", "arrays", "opened", "more while opening", *others)
    yield row(
        f"{np.median(found['seconds']):.2f}",
        *(f"{found[name]:.0f}" for name in ("file", "arrays", "opened", "peak")),
        *(f"{found[way][0]:.1f} / {found[way][1]:.1f}" for way in ("fork", "spawn")),
    )


def crops(sizes: Sizes, folder: Path) -> Iterator[tuple[int, Path]]:
    """Shards of each size of photographs, made where they are not there yet."""
    for side, per_shard in sizes.crops.items():
        shards = folder / f"crops-{side}"
        if not shards.exists():
            photographs(shards, side, sizes.shards, per_shard)
        yield side, shards


def of(found: Figures, name: str, column: int) -> np.ndarray:
    """One figure of a side in each turn."""
    return np.array(found[name])[:, column]


def ratio(values: np.ndarray, to: np.ndarray) -> str:
    """Median over turns."""
    return f"{np.median(values / to):.2f}"


def head(*titles: str) -> list[str]:
    """The first lines of a table."""
    return [row(*titles), row(*["---"] * len(titles))]


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


TABLES = {
    "throughput": throughput_table,
    "http": http_table,
    "sources": sources_table,
    "seek": seek_table,
    "shuffle": shuffle_table,
    "memory": memory_table,
}


if __name__ == "__main__":
    main()
