import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_contrastive.data import pack_digits

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def _deterministic():
    """Same numbers in every run, and one thread: the ranks of a test share two cores."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The packed digits: real shards of real images."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack_digits(folder)
    return folder


@pytest.fixture(scope="session")
def overrides(digits) -> Callable[..., list[str]]:
    """Overrides that make a config of the demo short and put it into another folder."""

    def make(run_dir: Path, *more: str) -> list[str]:
        data = [f"data.train={digits}/train", f"data.test={digits}/test"]
        short = ["data.global_batch_size=64", "train.steps=12", "optim.warmup_steps=2"]
        log = ["train.log_every=1", "train.save_every=5", "train.ledger=true"]
        return [*data, *short, *log, f"run_dir={run_dir}", *more]

    return make


def command(*args: str | Path, ranks: int | None = None) -> list[str]:
    """`dist-contrastive ARGS`, or with ranks `launch.local ARGS` (a config and overrides)."""
    if ranks is None:
        return [sys.executable, "-m", "dist_contrastive", *map(str, args)]
    return [sys.executable, "-m", "launch.local", *map(str, args), "--ranks", str(ranks)]


def run(argv: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run to its end, one thread a rank."""
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=240, env=environment(), **options
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def global_batches(run_dir: Path) -> list[list[str]]:
    """The keys of every step, joined over ranks in their order; later lines count."""
    ranks = []
    for number in range(len(list((run_dir / "ledger").iterdir()))):
        text = (run_dir / "ledger" / f"rank-{number}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        ranks.append({line["step"]: line["keys"] for line in lines})
    return [[key for rank in ranks for key in rank[step]] for step in sorted(ranks[0])]
