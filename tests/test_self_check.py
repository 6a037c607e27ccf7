"""The check before the first step finds what is wrong, and leaves nothing behind."""

import itertools

import pytest
import torch
from test_engines import GUARD_S, TASKS, all_three_steps, config_of, with_engine, worst
from torch import Tensor

from dist_contrastive import checkpoint, trainer
from dist_contrastive.backend import Backend
from dist_contrastive.config import RunConfig
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer.checks import self_check
from dist_contrastive.trainer.run import open_run

MICRO = {"plain": None, "cached": 5}
SLOW = pytest.mark.slow


def checked(config: RunConfig, fault: str = "") -> str:
    """What the check says, with a fault in the task of one rank, or of all."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    compare = run.task.compare
    if fault == "local":  # negatives of this rank alone
        run.task.loss.keys_from = "local"
    if fault == "mean":  # a mean of means without the factor that the contract asks for
        run.task.compare = lambda *x: {k: v / backend.world_size for k, v in compare(*x).items()}
    if fault == "one_rank" and backend.rank == 1:
        run.task.compare = lambda *x: {k: 2 * v for k, v in compare(*x).items()}
    try:
        return self_check(run)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        backend.close()


def all_checked(cases: list[RunConfig], faults: list[str]) -> list[str]:
    return [checked(config, fault) for config in cases for fault in faults]


QUICK = {(0, 3, "plain"), (0, 3, "cached")}  # ZeRO 3: below, where nothing is left behind
MATRIX = [
    pytest.param(*way, marks=[SLOW] * (way not in QUICK))
    for way in itertools.product((0, 2, 3), (1, 3), MICRO)
]


@pytest.mark.parametrize(("stage", "world_size", "kind"), MATRIX)
def test_every_task_passes(stage, world_size, kind, tmp_path, overrides):
    cases = [
        with_engine(config_of(name, overrides, tmp_path / name), stage, MICRO[kind])
        for name in TASKS
    ]
    for told in run_ranks(all_checked, world_size, cases, [""], timeout_s=GUARD_S):
        for config, text in zip(cases, told, strict=True):
            if (world_size, stage, config.train.micro_batch_size) == (1, 0, None):
                assert text == "that of one process"
            else:
                assert "parameters have that of one process to " in text, config.task.name
                rounding = 0.2 if config.backend.precision == "bf16" else 1e-3
                assert float(text.rsplit(" ", 1)[-1]) < rounding, text


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_wrong_is_refused_on_all_ranks(stage, tmp_path, overrides):
    config = with_engine(config_of("two_view", overrides, tmp_path), stage, None)
    faults = ["local", "mean", "one_rank"]
    for told in run_ranks(all_checked, 2, [config], faults, timeout_s=GUARD_S):
        for fault, text in zip(faults, told, strict=True):
            assert "ConfigError: " in text, (fault, text)
            assert f"on 2 ranks (zero_stage={stage}, micro_batch_size=None) is not that of" in text
        assert "0.5 times its norm" in told[1]


def all_trained(cases: list[RunConfig]) -> list[dict[str, Tensor]]:
    for config in cases:
        assert trainer.train(config) == 0
    return [checkpoint.run_newest(config.run_dir).weights() for config in cases]


@pytest.mark.parametrize("stage", [0, *(pytest.param(n, marks=SLOW) for n in (1, 2)), 3])
def test_it_leaves_nothing_behind(stage, tmp_path, overrides):
    """Weights of a run with the check are bitwise those of one without."""
    cases = []
    for check in ("true", "false"):
        options = (f"train.self_check={check}", "optim.name=adamw")
        config = config_of("two_view", overrides, tmp_path / check, *options)
        cases.append(with_engine(config, stage, 5))
    both = run_ranks(all_trained, 2, cases, timeout_s=GUARD_S)[0]
    assert both[0].keys() == both[1].keys()
    for name, value in both[0].items():
        assert torch.equal(both[1][name], value), name


VIT = (
    "task.encoder={name: transformers, model_type: vit, row_independent: false, config: "
    "{hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, intermediate_size: 64, "
    "patch_size: 4, hidden_dropout_prob: 0.2}}"
)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=SLOW)])
def test_blocks_that_are_computed_again(stage, tmp_path, overrides):
    """Dropout and all: the same weights, in each engine."""
    cases = []
    for again in (True, False):
        options = (f"backend.activation_checkpointing={again}", VIT)
        config = config_of("two_view", overrides, tmp_path / str(again), *options)
        cases.append(with_engine(config, stage, 5))
    both = run_ranks(all_three_steps, 2, cases, timeout_s=GUARD_S)[0]
    assert worst(both[0].weights, both[1].weights)[0] < 1e-6


def kept_bytes(config: RunConfig) -> int:
    """What the graph of the embeddings of a batch holds."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    taken = next(run.data.batches(backend.device))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        context = run.task.begin_step(taken.samples)
        run.engine.embed(*run.task.inputs(taken.samples, context))
    backend.close()
    return kept


def test_blocks_that_are_computed_again_keep_less(tmp_path, overrides):
    again = "backend.activation_checkpointing"
    configs = [config_of("two_view", overrides, tmp_path, VIT, f"{again}={x}") for x in (1, 0)]
    sizes = [kept_bytes(config) for config in configs]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.slow
def test_compiled_networks_train_alike(tmp_path, overrides):
    both = []
    for compiled in (True, False):
        config = config_of(
            "two_view", overrides, tmp_path / str(compiled), f"backend.compile={compiled}"
        )
        both.append(run_ranks(all_three_steps, 2, [config], timeout_s=GUARD_S)[0][0])
    assert worst(both[0].weights, both[1].weights)[0] < 1e-5
