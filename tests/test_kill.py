"""Trainings killed by SIGKILL at any instant, in the middle of saves too, and started again."""

import random
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, Ranks, global_batches, run_forked
from torch import Tensor

from dist_contrastive import checkpoint

STEPS = 30
OPTIONS = (
    *(f"train.steps={STEPS}", "train.save_every=1", "train.micro_batch_size=12"),
    *("data.lanes=6", "data.global_batch_size=48", "train.ledger=true"),
    "task.encoder={name: residual, widths: [8, 16]}",
    "task.loss={name: ntxent, temperature: 0.2, learnable: true}",
    *("optim.name=sgd", "optim.lr=0.05"),  # Adam would divide by gradients that are rounding alone
)
CONFIG = CONFIGS / "digits_encoder.yaml"


def weights(run_dir: Path) -> dict[str, Tensor]:
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    assert found.progress.step == STEPS
    return found.weights()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, overrides) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = run_forked("train", CONFIG, *overrides(run_dir, *OPTIONS), number=2)
    assert done.returncode == 0, done.stderr
    return run_dir


def started(run_dir: Path) -> list[Path]:
    """What changes as a training goes on: a leg that has done steps has changed it."""
    return sorted((run_dir / "checkpoints").glob("*"))


def kill_after(options: list[str], ranks: int, run_dir: Path, wait_s: float) -> bool:
    """Start, wait until steps are being done and a random while longer, and kill all ranks.

    Returns:
        Whether none had come to its end before.
    """
    before = started(run_dir)
    training = Ranks("train", CONFIG, *options, number=ranks)
    training.until(lambda: started(run_dir) != before, pause_s=0.005)
    time.sleep(wait_s)
    was_training = training.are_alive()
    training.kill()
    return was_training


@pytest.mark.parametrize(
    "changing",
    [
        pytest.param(False, id="equal_ranks", marks=pytest.mark.slow),  # bitwise: test_trainer.py
        pytest.param(True, id="changing_ranks"),
    ],
)
def test_legs_end_with_the_weights_of_one_run(changing, tmp_path, overrides, uninterrupted):
    """Every step saves, so that most kills fall into a save. Eight legs in all, on 2 ranks, and
    on 1 to 3."""
    chance, legs = random.Random(changing), 4
    ranks = [chance.choice([1, 2, 3]) if changing else 2 for _ in range(legs)]
    run_dir = tmp_path / "legs"
    options = overrides(run_dir, *OPTIONS)
    killed = [kill_after(options, n, run_dir, chance.uniform(0, 0.15)) for n in ranks[:-1]]
    assert sum(killed) >= 2, "killed too late to prove anything"
    done = run_forked("train", CONFIG, *options, number=ranks[-1])
    assert done.returncode == 0, done.stderr
    expected, found = weights(uninterrupted), weights(run_dir)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not changing:
            assert torch.equal(found[name], value), name
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < 1e-5, f"{name}: {error}"
    assert global_batches(run_dir) == global_batches(uninterrupted)
