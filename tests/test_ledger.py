"""Runs killed again and again, each time resumed by other ranks and workers: what was consumed is
one epoch exactly, in the batches of a run that was never stopped."""

import itertools
import json
import multiprocessing
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import CONFIGS, command, environment, global_batches, run

from dist_contrastive import checkpoint
from dist_contrastive import config as configs
from dist_contrastive.data import ShardStream, index_folder
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.metrics import read_rows

COUNTS = (130, 1, 0, 212, 97, 160, 3, 250, 150)  # 1003 samples
ORDER = {"global_batch_size": 48, "lanes": 24, "seed": 11, "shuffle_window": 16, "epochs": 1}
TEAMS = [(w, n) for w, n in itertools.product((1, 2, 3, 4), (0, 1, 2, 3)) if 24 % w == 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, numbers = tmp_path_factory.mktemp("ledger"), itertools.count()
    for shard, count in enumerate(COUNTS):
        chosen = itertools.islice(numbers, count)
        write_samples(folder / f"{shard}.tar", [{"__key__": f"s{n}", "cls": n} for n in chosen])
    index_folder(folder)
    return folder


def consume(folder: Path, ledger: Path, rank: int, world_size: int, workers: int, start: int):
    """One rank: a line for every batch, flushed, at its own pace."""
    pace = random.Random(rank)
    stream = ShardStream(
        folder, **ORDER, rank=rank, world_size=world_size, num_workers=workers, consumed=start
    )
    with (ledger / f"rank-{rank}.jsonl").open("w", buffering=1) as file:
        for batch in stream:
            file.write(json.dumps({"stop": stream.consumed, "keys": batch["__key__"]}) + "\n")
            time.sleep(pace.uniform(0, 0.01))


def written(ledger: Path, world_size: int) -> list[list[dict]]:
    """The whole lines of every rank."""
    texts = [ledger / f"rank-{rank}.jsonl" for rank in range(world_size)]
    lines = [p.read_text().splitlines(keepends=True) if p.exists() else [] for p in texts]
    return [[json.loads(line) for line in rank if line.endswith("\n")] for rank in lines]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_sigkill_at_random_steps(folder: Path, tmp_path: Path, seed: int):
    chance, fork = random.Random(seed), multiprocessing.get_context("fork")
    expected = [batch["__key__"] for batch in ShardStream(folder, **ORDER)]
    consumed, batches, teams = 0, [], []
    while len(batches) < len(expected):
        world_size, workers = chance.choice([team for team in TEAMS if team not in teams])
        teams.append((world_size, workers))
        ledger = tmp_path / str(len(teams))
        ledger.mkdir()
        ranks = [
            fork.Process(target=consume, args=(folder, ledger, r, world_size, workers, consumed))
            for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        last = len(teams) > 5  # this one runs to its end
        kill_at = 10**6 if last else chance.randint(1, 5)
        while any(p.is_alive() for p in ranks) and len(written(ledger, 1)[0]) < kill_at:
            time.sleep(0.002)
        if not last:
            for process in ranks:
                process.kill()  # SIGKILL, unless it has just ended
        for process in ranks:
            process.join(30)
        # A checkpoint is of a step that all ranks have done; here, any one of those.
        lines = written(ledger, world_size)
        done = min(len(rank) for rank in lines)
        saved = done if last else chance.randint(0, done)
        for step in range(saved):
            assert len({rank[step]["stop"] for rank in lines}) == 1
            batches.append([key for rank in lines for key in rank[step]["keys"]])
            consumed = lines[0][step]["stop"]
    assert len(teams) >= 3
    assert batches == expected
    assert sorted(itertools.chain(*batches)) == sorted(f"s{n}" for n in range(sum(COUNTS)))


@pytest.mark.slow  # test_kill.py has changing ranks, killed in saves
def test_training_killed_and_resumed_by_other_ranks_and_workers(tmp_path, overrides):
    """Real runs, three legs; the ledger that they leave has every step once."""
    epoch = ["train.steps=22", "train.save_every=4", "data.lanes=16"]  # 22 * 64 of 1437 samples
    options = overrides(tmp_path / "run", *epoch, "data.shuffle_window=32")
    config = CONFIGS / "digits_encoder.yaml"
    for ranks, workers, until in ((2, 1, 6), (1, 3, 13)):
        argv = command(config, *options, f"data.num_workers={workers}", ranks=ranks)
        process = subprocess.Popen(argv, env=environment(), start_new_session=True)
        while all(row["step"] < until for row in read_rows(tmp_path / "run")):
            assert process.poll() is None, "ended too early to be killed"
            time.sleep(0.01)
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()
        process.wait(30)
    done = run(command(config, *options, "data.num_workers=2", ranks=4))
    assert done.returncode == 0, done.stderr
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").progress.consumed == 22 * 64
    data = configs.load(config, options).data
    stream = ShardStream(
        data.train, global_batch_size=64, lanes=16, seed=0, shuffle_window=32, only=["png"]
    )
    expected = [batch["__key__"] for batch in itertools.islice(stream, 22)]
    assert global_batches(tmp_path / "run") == expected
    assert len(set(itertools.chain(*expected))) == 22 * 64
