"""The drift task: the same on any number of ranks, its bank, its guidance, its average."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS
from force_formulas import naive
from scipy import stats
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive import config as configs
from dist_contrastive.config import RunConfig
from dist_contrastive.data import ShardIndex
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.tasks import Drift, build_task
from dist_contrastive.tasks.bank import SampleBank
from dist_contrastive.testing import run_ranks

ROWS, STEPS = 24, 3
MAPS = "{stages: [2], kinds: [pooled, locations], patches: []}"
ENCODER = f"{{name: encoder, encoder: {{name: residual, widths: [8, 16]}}, maps: {MAPS}}}"
MLP = "{name: mlp, noise_dim: 4, class_dim: 8, hidden: 32, layers: 3}"
SMALL = (
    *(f"task.generator={MLP}", "task.features=[{name: pixels}]", "task.ema=null"),
    "task.loss.temperatures=[0.05, 0.2]",
)
BANK = "task.bank={capacity: 12, positives: 5}"
GUIDANCE = "task.guidance={unconditional: 7, strengths: [1.5, 4]}"


def load(overrides, run_dir: Path, *more: str) -> RunConfig:
    path = CONFIGS / "digits_generator.yaml"
    return configs.load(path, overrides(run_dir, *SMALL, *more))


def samples_of(config: RunConfig, step: int = 0) -> Samples:
    """Digits, different ones in each step, called 0 or 1 so that each class has several."""
    numbers = range(ROWS * step, ROWS * (step + 1))
    samples = config.fields.read(ShardIndex.load(config.data.train), numbers)
    return replace(samples, images=samples.images.double(), labels=samples.labels % 2)


def drift(config: RunConfig) -> Drift:
    task = build_task(config, samples_of(config)).double()
    assert isinstance(task, Drift)
    return task


def inputs_of(task: Drift, samples: Samples) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in task.inputs(samples)]


def one_step(task: Drift, samples: Samples, lr: float = 0.0) -> dict[str, Tensor]:
    """A step of gradient descent; the terms of the loss."""
    module = DistributedDataParallel(task) if dist.is_initialized() else task
    embeddings = module(*inputs_of(task, samples))
    terms = task.compare(embeddings, samples)
    task.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    with torch.no_grad():
        for p in task.generator.parameters():
            p -= lr * p.grad
    task.finish_step(embeddings)
    return {name: term.detach() for name, term in terms.items()}


# ---------------------------------------------------------------------------- ranks


class Trained(NamedTuple):
    """What a few steps leave, and how often ranks took their groups for themselves."""

    terms: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]
    scalars: list[dict[str, float]]
    state: dict[str, Tensor]
    times_whole: int


def trained(config: RunConfig, sizes: Sequence[int]) -> Trained:
    task, terms, scalars, whole = drift(config), [], [], []
    task.is_logged = True
    if task._loss_of_whole_groups is not None:
        task._loss_of_whole_groups.register_forward_hook(lambda *_: whole.append(1))
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = torch.arange(ROWS).split(list(sizes))[rank]
    for step in range(STEPS if task.bank else 1):
        terms.append(one_step(task, samples_of(config, step).rows(mine), lr=0.05))
        scalars.append(task.scalars())
    gradients = {name: p.grad for name, p in task.generator.named_parameters()}
    return Trained(terms, gradients, scalars, task.state_dict(), len(whole))


Splits = dict[int, list[int]]


def all_trained(jobs: list[tuple[RunConfig, Splits]]) -> list[Trained]:
    return [trained(config, splits[dist.get_world_size()]) for config, splits in jobs]


UNEVEN = {1: [24], 2: [9, 15], 3: [4, 0, 20], 4: [7, 0, 1, 16]}
EVEN = {1: [24], 2: [12, 12], 3: [8, 8, 8], 4: [6, 6, 6, 6]}
FEATURES = f"task.features=[{{name: pixels}}, {ENCODER}]"
EVERYTHING = (BANK, GUIDANCE, "task.ema=0.5", FEATURES)
PAPER = ("task.loss.preset=paper", "task.loss.scale_scope=global")
LABEL = ("task.loss.scale_scope=label", "task.loss.norm_scope=label")
CASES: dict[str, tuple[Splits, Sequence[str]]] = {
    "everything": (UNEVEN, EVERYTHING),
    "everything in two groups": (UNEVEN, (*EVERYTHING, *PAPER, "task.groups=2")),
    "everything from a ring": (EVEN, (*EVERYTHING, *PAPER, "task.loss.keys_from=ring")),
    "a bank's data are no one's": (EVEN, (BANK, *PAPER, "task.groups=4")),
    "whole groups, global scope": (EVEN, (FEATURES, *PAPER, "task.groups=4")),
    "whole groups, scope of labels": (EVEN, (FEATURES, *LABEL, "task.groups=4")),
    "uneven groups": (UNEVEN, (FEATURES, *LABEL, "task.groups=4")),
    "groups share their scale": (EVEN, (FEATURES, "task.groups=4")),
}
WHOLE = {  # where ranks take their groups for themselves
    "whole groups, global scope": (1, 2, 4),
    "whole groups, scope of labels": (1, 2, 4),
    "uneven groups": (1,),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory, overrides) -> list[tuple[RunConfig, Splits]]:
    folder = tmp_path_factory.mktemp("drift")
    return [(load(overrides, folder, *more), splits) for splits, more in CASES.values()]


@pytest.fixture(scope="module")
def right(cases) -> list[Trained]:
    """One process, with dense losses."""
    dense = {"impl": "dense", "keys_from": "gather"}
    found = []
    for config, _ in cases:
        loss = config.task.loss.model_copy(update=dense)
        task = config.task.model_copy(update={"loss": loss})
        found.append(trained(config.model_copy(update={"task": task}), [ROWS]))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_train_as_one_process(world_size, cases, right):
    """Terms, gradients, diagnostics, bank, average: over three steps, in which the bank fills."""
    for rank, results in enumerate(run_ranks(all_trained, world_size, cases)):
        for name, found, expected in zip(CASES, results, right, strict=True):
            where = f"{name}, rank {rank} of {world_size}"
            for step in range(len(expected.terms)):
                assert_close(found.terms[step], expected.terms[step], f"{where}, step {step}")
                assert found.scalars[step] == pytest.approx(expected.scalars[step], rel=1e-9), where
            assert_close(found.gradients, expected.gradients, where)
            assert_close(found.state, expected.state, where)
            whole = len(found.terms[0]) if world_size in WHOLE.get(name, ()) else 0
            assert found.times_whole == whole, where


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for key, x in expected.items():
        scale = x.double().abs().max().item() or 1.0
        error = (found[key].double() - x.double()).abs().max().item() / scale
        assert error < 1e-9, f"{where}: {key} off by {error}"


def test_everything_takes_part(right):
    """What ranks are compared with: a bank that goes round, an average apart from the generator."""
    for name, found in zip(CASES, right, strict=True):
        if "bank.added" in found.state:
            added = found.state["bank.added"]
            assert int(found.state["steps_done"]) == STEPS
            assert int(added.sum()) == STEPS * ROWS
            assert added[:2].min() > 12
        averages = [key for key in found.state if key.startswith("average.module.")]
        assert bool(averages) == name.startswith("everything")
        for key in averages:
            mine = found.state[key.replace("average.module", "generator")]
            assert not torch.equal(mine, found.state[key]), f"{name}: {key}"
