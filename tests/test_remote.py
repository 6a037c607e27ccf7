"""Shards on a server that fails in all ways: what is read is exact, or it is said why it stops."""

import contextlib
import itertools
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
from conftest import CONFIGS, command, environment, global_batches, refused

from dist_contrastive import checkpoint
from dist_contrastive.cli import main
from dist_contrastive.data import BlockCache, ShardStream, index_folder, load_index
from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import DataError, UnreachableError, UnreadableSample, UserError
from dist_contrastive.metrics import read_rows

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import block_cache
from range_server import ENDLESS, RangeServer

BLOCK = 1 << 20
ORDER = {"global_batch_size": 24, "lanes": 12, "seed": 3, "shuffle_window": 8, "epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 40 samples of random bytes, several blocks of 1 MiB each."""
    folder, chance = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    for shard in range(3):
        write_samples(
            folder / f"{shard}.tar",
            [
                {"__key__": f"s{shard}-{n}", "bin": chance.bytes(70_000 + 100 * n), "cls": n}
                for n in range(40)
            ],
        )
    index_folder(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache.Config:
    return BlockCache.Config(folder=tmp_path / "cache", limit_mb=64, block_mb=1)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch):
    """Milliseconds between attempts; workers are forked, so they have them too.

    No request times out unless a test asks for it: many count requests, and on a busy machine an
    answer may well take half a second.
    """
    monkeypatch.setattr(remote, "retries", remote.Retries(6, 0.005, 0.02, timeout_s=30))


def time_out_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests fail after a second: the server's "slow" takes three times as long."""
    monkeypatch.setattr(remote, "retries", remote.retries._replace(timeout_s=1.0))


def read(source, num_workers: int = 0, **changed) -> list[tuple[str, bytes]]:
    """Keys and contents of one epoch, in its order."""
    stream = ShardStream(source, num_workers=num_workers, **{**ORDER, **changed})
    return [row for b in stream for row in zip(b["__key__"], b["bin"], strict=True)]


def num_blocks(folder: Path) -> int:
    return sum(-(-path.stat().st_size // BLOCK) for path in folder.glob("*.tar"))


def cached_bytes(cache: BlockCache.Config) -> int:
    total = 0
    for path in cache.folder.glob("*/*-*"):
        with contextlib.suppress(FileNotFoundError):  # workers rename and remove meanwhile
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", ["reset", "truncate", "503", "slow", "flip"])
def test_faults_that_pass_lose_nothing(
    folder: Path, cache, fault: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
):
    """Every third request to a shard goes wrong."""
    failed = []
    if fault == "slow":
        time_out_soon(monkeypatch)

    def fails(path: str, number: int) -> str | None:
        if not path.endswith(".tar") or number % 3:
            return None
        failed.append(path)
        return fault

    with RangeServer(folder, fault=fails) as server:
        index = load_index(server.url, cache)
        assert read(index, num_workers) == read(folder)
        assert len(failed) >= 3
        before = dict(server.requests)
        assert read(index, num_workers) == read(folder)
        assert server.requests == before, "the second epoch is read from the cache"


def test_a_slow_server_counts_as_failed_after_the_timeout(folder: Path, cache, monkeypatch):
    time_out_soon(monkeypatch)
    with RangeServer(folder, fault=lambda path, n: "slow" if "0.tar" in path else None) as server:
        index = load_index(server.url, cache)
        with refused(UnreachableError, "0.tar", "6 attempts", "imeout"):
            read(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dead_server_stops_with_one_sentence(folder: Path, cache, num_workers: int):
    with RangeServer(folder, fault=lambda path, n: "503" if ".tar" in path else None) as server:
        index = load_index(server.url, cache)
        with refused(UnreachableError, ".tar", "6 attempts", "start again"):
            read(index, num_workers)
    assert UnreachableError.exit_code == 75


@pytest.mark.parametrize("where", ["index.npz", ".tar", "/"])
@pytest.mark.parametrize("fault", ENDLESS)
def test_servers_that_never_end_do_not_fill_the_memory(fault, where, folder, cache, monkeypatch):
    """Of an index, a shard or a list of shards; as fast as the wire, or some bytes a second."""
    monkeypatch.setattr(remote, "retries", remote.Retries(2, 0.01, 0.01, timeout_s=1.0))
    out, before = cache.folder.with_name("index.npz"), resource.getrusage(resource.RUSAGE_SELF)

    def fails(path: str, _: int) -> str | None:
        return fault if path.endswith(where) else None

    with RangeServer(folder, fault=fails) as server, refused(UserError, server.url):
        index_folder(server.url, out) if where == "/" else read(load_index(server.url, cache))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss
    assert grown < 400 * 1024  # KiB


def test_a_server_without_ranges_stops_with_one_sentence(folder: Path, cache):
    with RangeServer(folder, fault=lambda *_: "whole") as server:
        index = load_index(server.url, cache)
        with refused(DataError, "where 1048576 were asked for", "range requests"):
            read(index)
    assert sum(n for path, n in server.requests.items() if ".tar" in path) <= num_blocks(folder) + 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_shard_is_skipped_within_the_bound(folder: Path, cache, num_workers: int):
    with RangeServer(folder, fault=lambda path, n: "404" if "1.tar" in path else None) as server:
        index = load_index(server.url, cache)
        with refused(DataError, "1.tar is not there"):
            read(index, num_workers)
        with refused(DataError, "max_skipped=39", "/1.tar (40)"):
            read(index, num_workers, max_skipped=39)
        rows = read(index, num_workers, max_skipped=40)
    assert len(rows) == 120
    assert {key[:2] for key, _ in rows} == {"s0", "s2"}
    there = {key for key, _ in read(folder) if key[:2] != "s1"}
    assert {key for key, _ in rows} == there
    assert len(server.requests) < 10


def test_all_processes_together_fetch_each_block_once(folder: Path, cache):
    """Two ranks of two workers, begun at the same time with an empty cache."""
    fork = multiprocessing.get_context("fork")
    with RangeServer(folder) as server:
        index = load_index(server.url, cache)
        results = fork.Queue()

        def rank(number: int) -> None:
            results.put(read(index, 2, rank=number, world_size=2))

        ranks = [fork.Process(target=rank, args=(number,)) for number in (0, 1)]
        for process in ranks:
            process.start()
        rows = [*results.get(timeout=600), *results.get(timeout=300)]
        for process in ranks:
            process.join(120)
        gets = {path: n for path, n in server.requests.items() if path.endswith(".tar")}
    assert sorted(rows) == sorted(read(folder))
    assert sum(gets.values()) == num_blocks(folder), gets


def test_the_cache_stays_below_its_limit(folder: Path, tmp_path: Path):
    """A quarter of the data; blocks go and come back, and every byte is right."""
    cache = BlockCache.Config(folder=tmp_path / "cache", limit_mb=3, block_mb=1)
    with RangeServer(folder) as server:
        stream = ShardStream(load_index(server.url, cache), num_workers=2, **ORDER)
        rows, most = [], 0
        for batch in stream:
            rows += zip(batch["__key__"], batch["bin"], strict=True)
            most = max(most, cached_bytes(cache))
        assert sum(server.requests.values()) > num_blocks(folder)
    assert rows == read(folder)
    # A look takes time: it may count a block that goes and one that comes in its place.
    assert BLOCK < most <= 4 * BLOCK


def test_blocks_that_were_used_lately_stay(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(bytes(4 * BLOCK))
    config = BlockCache.Config(folder=tmp_path / "cache", limit_mb=3, block_mb=1)
    with RangeServer(tmp_path) as server:
        for block in (0, 1, 2, 0, 3, 0):
            cache = BlockCache(config)  # as in another process
            cache.read(f"{server.url}/a.bin", 4 * BLOCK, block * BLOCK, 10)
            time.sleep(0.02)  # file times are a few milliseconds apart
        assert server.requests["/a.bin"] == 4


def test_failed_prefetches_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An outage during prefetching costs nothing when it is over."""
    monkeypatch.setattr(remote, "retries", remote.Retries(attempts=1))
    (tmp_path / "a.bin").write_bytes(bytes(200 * BLOCK))
    cache = BlockCache(BlockCache.Config(folder=tmp_path / "cache", limit_mb=999, block_mb=1))
    down = [True]
    with RangeServer(tmp_path, fault=lambda *_: "503" if down else None) as server:
        url, size = f"{server.url}/a.bin", 200 * BLOCK
        for block in range(100):
            cache.prefetch(url, size, block * BLOCK, 1)
        for block in range(100):  # waits for its prefetch
            with pytest.raises(UnreachableError):
                cache.read(url, size, block * BLOCK, 1)
        down.clear()
        assert cache.read(url, size, 5, 3) == bytes(3)
        before = server.requests["/a.bin"]
        cache.prefetch(url, size, 150 * BLOCK, 1)
        assert cache.read(url, size, 150 * BLOCK, 3) == bytes(3)
        assert server.requests["/a.bin"] == before + 1


PREFETCHES = """
import sys
from dist_contrastive.data.shards.storage import BlockCache
cache = BlockCache(BlockCache.Config(folder=sys.argv[2], block_mb=1))
for block in range(60):
    cache.prefetch(sys.argv[1], 200 << 20, block << 20, 1)
"""


def test_a_process_ends_with_prefetches_pending(tmp_path: Path):
    """The server answers none of the first requests: a process that waited would never end."""
    (tmp_path / "a.bin").write_bytes(bytes(200 * BLOCK))
    with RangeServer(tmp_path, fault=lambda *_: "hang") as server:
        argv = [sys.executable, "-c", PREFETCHES, f"{server.url}/a.bin", str(tmp_path / "cache")]
        subprocess.run(argv, check=True, timeout=600)
        assert server.requests.get("/a.bin", 0) < 60


def test_a_block_that_another_process_drops_meanwhile(folder: Path, cache, monkeypatch):
    """Two meet the same bad block: the second has nothing to drop, and asks again all the same."""
    with RangeServer(folder) as server:
        index = load_index(server.url, cache)
        good = index.read(3)
        for block in cache.folder.glob("*/*-*"):
            block.write_bytes(bytes(block.stat().st_size))
        monkeypatch.setattr(BlockCache, "drop", lambda self, *_: shutil.rmtree(self.folder))
        assert index.read(3) == good


@pytest.mark.parametrize("kind", ["file", "below a file", "not writable"])
def test_a_cache_folder_that_cannot_be_used(folder: Path, tmp_path: Path, kind: str):
    (tmp_path / "file").write_text("")
    place = {"file": "file", "below a file": "file/cache", "not writable": "/proc/cache"}[kind]
    cache = BlockCache.Config(folder=tmp_path / place)
    with RangeServer(folder) as server:
        index = load_index(server.url, cache)
        with refused(DataError, str(tmp_path / place), "data.cache.folder"):
            read(index)


def test_prefetched_blocks_are_fetched_once(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * (BLOCK // 64))
    cache = BlockCache(BlockCache.Config(folder=tmp_path / "cache", limit_mb=64, block_mb=1))
    with RangeServer(tmp_path) as server:
        url, size = f"{server.url}/a.bin", 4 * BLOCK
        cache.prefetch(url, size, 0, size)
        assert cache.read(url, size, 5, 3) == bytes([5, 6, 7])
        assert cache.read(url, size, BLOCK - 1, 3 * BLOCK)[:2] == bytes([255, 0])
        assert server.requests["/a.bin"] == 4


def test_shards_of_one_name_do_not_mix(folder: Path, tmp_path: Path, cache):
    """Another folder, and another size at the same place: webdataset's cache serves the first."""
    for name, key in (("A", "a"), ("B", "b")):
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name / "0.tar", [{"__key__": key, "txt": key}] * 1)
        index_folder(tmp_path / name)
    with RangeServer(tmp_path) as server:
        for name, key in (("A", "a"), ("B", "b")):
            assert load_index(f"{server.url}/{name}", cache).read(0)["txt"] == key
        old = load_index(f"{server.url}/A", cache)
        longer = {"__key__": "a", "txt": "longer" * 9999}
        write_samples(tmp_path / "A" / "0.tar", [longer])
        index_folder(tmp_path / "A")
        assert load_index(f"{server.url}/A", cache).read(0) == longer
        assert old.read(0)["txt"] == "a"  # from the cache, as it was indexed
        shutil.rmtree(cache.folder)
        with refused(UnreadableSample, "A/0.tar is damaged or was changed"):
            old.read(0)


def test_a_shard_that_was_changed_on_the_server(folder: Path, tmp_path: Path, cache):
    """Shorter, and swapped for one of its size, with the index of before."""
    shutil.copytree(folder, tmp_path / "served")
    with RangeServer(tmp_path / "served") as server:
        index = load_index(server.url, cache)
        (tmp_path / "served" / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:3000])
        shutil.copy(folder / "1.tar", tmp_path / "served" / "2.tar")
        for number in (0, 20):
            with pytest.raises(UnreadableSample, match=r"0\.tar (is not there|is damaged)"):
                index.read(number)
        with refused(UnreadableSample, "2.tar is damaged or was changed", "field"):
            index.read(100)
        assert index.read(50)["__key__"] == "s1-10"


def test_a_busy_server_is_asked_again_for_a_size(folder: Path):
    """fsspec says of a 503 that the file is not there."""
    with RangeServer(folder, fault=lambda _, n: "503" if n < 3 else None) as server:
        assert remote.size(f"{server.url}/0.tar") == (folder / "0.tar").stat().st_size
    with RangeServer(folder) as server, refused(UnreadableSample, "9.tar is not there"):
        remote.size(f"{server.url}/9.tar")


def test_beyond_the_end_there_is_nothing(folder: Path, cache):
    size = (folder / "0.tar").stat().st_size
    with RangeServer(folder) as server:
        for _ in range(2):
            blocks = BlockCache(cache)
            assert blocks.read(f"{server.url}/0.tar", size, size - 5, 10) == bytes(5)
            assert blocks.read(f"{server.url}/0.tar", size, size + 5, 10) == b""


def test_damaged_cache_files_are_fetched_again(folder: Path, cache):
    with RangeServer(folder) as server:
        index = load_index(server.url, cache)
        assert read(index) == read(folder)
        blocks = sorted(cache.folder.glob("*/*-*"))
        blocks[0].write_bytes(b"cut")
        blocks[1].write_bytes(bytes(blocks[1].stat().st_size))
        blocks[2].with_name(f"{blocks[2].name}.1.2.partial").write_bytes(
            b"left by a killed process"
        )
        (cache.folder / "usage").write_text("not a number")
        assert read(index) == read(folder)


def test_a_full_disk_only_costs_time(folder: Path, cache, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with RangeServer(folder) as server:
        index = load_index(server.url, cache)
        monkeypatch.setattr(Path, "write_bytes", full)
        assert read(index, epochs=1) == read(folder)
    (record,) = caplog.records
    assert "(No space left on device)" in record.getMessage()
    assert "set data.cache.folder" in record.getMessage()
    assert cached_bytes(cache) == 0


def test_indexes_patterns_and_listings_of_a_server(folder, tmp_path, cache, monkeypatch):
    local = load_index(folder)
    with RangeServer(folder) as server:
        for location in (server.url, f"{server.url}/{{0..2}}.tar", f"{server.url}/*.tar"):
            made = index_folder(location, tmp_path / "made.npz")
            assert made.fingerprint == local.fingerprint
            assert made.shards == tuple(f"{server.url}/{n}.tar" for n in range(3))
        monkeypatch.delattr(
            "dist_contrastive.data.shards.indexing.index_shard"
        )  # none is read whole
        again = index_folder(server.url, tmp_path / "made.npz")
        assert again.fingerprint == local.fingerprint
        assert load_index(tmp_path / "made.npz", cache).read(50) == local.read(50)
        part = load_index(f"{server.url}/{{2..0..2}}.tar", cache)
        assert [part.read(n)["__key__"] for n in (0, 40)] == ["s2-0", "s0-0"]
        with refused(DataError, "--out FILE.npz"):
            index_folder(server.url)
        with refused(DataError, "/nothing has no index.npz", "--out FILE"):
            load_index(f"{server.url}/nothing", cache)
        with refused(DataError, "3.tar", "not in the index"):
            load_index(f"{server.url}/{{0..3}}.tar", cache)


def test_other_protocols(folder: Path, cache):
    """Any file system of fsspec: here the one in memory. One that is not there is named."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    assert read(load_index("memory://shards", cache)) == read(folder)
    assert read(load_index(f"file://{folder}/{{0..2}}.tar", cache)) == read(folder)
    assert read(load_index(f"file://{folder}/*.tar", cache)) == read(folder)
    with refused(DataError, "nosuch://x/index.npz", "use file, http"):
        load_index("nosuch://x", cache)


def test_a_file_system_without_ranges(folder: Path, cache, monkeypatch: pytest.MonkeyPatch):
    """It gives the whole file: one sentence, and no further try."""
    memory, asked = fsspec.filesystem("memory"), []
    for path in folder.iterdir():
        memory.pipe(f"/whole/{path.name}", path.read_bytes())

    def whole(_: object, path: str, **__: object) -> bytes:
        asked.append(path)
        return memory.store[f"/whole/{Path(path).name}"].getvalue()

    index = load_index("memory://whole", cache)
    monkeypatch.setattr(type(memory), "cat_file", whole)
    with refused(DataError, "were asked for", "range requests"):
        read(index)
    assert len(asked) <= 2 * num_blocks(folder)  # several threads ask, none a second time


def test_the_benchmark_of_blocks_runs(capsys: pytest.CaptureFixture[str]):
    block_cache.main(["--quick"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def train(argv: list[str]) -> int:
    return main(["train", str(CONFIGS / "digits_encoder.yaml"), *argv])


@pytest.fixture
def dies_after(digits: Path) -> Iterator[Callable[..., RangeServer]]:
    """Servers of the digits that refuse all, or hang, after so many requests for shards."""
    servers = []

    def start(requests: int, way: str = "503") -> RangeServer:
        left = itertools.count(requests, -1)

        def fault(path: str, _: int) -> str | None:
            return way if path.endswith(".tar") and next(left) <= 0 else None

        servers.append(RangeServer(digits / "train", fault=fault))
        return servers[-1].__enter__()

    yield start
    for server in servers:
        server.__exit__()


def test_training_saves_when_the_server_dies_and_goes_on_later(
    tmp_path: Path, overrides, cache, dies_after, capsys
):
    """Exit code 75 after a checkpoint; then, from another address, the same batches as locally."""
    small = ["data.cache.limit_mb=1", "data.cache.block_mb=1"]  # blocks are asked for all the time
    options = ["data.shuffle_window=16", "train.steps=22", f"data.cache.folder={cache.folder}"]
    options += small
    argv = [*overrides(tmp_path / "run", *options), "train.save_every=100"]
    assert train([*argv, f"data.train={dies_after(30).url}"]) == 75
    assert "could not be read in 6 attempts" in capsys.readouterr().err
    done = len(global_batches(tmp_path / "run"))
    assert 0 < done < 22
    assert train([*argv, f"data.train={dies_after(10**9).url}"]) == 0
    assert f"going on from step {done} of 22" in capsys.readouterr().err
    assert train([*overrides(tmp_path / "local", *options)]) == 0
    assert global_batches(tmp_path / "run") == global_batches(tmp_path / "local")


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_signal_while_the_server_hangs_saves(tmp_path, overrides, cache, dies_after, num_workers):
    """No rank waits for data with a checkpoint unsaved, and none stays behind. The server would
    answer the last requests after the test only."""
    server = dies_after(30, "hang")
    options = ["data.shuffle_window=16", "train.steps=22", "train.save_every=100"]
    options += ["data.cache.limit_mb=1", "data.cache.block_mb=1", f"data.num_workers={num_workers}"]
    options += [f"data.cache.folder={cache.folder}", f"data.train={server.url}"]
    argv = command("train", CONFIGS / "digits_encoder.yaml", *overrides(tmp_path / "run", *options))
    process = subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True)
    assert server.is_hanging.wait(300)
    steps = []
    while len(steps) < 2 or steps[-1] > steps[-2]:  # batches that came before
        steps.append(len(read_rows(tmp_path / "run")))
        time.sleep(2)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(300) == 75  # by the timeouts of requests it would take ten minutes
    rows = read_rows(tmp_path / "run")
    assert 0 < len(rows) < 22
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved.progress.step == len(rows)
    assert not psutil.wait_procs(tree, timeout=600)[1]
    process.stderr.close()
