"""The stream: the same global batches for any ranks and workers, exactly once, from anywhere."""

import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_contrastive.data import ShardStream, index_folder, load_index
from dist_contrastive.data.collate import collate, join_batches, without_rows
from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.stream import workers
from dist_contrastive.data.stream.order import SampleOrder
from dist_contrastive.errors import ConfigError, DataError, LostWorkerError

COUNTS = (7, 0, 23, 1, 16, 11, 12, 3)  # 73 samples
LANES, BATCH = 12, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of uneven sizes; sample n has the key s<n>, the class n and an image of n's."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = itertools.count()
    for shard, count in enumerate(COUNTS):
        chosen = list(itertools.islice(numbers, count))
        samples = (
            {"__key__": f"s{n}", "cls": n, "png": np.full((1, 2, 3), n, np.uint8), "txt": str(n)}
            for n in chosen
        )
        write_samples(folder / f"{shard}.tar", samples)
    index_folder(folder)
    return folder


def stream(folder: Path, **changed) -> ShardStream:
    defaults = {"global_batch_size": BATCH, "lanes": LANES, "seed": 5, "shuffle_window": 3}
    return ShardStream(folder, **{**defaults, **changed})


def rows(batch: dict) -> list[tuple[int, int]]:
    """(epoch, sample number) of each row, and a check that all columns speak of it."""
    numbers = batch["__index__"].tolist()
    assert batch["__key__"] == [f"s{n}" for n in numbers]
    assert batch["txt"] == [str(n) for n in numbers]
    assert batch["cls"].tolist() == numbers
    assert batch["cls"].dtype == batch["__index__"].dtype == batch["__epoch__"].dtype == torch.int64
    assert batch["png"].dtype == torch.uint8
    assert batch["png"].shape == (len(numbers), 1, 2, 3)
    assert batch["png"][:, 0, 1, 2].tolist() == numbers
    return list(zip(batch["__epoch__"].tolist(), numbers, strict=True))


def chained(parts) -> list:
    return list(itertools.chain.from_iterable(parts))


def global_batches(folder: Path, world_size: int, num_workers=0, steps=None, **changed) -> list:
    """The global batches of all ranks together, which must agree on their number."""
    ranks = []
    for rank in range(world_size):
        local = stream(folder, rank=rank, world_size=world_size, num_workers=num_workers, **changed)
        ranks.append([rows(batch) for batch in itertools.islice(local, steps)])
    return [chained(parts) for parts in zip(*ranks, strict=True)]


def naive_lanes(counts, seed: int, lanes: int, window: int, epoch: int) -> list[list[int]]:
    """One epoch, lane by lane, written out from the definition."""
    first = [sum(counts[:shard]) for shard in range(len(counts))]
    line = []
    for shard in keyed_permutation(len(counts), seed, 0, epoch).tolist():
        line += range(first[shard], first[shard] + counts[shard])
    total, start, result = len(line), 0, []
    for lane in range(lanes):
        length = ((epoch + 1) * total + lane) // lanes - (epoch * total + lane) // lanes
        part, shuffled = line[start : start + length], []
        for number in range(-(-length // window)):
            chunk = part[number * window : (number + 1) * window]
            order = keyed_permutation(len(chunk), seed, 1, epoch, lane, number)
            shuffled += [chunk[place] for place in order]
        result.append(shuffled)
        start += length
    assert start == total
    return result


def naive_batches(counts, batch, lanes, seed, window, tail, epochs) -> list[list[tuple[int, int]]]:
    """All batches as lists of (epoch, sample number), written out from the definition."""
    per_lane = batch // lanes
    parts = [naive_lanes(counts, seed, lanes, window, epoch) for epoch in range(epochs)]
    result = []
    if tail == "drop":
        for epoch, k in itertools.product(range(epochs), range(sum(counts) // batch)):
            span = slice(k * per_lane, (k + 1) * per_lane)
            result.append([(epoch, n) for lane in parts[epoch] for n in lane[span]])
        return result
    endless = [[(e, n) for e in range(epochs) for n in parts[e][lane]] for lane in range(lanes)]
    for k in range(-(-epochs * sum(counts) // batch)):
        span = slice(k * per_lane, (k + 1) * per_lane)
        result.append([row for lane in endless for row in lane[span]])
    return result


# ---------------------------------------------------------------------------- the order


@st.composite
def orders(draw):
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda c: sum(c) > 1))
    lanes = draw(st.integers(1, min(6, sum(counts))))
    most = sum(counts) // lanes
    per_lane = draw(st.integers(2 if lanes == 1 else 1, most))
    window, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**40))
    return counts, per_lane * lanes, lanes, seed, window


@settings(max_examples=150, deadline=None, derandomize=True)
@given(orders(), st.sampled_from(["carry", "drop"]), st.integers(1, 5))
def test_order_equals_the_naive_specification(case, tail, epochs):
    counts, batch, lanes, seed, window = case
    order = SampleOrder(
        counts, global_batch_size=batch, lanes=lanes, seed=seed, shuffle_window=window, tail=tail
    )
    total = epochs * order.samples_per_epoch
    ours = []
    for start in range(0, total, batch):
        stop = min(start + batch, total)
        ours.append([])
        for lane in range(lanes):
            span = order.position(lane, start), order.position(lane, stop)
            epoch, number = order.samples(lane, *span)
            ours[-1] += zip(epoch.tolist(), number.tolist(), strict=True)
    expected = naive_batches(counts, batch, lanes, seed, window, tail, epochs)
    assert ours == expected
    at_once = []
    for lane in range(lanes):
        epoch, number = order.samples(lane, 0, order.position(lane, total))
        at_once += zip(epoch.tolist(), number.tolist(), strict=True)
    assert sorted(at_once) == sorted(chained(expected))
    seen = [row for rows in ours for row in rows]
    assert len(set(seen)) == len(seen) == total
    if tail == "carry":
        assert sorted(seen) == list(itertools.product(range(epochs), range(sum(counts))))


def test_order_far_into_an_endless_stream_is_cheap_and_exact():
    settings = {"global_batch_size": 64, "lanes": 64, "seed": 1, "shuffle_window": 4096}
    counts, epoch = [10_000] * 101, 10**6  # a million samples, a million epochs
    order = SampleOrder(counts, **settings, tail="carry")
    start = epoch * sum(counts)
    parts = [
        order.samples(lane, order.position(lane, start), order.position(lane, start + 64))
        for lane in range(64)
    ]
    assert {int(e) for epochs, _ in parts for e in epochs} == {epoch}
    assert len({int(n) for _, numbers in parts for n in numbers}) == 64


def test_window_of_one_shuffles_shards_only():
    order = SampleOrder(
        [5, 5], global_batch_size=2, lanes=1, seed=0, shuffle_window=1, tail="carry"
    )
    numbers = order.samples(0, 0, 10)[1].tolist()
    assert numbers in (list(range(10)), [*range(5, 10), *range(5)])


def test_keyed_permutations_are_fixed_for_ever():
    """A change here would change the order of every run that is resumed."""
    assert keyed_permutation(8, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert keyed_permutation(8, 7, 1, 2, 3).tolist() == [4, 0, 1, 3, 2, 6, 5, 7]
    assert keyed_permutation(0, 0).tolist() == []


def test_epochs_and_seeds_differ(folder: Path):
    order = {}
    for seed in (5, 6):
        seen = chained(global_batches(folder, 1, 0, epochs=2, seed=seed))
        for epoch in (0, 1):
            order[seed, epoch] = [n for e, n in seen if e == epoch]
    assert all(sorted(numbers) == list(range(73)) for numbers in order.values())
    assert all(a != b for a, b in itertools.combinations(order.values(), 2))


# ---------------------------------------------------------------------------- ranks and workers


@pytest.mark.parametrize("tail", ["carry", "drop"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_world_size_gives_the_same_global_batches(folder: Path, world_size: int, tail: str):
    ours = global_batches(folder, world_size, 0, epochs=2, tail=tail)
    assert ours == naive_batches(COUNTS, BATCH, LANES, 5, 3, tail, 2)
    sizes = [len(batch) for batch in ours]
    assert sizes == ([24] * 6 + [2] if tail == "carry" else [24] * 6)


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 1), (1, 2), (1, 5), (3, 2), (2, 3), (4, 7)]
)
def test_any_number_of_workers_gives_the_same_global_batches(folder, world_size, num_workers):
    ours = global_batches(folder, world_size, num_workers, epochs=2)
    assert ours == naive_batches(COUNTS, BATCH, LANES, 5, 3, "carry", 2)


def test_every_sample_once_per_epoch(folder: Path):
    seen = chained(global_batches(folder, 2, 0, epochs=3))
    assert sorted(seen) == list(itertools.product(range(3), range(73)))


def test_local_batches_lie_in_rank_order(folder: Path):
    """The rows of a rank are consecutive in the global batch, at the offset of its lanes."""
    whole = next(iter(stream(folder)))["__key__"]
    for rank in range(4):
        part = next(iter(stream(folder, rank=rank, world_size=4)))["__key__"]
        assert part == whole[6 * rank : 6 * (rank + 1)]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_rank_without_rows_knows_the_shapes(folder: Path, num_workers: int):
    """The last batch has 2 rows for 4 ranks."""
    last = [
        list(stream(folder, rank=r, world_size=4, num_workers=num_workers, epochs=2))[-1]
        for r in range(4)
    ]
    lengths = [len(rows(batch)) for batch in last]  # `rows` checks types and shapes too
    assert sum(lengths) == 2
    assert lengths.count(0) >= 2


@pytest.mark.parametrize(
    ("changed", "count"),
    [({"epochs": 2}, 7), ({"epochs": 2, "tail": "drop"}, 6), ({"global_batch_size": 36}, 3)],
)
def test_number_of_batches(folder: Path, changed: dict, count: int):
    whole = stream(folder, **{"epochs": 1, **changed})
    assert whole.num_samples == 73
    assert len(list(whole)) == count


# ---------------------------------------------------------------------------- resume


@pytest.mark.parametrize("tail", ["carry", "drop"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_resume_over_many_legs_with_other_ranks_and_workers(folder: Path, tail: str, seed: int):
    chance = random.Random(seed)
    consumed, ours = 0, []
    expected = naive_batches(COUNTS, BATCH, LANES, 5, 3, tail, 4)
    while len(ours) < len(expected):
        world_size, num_workers = chance.choice([(1, 0), (1, 3), (2, 0), (3, 2), (4, 0), (12, 0)])
        steps = chance.randint(1, 4)
        leg = {"epochs": 4, "tail": tail, "consumed": consumed}
        ours += global_batches(folder, world_size, num_workers, steps=steps, **leg)
        one = stream(folder, **leg)
        for _ in itertools.islice(one, steps):
            pass
        consumed = one.consumed
    assert ours == expected
    assert consumed == sum(len(batch) for batch in expected)
    assert list(stream(folder, epochs=4, tail=tail, consumed=consumed)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_consumed_counts_what_was_yielded_and_iterating_goes_on(folder: Path, num_workers: int):
    local = stream(folder, world_size=2, rank=1, num_workers=num_workers, epochs=2)
    seen = []
    while local.consumed < 2 * 73:
        for batch in local:  # left after one batch, while workers have read ahead
            seen.append(rows(batch))
            assert local.consumed == min(24 * len(seen), 146)
            break
    expected = stream(folder, world_size=2, rank=1, epochs=2)
    assert seen == [rows(batch) for batch in expected]


def test_finished_run_goes_on_with_more_epochs(folder: Path):
    """The end of an epoch is a resume point, although 73 is no multiple of the lanes."""
    first = global_batches(folder, 1, 0, epochs=1)
    more = global_batches(folder, 3, 0, epochs=3, consumed=73)
    assert sorted(chained(first + more)) == list(itertools.product(range(3), range(73)))


def test_workers_leave_the_global_random_numbers_alone(folder: Path):
    before = torch.get_rng_state()
    list(stream(folder, num_workers=2, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_outlive_signals_to_the_group(folder: Path):
    others = set(multiprocessing.active_children())
    local = iter(stream(folder, num_workers=2, epochs=40))
    next(local)
    workers = [p.pid for p in multiprocessing.active_children() if p not in others]
    assert len(workers) == 2
    for pid, number in itertools.product(workers, (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)):
        os.kill(pid, number)
    assert sum(1 for _ in local) == -(-40 * 73 // BATCH) - 1


# ---------------------------------------------------------------------------- columns

VALUES = st.sampled_from(
    [1, 2.5, True, "a", None, b"b", [1], np.float32(1.5), np.ones(2), torch.ones(2), torch.ones(3)]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(VALUES, min_size=2, max_size=5), st.data())
def test_a_batch_does_not_depend_on_its_parts(values, data):
    samples = [{"__key__": str(n), "x": value} for n, value in enumerate(values)]
    cut = data.draw(st.integers(1, len(samples) - 1))
    whole = collate(samples)["x"]
    empty = without_rows(collate([{"__key__": "other", "x": torch.ones(7)}]))
    joined = join_batches([empty, collate(samples[:cut]), collate(samples[cut:])])["x"]
    assert type(joined) is type(whole)
    if isinstance(whole, torch.Tensor):
        assert joined.dtype == whole.dtype
        assert torch.equal(joined, whole)
    else:
        assert [str(v) for v in np_lists(joined)] == [str(v) for v in np_lists(whole)]


def np_lists(column: list) -> list:
    """Values as numbers and lists, in which True is 1 and 1 is 1.0."""
    plain = (v.tolist() if hasattr(v, "tolist") else v for v in column)
    return [float(v) if isinstance(v, int | float) else v for v in plain]


def test_columns_of_a_batch():
    common = {"__key__": "a", "f": 1.5, "b": True, "j": {"label": 1}, "n": np.ones(2, ">f4")}
    batch = collate([{**common, "v": torch.ones(n)} for n in (1, 2)])
    assert batch["__key__"] == ["a", "a"]
    assert batch["f"].dtype == torch.float64
    assert batch["b"].dtype == torch.bool
    assert batch["j"] == [{"label": 1}] * 2
    assert batch["n"].dtype == torch.float32
    assert batch["n"].shape == (2, 2)
    assert [len(v) for v in batch["v"]] == [1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ragged_arrays_are_a_list_of_tensors(tmp_path: Path, num_workers: int):
    samples = [{"__key__": f"s{n}", "npy": np.arange(n + 1)} for n in range(8)]
    write_samples(tmp_path / "a.tar", samples)
    local = ShardStream(
        index_folder(tmp_path), global_batch_size=8, lanes=2, seed=0, num_workers=num_workers
    )
    batch = next(iter(local))
    assert all(isinstance(array, torch.Tensor) for array in batch["npy"])
    assert [len(array) - 1 for array in batch["npy"]] == batch["__index__"].tolist()


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_met_while_reading_is_one_sentence(tmp_path: Path, num_workers: int):
    write_samples(tmp_path / "a.tar", [{"__key__": f"s{n}", "cls": n} for n in range(40)])
    index = index_folder(tmp_path)
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[int(index.sample_offset[17]) + 512] ^= 1
    (tmp_path / "a.tar").write_bytes(raw)
    local = ShardStream(
        tmp_path, global_batch_size=4, lanes=2, seed=0, num_workers=num_workers, epochs=1
    )
    message = r"a\.tar is damaged or was changed: field 'cls' of sample 17 "
    with pytest.raises(DataError, match=message) as error:
        list(local)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)
    assert local.consumed < 40


@pytest.mark.parametrize("num_workers", [0, 2])
def test_field_missing_in_a_sample(tmp_path: Path, num_workers: int):
    samples = [{"__key__": f"s{n}", "cls": n, "txt": "t"} for n in range(8)]
    del samples[6]["txt"]
    write_samples(tmp_path / "a.tar", samples)
    local = ShardStream(
        index_folder(tmp_path), global_batch_size=8, lanes=2, seed=0, num_workers=num_workers
    )
    with pytest.raises(DataError, match=r"sample 's6' has no field 'txt', which sample 's.' of"):
        next(iter(local))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_batch_size": 1, "lanes": 1}, "global_batch_size=1: .*set 2 or more"),
        ({"global_batch_size": 100}, "=100 is not divisible by lanes=12; set .*=96 or 108"),
        ({"global_batch_size": 84}, "=84 is larger than the 73 samples .*set .*=72 or less"),
        ({"global_batch_size": 96, "lanes": 96}, "larger than the 73 samples.*set fewer lanes"),
        ({"lanes": 0}, "lanes=0: .*set 1 or more"),
        ({"prefetch_factor": 0}, "prefetch_factor=0: .*set 1 or more"),
        ({"max_skipped": -1}, "max_skipped=-1: .*set 0 or more"),
        ({"worker_start": "thread"}, "worker_start=thread: .*'fork'"),
        ({"start_method": "fork"}, "start_method is now worker_start"),
        ({"lane": 4}, "lane is not a known setting; did you mean lanes"),
        ({"world_size": 5}, "lanes=12 is .*world_size=5;.*lanes=10 or 15"),
        ({"world_size": 8}, "world_size=8; set lanes=8"),
        ({"num_workers": -1}, "num_workers=-1: .*set 0 or more"),
        ({"world_size": 0}, "world_size=0 is below 1"),
        ({"rank": 2, "world_size": 2}, r"rank=2 is outside 0\.\.1 for world_size=2; set rank=1"),
        ({"rank": -1}, r"rank=-1 is outside 0\.\.0 for world_size=1; set rank=0"),
        ({"seed": -1}, "seed=-1 is negative; set seed=0"),
        ({"epochs": 0}, "epochs=0 is below 1; set 1 or more"),
        ({"shuffle_window": 0}, "shuffle_window=0: .*set more than 0"),
        ({"tail": "wrap"}, "tail=wrap: .*'carry' or 'drop'"),
        ({"consumed": -12}, "consumed=-12 is negative; start at consumed=0"),
        ({"consumed": 30}, 'consumed=30 is not a multiple of lanes=12, .*"carry".* use 24 or 36'),
        ({"consumed": 36, "tail": "drop"}, "consumed=36 .*global_batch_size=24.* use 24 or 48"),
        ({"consumed": 156, "epochs": 2}, "consumed=156 is past the 146 .*epochs=2; set epochs=3"),
    ],
)  # fmt: skip
def test_impossible_settings_say_how_to_mend_them(folder: Path, changed: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        stream(folder, **changed)


def test_suggested_settings_work(folder: Path):
    for fixed in (
        {"world_size": 8, "lanes": 8},
        {"global_batch_size": 72},
        {"global_batch_size": 108 // 2 - 6, "lanes": 12},
    ):
        stream(folder, **fixed)


def test_index_may_be_given_in_three_ways(folder: Path):
    keys = [
        next(iter(stream(given)))["__key__"]
        for given in (folder, str(folder / "index.npz"), load_index(folder))
    ]
    assert keys[0] == keys[1] == keys[2]


# ---------------------------------------------------------------------------- worker processes


@pytest.mark.parametrize(
    "start_method", [pytest.param("spawn", marks=pytest.mark.slow), "forkserver"]
)
def test_workers_may_be_started_afresh(folder: Path, start_method: str):
    """They get the index by a file, which is gone afterwards."""
    left = set(Path(tempfile.gettempdir()).glob("dist-contrastive-reader-*"))
    options = {"num_workers": 2, "worker_start": start_method, "epochs": 1}
    ours = global_batches(folder, 1, **options)
    assert ours == naive_batches(COUNTS, BATCH, LANES, 5, 3, "carry", 1)
    assert set(Path(tempfile.gettempdir()).glob("dist-contrastive-reader-*")) == left


UNGUARDED = """
import sys
from dist_contrastive.data import ShardStream
stream = ShardStream(
    sys.argv[1], global_batch_size=24, lanes=12, seed=5, num_workers=2, worker_start="spawn"
)
next(iter(stream))
"""


def test_workers_that_die_at_once_are_noticed(tmp_path: Path):
    """A script without `if __name__ == "__main__"`, and an index of more than a pipe holds."""
    write_samples(tmp_path / "a.tar", [{"__key__": f"s{n}", "cls": n} for n in range(4000)])
    assert index_folder(tmp_path).member_crc32.nbytes + 8 * 4000 > 2**15
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    argv = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "a process that reads ahead was lost (exit code 1)" in done.stderr
    assert "if __name__ == '__main__'" in done.stderr


def read_slowly(folder: Path, started) -> None:
    """A rank that is killed while its workers start; they have nothing to do for long."""
    one = stream(folder, num_workers=3, transform=wait_first)
    started.set()
    next(iter(one))


def wait_first(sample: dict) -> dict:
    time.sleep(1)
    return sample


@pytest.mark.parametrize("delay_s", [0, 0.01, 0.03, 0.1])
def test_workers_end_with_a_rank_that_is_killed(folder: Path, delay_s: float):
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    rank = fork.Process(target=read_slowly, args=(folder, started))
    rank.start()
    started.wait(60)
    time.sleep(delay_s)
    children = psutil.Process(rank.pid).children()
    rank.kill()
    rank.join()
    _, alive = psutil.wait_procs(children, timeout=600)
    assert not alive


def test_signals_while_workers_start_do_not_end_them(folder: Path):
    """Sent to all children at any moment of their start; spawned ones take a second for it."""
    seen = []

    def send() -> None:
        while not ended.is_set():
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGUSR1)
                        seen.append(child.pid)
            time.sleep(0.01)

    ended = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        ours = global_batches(folder, 1, 2, worker_start="spawn", epochs=1)
    finally:
        ended.set()
        thread.join()
    assert ours == naive_batches(COUNTS, BATCH, LANES, 5, 3, "carry", 1)
    assert len(set(seen)) >= 2  # and what they fork for a moment
    assert len(seen) > 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_transforms_see_what_keys_their_random_numbers(folder: Path, num_workers: int):
    def transform(sample: dict) -> dict:
        return {**sample, "twice": 2 * sample["__index__"] + sample["__epoch__"]}

    for batch in stream(folder, epochs=2, num_workers=num_workers, transform=transform):
        assert torch.equal(batch["twice"], 2 * batch["__index__"] + batch["__epoch__"])


def test_workers_are_ahead_by_so_many_batches_and_no_more(folder: Path, tmp_path: Path):
    """What is not asked for is not read: memory stays bounded however slow the training is."""

    def count(sample: dict) -> dict:
        with (tmp_path / str(sample["__index__"])).open("a") as file:
            file.write("x")
        return sample

    def num_read() -> int:
        return sum(len(path.read_text()) for path in tmp_path.iterdir())

    batches = iter(
        stream(folder, num_workers=2, prefetch_factor=3, transform=count, global_batch_size=12)
    )
    next(batches)
    deadline = time.monotonic() + 120
    while num_read() < 12 * 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # for one that would read on
    assert num_read() == 12 * 4
    batches.close()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda c: sum(c) > 1),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.data(),
)  # fmt: skip
def test_any_shards_read_by_any_ranks(tmp_path_factory, counts, ranks, per_rank, window, data):
    """Real tars of 0, 1 or more samples, stopped once and resumed by one rank."""
    folder, lanes = tmp_path_factory.mktemp("any"), ranks * per_rank
    total = sum(counts)
    if max(lanes, 2) > total:
        return
    numbers = itertools.count()
    for shard, count in enumerate(counts):
        samples = [
            {"__key__": f"s{n}", "cls": n, "txt": str(n), "png": np.full((1, 2, 3), n, np.uint8)}
            for n in itertools.islice(numbers, count)
        ]
        write_samples(folder / f"{shard}.tar", samples)
    index_folder(folder)
    batch = lanes * data.draw(st.integers(-(-2 // lanes), total // lanes))
    options = {"global_batch_size": batch, "lanes": lanes, "shuffle_window": window, "epochs": 2}
    expected = naive_batches(counts, batch, lanes, 5, window, "carry", 2)
    assert global_batches(folder, ranks, 0, **options) == expected
    stop = data.draw(st.integers(0, len(expected) - 1))
    assert global_batches(folder, 1, 0, consumed=stop * batch, **options) == expected[stop:]


def test_many_images_of_many_sizes_take_no_file_handles(tmp_path: Path):
    """A worker sends each tensor of a list by value: shared, each would keep a handle open."""
    samples = [{"__key__": f"s{n}", "npy": np.arange(n % 7 + 1)} for n in range(1024)]
    write_samples(tmp_path / "a.tar", samples)
    local = ShardStream(index_folder(tmp_path), global_batch_size=1024, lanes=1, seed=0,
                        num_workers=1, epochs=4)  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        for batch in local:
            assert [len(x) for x in batch["npy"]] == [
                n % 7 + 1 for n in batch["__index__"].tolist()
            ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lost_worker_is_one_sentence(folder: Path):
    before = set(psutil.Process().children())
    batches = iter(stream(folder, num_workers=2, transform=wait_briefly))
    next(batches)
    lost = set(psutil.Process().children()) - before
    assert len(lost) == 2
    lost.pop().kill()
    with pytest.raises(LostWorkerError, match=r"process that reads ahead was lost .*; start again"):
        list(batches)
    assert LostWorkerError.exit_code == 75
    _, alive = psutil.wait_procs(lost, timeout=600)
    assert not alive


hang_at_fork: list[Path] = []  # children that are forked while a file of it is not there hang


def _hang() -> None:
    for flag in hang_at_fork:
        if not flag.exists():
            with contextlib.suppress(OSError):  # a flag that cannot be set: all of them hang
                flag.touch()
            time.sleep(1000)


os.register_at_fork(after_in_child=_hang)


def test_a_worker_that_never_begins_is_started_anew(folder: Path, monkeypatch, tmp_path):
    """As one that was forked while a thread of gloo held a lock: nothing is lost by it."""
    monkeypatch.setattr(workers, "BEGIN_S", {"fork": 4.0})
    before = set(psutil.Process().children())
    hang_at_fork.append(tmp_path / "hung")
    try:
        read = [batch["__key__"] for batch in itertools.islice(stream(folder, num_workers=2), 5)]
    finally:
        hang_at_fork.clear()
    assert (tmp_path / "hung").exists()
    assert read == [batch["__key__"] for batch in itertools.islice(stream(folder), 5)]
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - before, timeout=600)
    assert not alive


def test_workers_that_never_begin_are_an_error(folder: Path, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "BEGIN_S", {"fork": 0.2})
    hang_at_fork.append(tmp_path / "no folder" / "flag")
    try:
        with pytest.raises(LostWorkerError, match=r"within 0.2 s, 3 times; set data.num_workers=0"):
            next(iter(stream(folder, num_workers=2)))
    finally:
        hang_at_fork.clear()


def wait_briefly(sample: dict) -> dict:
    time.sleep(0.01)
    return sample


def test_errors_of_a_transform_stay_what_they_are(folder: Path):
    def wrong(sample: dict) -> dict:
        raise RuntimeError(f"no {sample['cls']}")

    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match=r"no \d+") as error:
            next(iter(stream(folder, num_workers=num_workers, transform=wrong)))
    assert "in wrong" in error.value.__notes__[0]  # where it was raised


class Unpicklable(Exception):
    """Its arguments are not those of its constructor."""

    def __init__(self, key: str, value: object) -> None:
        super().__init__(f"{key}: {value}")


def test_what_cannot_be_sent_by_a_worker_is_an_error(folder: Path):
    def fail(sample: dict) -> dict:
        raise Unpicklable("cls", sample["cls"])

    with pytest.raises(RuntimeError, match=r"Unpicklable: cls: \d+"):
        next(iter(stream(folder, num_workers=2, transform=fail)))
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        next(iter(stream(folder, num_workers=2, transform=lambda s: {**s, "f": lambda: 1})))


def test_values_that_torch_has_no_type_for_stay_lists():
    for values in ([10**30, 1], [np.ones(2, np.uint16), np.ones(2, np.int32)],
                   [np.ones(2, np.longdouble)] * 2):  # fmt: skip
        batch = collate([{"__key__": "k", "x": value} for value in values])
        assert isinstance(batch["x"], list)
