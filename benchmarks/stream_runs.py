"""The runs behind the tables of stream.py, each in a process of its own.

python benchmarks/stream_runs.py CALL     # the answer to `in_own_process`, as JSON
"""

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from stream_shards import tars

from dist_contrastive.data.folder import ImageFolder
from dist_contrastive.data.rows_source import ParquetRows, Rows
from dist_contrastive.data.shards.encoding import decode_field
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.storage import BlockCache
from dist_contrastive.data.source import Source
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.data.subset import Subset

LANES = 8
MIXED = 1024  # samples among which both sides shuffle
PREFETCH = 2  # torch's default

Figures = dict[str, list[list[float]]]
"""By the name of a side, for every turn: samples a second, and microseconds of processors that a
sample took in the main process and its workers."""


def in_own_process(function: Callable, *args: Any) -> Any:
    """What a function of one of these modules returns in a fresh process."""
    call = json.dumps([function.__module__, function.__name__, args])
    argv = [sys.executable, __file__, call]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def answer(module: str, function: str, args: list) -> Any:
    """In the fresh process: call it. One thread, since those of a busy machine's few processors
    spend their time waiting for each other, which costs the two sides differently by chance."""
    torch.set_num_threads(1)
    return getattr(importlib.import_module(module), function)(*args)


# ------------------------------------------------------------------ throughput


def ours(location: str, batch: int, workers: int, seed: int, cache: str = "") -> Iterator[Any]:
    """One epoch of ShardStream: images [b, 3, H, W] and labels [b].

    Args:
        location: a folder or its URL. cache: folder for blocks of a remote one.
    """
    index = load_index(location, BlockCache.Config(folder=Path(cache)) if cache else None)
    stream = ShardStream(
        index,
        global_batch_size=batch,
        lanes=LANES,
        seed=seed,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        epochs=1,
        shuffle_window=MIXED // LANES,
        only=("jpg", "cls"),
    )
    for found in stream:
        yield found["jpg"], found["cls"]


def source_rates(folder: str, batch: int, turns: int) -> Figures:
    """The figures of each kind of source with the same images, read by this process: one epoch
    from its construction to its last batch."""
    root, found = Path(folder), Figures()
    files, table, saved, lines = (
        str(root / name) for name in ("files", "rows.parquet", "saved", "rows.csv")
    )
    made: dict[str, tuple[Callable[[], Source], str]] = {
        "packed": (lambda: load_index(root / "packed"), "jpg"),
        "packed, filter": (lambda: _all_of(load_index(root / "packed")), "jpg"),
        "folder": (lambda: ImageFolder(ImageFolder.Config(path=files)), "png"),
        "parquet": (lambda: ParquetRows(ParquetRows.Config(path=table)), "png"),
        "rows, .parquet": (lambda: Rows(Rows.Config(path=table)), "png"),
        "rows, saved": (lambda: Rows(Rows.Config(path=saved)), "png"),
        "rows, .csv and files": (lambda: Rows(Rows.Config(path=lines, image="image")), "png"),
    }
    for turn in range(turns + 1):
        for name in made if turn % 2 else reversed(made):
            figures = _figures(_epoch_of(*made[name], batch, turn))
            if turn:  # the first fills caches
                found.setdefault(name, []).append(figures)
    return found


def _all_of(index: Source) -> Subset:
    return Subset(index, np.arange(len(index), dtype=np.uint32))


def _epoch_of(make: Callable[[], Source], field: str, batch: int, seed: int) -> Iterator[Any]:
    stream = ShardStream(make(), global_batch_size=batch, lanes=LANES, seed=seed, epochs=1,
                         shuffle_window=MIXED // LANES, only=(field,))  # fmt: skip
    for found in stream:
        yield found[field], found["__index__"]


def plain(location: str, batch: int, workers: int, seed: int, shards: int) -> Iterator[Any]:
    """One epoch of webdataset's usual pipeline, with our decoding: images and labels."""
    samples = webdataset.WebDataset(tars(location, shards), shardshuffle=shards, seed=seed)
    samples = samples.shuffle(MIXED).map_dict(jpg=_decode_jpg, cls=int).to_tuple("jpg", "cls")
    yield from webdataset.WebLoader(
        samples.batched(batch),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
    )


def _decode_jpg(data: bytes) -> torch.Tensor:
    return decode_field("jpg", data)


def rates(local: str, url: str, shards: int, batch: int, workers: int, turns: int) -> Figures:
    """The figures of each side, from its construction to its last batch.

    Args:
        local, url: of the same folder; without a url only local sides run.
    """
    found: Figures = {}
    with tempfile.TemporaryDirectory() as warm:
        for turn in range(turns + 1):
            sides = _sides(local, url, shards, batch, workers, turn, warm)
            for name in sides if turn % 2 else reversed(sides):
                figures = _figures(sides[name])
                if turn:  # the first fills caches
                    found.setdefault(name, []).append(figures)
    return found


def _sides(
    local: str, url: str, shards: int, batch: int, workers: int, seed: int, warm: str
) -> dict[str, Iterator[Any]]:
    sides = {
        "plain, local": plain(local, batch, workers, seed, shards),
        "ours, local": ours(local, batch, workers, seed),
    }
    if url:
        sides |= {
            "plain": plain(url, batch, workers, seed, shards),
            "ours, cold cache": _with_cold_cache(url, batch, workers, seed),
            "ours, warm cache": ours(url, batch, workers, seed, warm),
        }
    return sides


def _with_cold_cache(url: str, batch: int, workers: int, seed: int) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as cold:
        yield from ours(url, batch, workers, seed, cold)


def _figures(epoch: Iterator[Any]) -> list[float]:
    begin, used = time.perf_counter(), _processor_seconds()
    samples = sum(len(images) for images, _ in epoch)
    seconds, used = time.perf_counter() - begin, _processor_seconds() - used
    return [samples / seconds, 1e6 * used / samples]


def _processor_seconds() -> float:
    """Of this process and of all that it has started and seen end."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ------------------------------------------------------------------ seek


def seek(folder: str, shards: int, batch: int, workers: int, turns: int) -> dict[str, list[float]]:
    """Seconds and bytes read of every turn: of the first half, from its end to a batch ("seek"),
    and from the start to a batch ("begin").

    Plain: webdataset reads the first half to leave it out, and decodes nothing.
    """
    found: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        half = _stream(folder, batch, workers, 0).num_samples // 2 // LANES * LANES
        runs: dict[str, Callable[[], Any]] = {
            "half": lambda half=half: _read_until(_stream(folder, batch, workers, 0), half),
            "seek": lambda half=half: _read_until(_stream(folder, batch, workers, half), half + 1),
            "begin": lambda: _read_until(_stream(folder, batch, workers, 0), 1),
            "plain": lambda half=half: _skip_plain(folder, shards, half),
        }
        for name, run in runs.items():
            begin, read = time.perf_counter(), _bytes_read()
            keep = run()
            seconds, read = time.perf_counter() - begin, _bytes_read() - read
            del keep  # workers end now, and not within the time
            if turn:
                found.setdefault(name, []).append(seconds)
                found.setdefault(f"{name} bytes", []).append(read)
    return found


def _stream(folder: str, batch: int, workers: int, consumed: int) -> ShardStream:
    return ShardStream(
        folder,
        global_batch_size=batch,
        lanes=LANES,
        seed=0,
        num_workers=workers,
        consumed=consumed,
        epochs=1,
    )


def _read_until(stream: ShardStream, consumed: int) -> Iterator[Any]:
    batches = iter(stream)
    while stream.consumed < consumed:
        next(batches)
    return batches


def _skip_plain(folder: str, shards: int, count: int) -> None:
    samples = webdataset.WebDataset(tars(folder, shards), shardshuffle=False)
    for _ in islice(samples, count):
        pass


def _bytes_read() -> int:
    """What read calls of this process brought, from the page cache too; not of its workers."""
    (line,) = (x for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("rchar"))
    return int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(answer(*json.loads(sys.argv[1]))))
