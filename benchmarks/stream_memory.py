"""Memory of workers and of a large index, for the tables of stream.py; each run in a process of its
own. USS are the pages that a process has alone, PSS adds its share of those that it has in common
with others."""

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from memory import own_memory_kib
from stream_runs import LANES, MIXED

from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.index_file import save_index
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.locations import INDEX_NAME
from dist_contrastive.data.stream.shard_stream import ShardStream

LOOKED_UP = 20_000  # samples whose place a process asks for
MIB = 2**20
REST_S = 0.3  # in which a process that works takes time of a processor


def of_workers(
    folder: str, batch: int, workers: int, prefetch: int, after: list[int]
) -> dict[str, Any]:
    """MiB of the largest worker after so many batches of an endless stream.

    Returns:
        "part": of the rows of one batch that a worker makes; "uss", "pss" and "sent", one for each
        of `after`: what is sent lies in shared memory until the main process takes it.
    """
    stream = ShardStream(
        folder,
        global_batch_size=batch,
        lanes=LANES,
        seed=0,
        num_workers=workers,
        prefetch_factor=prefetch,
        shuffle_window=MIXED // LANES,
        only=("jpg", "cls"),
    )
    found: dict[str, Any] = {"uss": [], "pss": [], "sent": []}
    batches = iter(stream)
    for number in range(1, max(after) + 1):
        images = next(batches)["jpg"]
        if number in after:
            children = psutil.Process().children()
            _await_rest(children)
            used = [x.memory_full_info() for x in children]
            found["uss"].append(max(x.uss for x in used) / MIB)
            found["pss"].append(max(x.pss for x in used) / MIB)
            found["sent"].append(max(_shared_bytes(x) for x in children) / MIB)
    batches.close()
    return found | {"part": images.nbytes / workers / MIB}


def _await_rest(processes: list[psutil.Process]) -> None:
    """Until they have worked ahead as far as they may."""
    used = -1.0
    while used != (used := sum(x.cpu_times().user for x in processes)):
        time.sleep(REST_S)


def _shared_bytes(process: psutil.Process) -> int:
    """Of tensors in shared memory that a process holds open."""
    found = {}
    for handle in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if str(handle.readlink()).startswith("/dev/shm/torch"):
                found[handle.stat().st_ino] = handle.stat().st_size
    return sum(found.values())


def make_large_index(folder: Path, shards: int, per_shard: int) -> None:
    """An index of so many samples of two fields, and tars of its sizes without content."""
    rng = np.random.default_rng(0)
    samples = shards * per_shard
    sizes = np.stack([np.ones(samples), rng.integers(50_000, 150_000, samples)], axis=1)
    sizes = sizes.astype(np.uint32)
    members = 512 + -(-sizes.astype(np.int64) // 512) * 512
    offsets = members.sum(axis=1).reshape(shards, per_shard).cumsum(axis=1)
    shard_bytes = offsets[:, -1] + 1024
    names = [str(folder / f"{shard:05d}.tar") for shard in range(shards)]
    for name, length in zip(names, shard_bytes.tolist(), strict=True):
        with open(name, "wb") as file:
            file.truncate(length)
    index = ShardIndex(
        shards=tuple(names),
        shard_bytes=shard_bytes,
        shard_sha256=tuple(rng.bytes(32).hex() for _ in range(shards)),
        shard_samples=np.full(shards, per_shard, np.int64),
        fields=("cls", "jpg"),
        sample_offset=(offsets - members.sum(axis=1).reshape(shards, per_shard)).ravel(),
        member_start=np.stack([np.zeros(samples), members[:, 0]], axis=1).astype(np.uint32),
        member_header=np.full((samples, 2), 512, np.uint16),
        member_size=sizes,
        member_crc32=rng.integers(2**32, size=(samples, 2), dtype=np.uint32),
    )
    save_index(index, folder / INDEX_NAME)


def of_index(folder: str, turns: int) -> dict[str, Any]:
    """What an index costs.

    Returns:
        "seconds" to open it, of each turn; MiB: "file", "opened" (what the process has more, USS),
        "peak" (while it is opened, more than after), "arrays"; "fork" and "spawn": USS and PSS
        of a process that is given it and looks up samples, less what one has that is given none.
    """
    file_mib = (Path(folder) / INDEX_NAME).stat().st_size / MIB
    index, seconds = load_index(folder), []  # whatever is imported late is now
    for _ in range(turns):
        del index
        gc.collect()
        before = psutil.Process().memory_full_info().uss / MIB
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        begin = time.perf_counter()
        index = load_index(folder)
        seconds.append(time.perf_counter() - begin)
    opened = psutil.Process().memory_full_info().uss / MIB - before
    peak = (own_memory_kib("VmHWM") - own_memory_kib("VmRSS")) / 1024
    tables = (x for x in vars(index).values() if isinstance(x, np.ndarray))
    others = {way: _in_another(way, index) for way in ("fork", "spawn")}
    return others | {
        "seconds": seconds,
        "file": file_mib,
        "opened": opened,
        "peak": peak,
        "arrays": sum(x.nbytes for x in tables) / MIB,
    }


def _in_another(way: str, index: ShardIndex) -> list[float]:
    """MiB, USS and PSS, that a process started in this way has because of the index."""
    with_it, without = (_used(way, _look_up, x) for x in (index, None))
    return [x - y for x, y in zip(with_it, without, strict=True)]


def _used(way: str, function: Callable, index: ShardIndex | None) -> list[float]:
    context: Any = multiprocessing.get_context(way)
    mine, its = context.Pipe()
    process = context.Process(target=function, args=(its, index))
    process.start()
    used = mine.recv()
    process.join()
    return used


def _look_up(pipe: Any, index: ShardIndex | None) -> None:
    if index is not None:
        for number in np.random.default_rng(0).integers(len(index), size=LOOKED_UP).tolist():
            index.prefetch(number)
    used = psutil.Process().memory_full_info()
    pipe.send([used.uss / MIB, used.pss / MIB])
