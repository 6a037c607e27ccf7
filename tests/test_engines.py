"""Every task on every engine and number of ranks, cached or not, against one process alone."""

import itertools
import json
import math
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import CONFIGS, data_of
from torch import Tensor

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend
from dist_contrastive.config import RunConfig
from dist_contrastive.errors import NonFiniteError
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer.run import open_run
from dist_contrastive.trainer.step import train_step

STEPS = 3
GUARD_S = 600.0  # ranks that hang are ended; many times what they need
BATCH = 24
RESIDUAL = "task.encoder={name: residual, widths: [8, 16]}"
HEAD = "task.head={hidden: 16, out: 8}"
PAIR = {
    "encoder": {"name": "text", "width": 16, "layers": 1, "max_bytes": 24},
    "head": {"hidden": 16, "out": 8},
}
BALANCE = "data.balance={classes: 4, samples_per_class: 6}"
CLIPPED = "optim.clip_norm=0.2"  # a tenth of the norm
LEARNABLE = "task.loss={name: ntxent, temperature: 0.2, learnable: true}"
TASKS = {  # the config, and what makes it small
    "two_view": ("digits_encoder", RESIDUAL, HEAD, LEARNABLE),
    "paired": ("digits_captions", RESIDUAL, HEAD, f"task.pair={json.dumps(PAIR)}", CLIPPED),
    "bf16": ("digits_encoder", RESIDUAL, HEAD, LEARNABLE, "backend.precision=bf16"),
    "labelled": ("digits_supcon", RESIDUAL, HEAD, BALANCE),
    "hybrid": ("digits_hybrid", RESIDUAL, HEAD, BALANCE),
    "moco": ("digits_moco", RESIDUAL, HEAD, "task.queue_size=48"),
    "drift": (
        "digits_generator",
        "task.generator={name: conv, noise_dim: 4, width: 8}",
        "task.features=[{name: pixels}]",
        "task.ema=0.9",
    ),
}
MICRO_BATCHES = {"plain": None, "cached": 5}


class Outcome(NamedTuple):
    """What three steps left, as one rank sees it."""

    engine: str
    world_size: int
    norms: list[float]
    weights: dict[str, Tensor]


def config_of(task: str, overrides, run_dir: Path, *more: str) -> RunConfig:
    name, *options = TASKS[task]
    path = CONFIGS / f"{name}.yaml"
    # Momentum keeps what Adam would divide away: a gradient that is rounding alone.
    short = ("optim.name=sgd", "optim.lr=0.05", "optim.warmup_steps=0", f"train.steps={STEPS}")
    batch = (f"data.global_batch_size={BATCH}", "data.lanes=6", "data.num_workers=0")
    return configs.load(
        path, overrides(run_dir, *options, *short, *batch, *more, data_name=data_of(path))
    )


def with_engine(config: RunConfig, stage: int, micro_batch_size: int | None) -> RunConfig:
    return config.model_copy(
        update={
            "backend": config.backend.model_copy(update={"zero_stage": stage}),
            "train": config.train.model_copy(update={"micro_batch_size": micro_batch_size}),
        }
    )


def three_steps(config: RunConfig) -> Outcome:
    backend = Backend(config.backend)
    run = open_run(config, backend)
    norms = []
    for taken in run.data.batches(backend.device):
        row = train_step(run, taken.samples, taken.consumed, is_logged=True)
        norms.append(row["grad_norm"])
        if run.progress.step == STEPS:
            break
    weights = run.engine.weights()
    stage = f" {run.engine.stage}" if hasattr(run.engine, "stage") else ""
    name = type(run.engine.wrapped).__name__ + stage
    outcome = Outcome(name, backend.world_size, norms, weights)
    backend.close()
    return outcome


def all_three_steps(cases: list[RunConfig]) -> list[Outcome]:
    return [three_steps(config) for config in cases]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error of a tensor relative to its norm; one that is still near 0 counts as 0.1."""
    assert found.keys() == expected.keys()
    errors = [
        (
            ((found[name].double() - x.double()).norm() / x.double().norm().clamp(min=0.1)).item(),
            name,
        )
        for name, x in expected.items()
    ]
    assert all(math.isfinite(error) for error, _ in errors)
    return max(errors)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, overrides):
    """One process without a group, plain, in fp32."""
    folder = tmp_path_factory.mktemp("reference")
    tasks = {name: config_of(name, overrides, folder / name) for name in TASKS}
    outcomes = {name: three_steps(config) for name, config in tasks.items()}
    for name, outcome in outcomes.items():
        assert outcome.engine in ("TwoView", "Paired", "Labelled", "Hybrid", "Moco", "Drift"), name
    assert min(outcomes["paired"].norms) > 0.4, "nothing would be clipped"
    return outcomes


QUICK = {  # the other stages: below, where steps are bad and engines change
    ("replicated", 3, "cached"),
    ("replicated", 1, "cached"),
    ("ZeRO 3", 2, "cached"),
}
MATRIX = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(
        ("replicated", "ZeRO 1", "ZeRO 2", "ZeRO 3"), (1, 2, 3), MICRO_BATCHES
    )
]


@pytest.mark.parametrize(("engine", "world_size", "kind"), MATRIX)
def test_three_steps_are_those_of_one_process(
    engine, world_size, kind, reference, tmp_path_factory, overrides
):
    stage = 0 if engine == "replicated" else int(engine[-1])
    folder = tmp_path_factory.mktemp("runs")
    size = MICRO_BATCHES[kind]
    cases = {
        name: with_engine(config_of(name, overrides, folder / name), stage, size) for name in TASKS
    }
    ranks = run_ranks(all_three_steps, world_size, list(cases.values()), timeout_s=GUARD_S)
    wrapper = "DistributedDataParallel" if stage == 0 else f"DeepSpeedEngine {stage}"
    for number, name in enumerate(cases):
        expected, outcomes = reference[name], [outcomes[number] for outcomes in ranks]
        rel = 1e-5
        if name == "bf16":  # as near to fp32 as one process in bf16 is, and not the same as fp32
            expected = reference["two_view"]
            rel = 3 * worst(reference["bf16"].weights, expected.weights)[0]
            assert worst(outcomes[0].weights, expected.weights)[0] > 1e-4
        where = f"{name}, {kind}, {engine} on {world_size}"
        for outcome in outcomes:
            assert outcome.world_size == world_size, where
            if world_size > 1 or stage:
                assert outcome.engine == wrapper, where
            assert outcome.norms == pytest.approx(expected.norms, rel=10 * rel), where
        error, tensor = worst(outcomes[0].weights, expected.weights)
        assert error < rel, f"{where}: {tensor} off by {error}"


def with_bad_steps(config: RunConfig) -> list[dict[str, Tensor]]:
    """Weights after each of: a good step; one whose loss is not finite, on the last rank; one whose
    gradient is not; a good one from a temperature that was set out of its limits; a good one."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    is_last = backend.rank == backend.world_size - 1
    compare, found, moments = run.task.compare, [], []

    def bad_gradient(embeddings, samples, context):
        terms = compare(embeddings, samples, context)
        nothing = (embeddings[0] * (0 if is_last else 1)).square().sum().sqrt()
        return {"contrastive": terms["contrastive"] + nothing - nothing.detach()}

    batches = run.data.batches(backend.device)
    for number in range(5):
        taken = next(batches)
        run.task.compare = bad_gradient if number == 2 else compare
        if number == 1 and is_last:
            taken.samples.images.fill_(math.nan)
        if number == 3:
            with torch.no_grad(), run.engine.whole_parameters():
                run.task.loss.scale.log_scale.fill_(-3.0)
        row = train_step(run, taken.samples, taken.consumed, is_logged=True)
        assert bool(row) == (number not in (1, 2)), number
        assert run.progress.bad_steps == (number if number in (1, 2) else 0)
        found.append(run.engine.weights())
        moments.append(run.engine.optimizer_state())
    for kept in (found, moments):  # bad steps change nothing at all
        if kept[0]:
            assert_same(kept[1], kept[0])
            assert_same(kept[2], kept[0])
    backend.close()
    return found


def assert_same(mine, its) -> None:
    """Bitwise."""
    assert type(mine) is type(its)
    if isinstance(its, dict):
        assert mine.keys() == its.keys()
        for name, value in its.items():
            assert_same(mine[name], value)
    elif isinstance(its, list):
        for one, other in zip(mine, its, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(mine, its) if isinstance(its, Tensor) else mine == its


def all_with_bad_steps(cases: list[RunConfig]) -> list[list[dict[str, Tensor]]]:
    return [with_bad_steps(config) for config in cases]


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "cached"])
def test_what_is_not_finite_on_one_rank_changes_nothing_on_all(kind, tmp_path, overrides):
    alone = config_of("two_view", overrides, tmp_path / "alone", "train.steps=9")
    alone = with_engine(alone, 0, MICRO_BATCHES[kind])
    cases = [
        with_engine(
            config_of("two_view", overrides, tmp_path / str(stage), "train.steps=9"),
            stage,
            MICRO_BATCHES[kind],
        )
        for stage in range(4)
    ]
    expected = with_bad_steps(alone)
    assert expected[3]["loss.scale.log_scale"].item() == 0
    for stage, found in enumerate(run_ranks(all_with_bad_steps, 2, cases, timeout_s=GUARD_S)[0]):
        for number, weights in enumerate(found):
            error, tensor = worst(weights, expected[number])
            assert error < 1e-5, f"stage {stage}, after step {number}: {tensor} off by {error}"


def one_more_step(config: RunConfig) -> str:
    """Go on from the checkpoint with what it holds, bitwise; save after one step."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    saved = checkpoint.newest(config.run_dir / "checkpoints")
    if saved is not None:
        weights, state = run.engine.weights(), run.engine.optimizer_state()
        if backend.is_main:
            assert_same(weights, saved.weights())
            assert_same(state["state"], saved.optimizer_state()["state"])
    backend.close()
    assert trainer.train(config, stop_after=1) == (0 if run.progress.step == len(LEGS) - 1 else 75)
    return type(run.engine).__name__


def failures_of_safe_set(cases: list[RunConfig]) -> list[str]:
    return [failure_of_safe_set(config) for config in cases]


def failure_of_safe_set(config: RunConfig) -> str:
    """Error of DeepSpeed's public way to set what `Zero` sets by its private attributes."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    backend = Backend(config.backend)
    run = open_run(config, backend)
    try:
        if config.backend.zero_stage == 3:
            safe_set_full_fp32_param(run.task.loss.scale.log_scale, torch.zeros(1))
        else:
            for parameter in run.task.parameters():
                safe_set_full_optimizer_state(parameter, parameter.detach(), "exp_avg")
    except Exception as error:
        return type(error).__name__
    finally:
        backend.close()
    return ""


def test_private_attributes_of_deepspeed_are_needed(tmp_path, overrides):
    """Before the first step there is no state to set; one number does not divide by two ranks."""
    config = config_of("two_view", overrides, tmp_path)
    cases = [with_engine(config, stage, None) for stage in (1, 2, 3)]
    of_ranks = run_ranks(failures_of_safe_set, 2, cases, timeout_s=GUARD_S)
    for failures in zip(*of_ranks, strict=True):
        assert any(failures)


LEGS = ((2, 0), (3, 3), (1, 1))  # ranks and stage


def test_a_run_goes_on_with_any_engine_on_any_number_of_ranks(tmp_path, overrides):
    """AdamW's two moments and count of steps, handed from each engine to the next."""
    adam = ("optim.name=adamw", "optim.lr=0.01", "optim.eps=1e-3", f"train.steps={len(LEGS)}")
    adam = (*adam, "train.self_check=false")  # of each engine, in test_self_check.py
    whole = config_of("two_view", overrides, tmp_path / "whole", *adam)
    assert trainer.train(whole) == 0
    legs = config_of("two_view", overrides, tmp_path / "legs", *adam)
    for ranks, stage in LEGS:
        names = run_ranks(one_more_step, ranks, with_engine(legs, stage, 5), timeout_s=GUARD_S)
        assert names == ["Zero" if stage else "Replicated"] * ranks
    found, expected = (checkpoint.newest(c.run_dir / "checkpoints") for c in (legs, whole))
    assert found is not None
    assert expected is not None
    assert found.progress == expected.progress
    assert worst(found.weights(), expected.weights())[0] < 1e-5
    moments, its = found.optimizer_state()["state"], expected.optimizer_state()["state"]
    assert moments.keys() == its.keys()
    for name in its:
        assert moments[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert worst(moments[name], its[name])[0] < 1e-5


@pytest.mark.parametrize("kind", MICRO_BATCHES)
def test_fp16_finds_its_scale_and_goes_on_with_it(kind, tmp_path, overrides):
    """From a scale at which gradients overflow, it is halved without a bad step; the checkpoint
    keeps it."""
    options = ("backend.precision=fp16", LEARNABLE, "train.steps=40", "train.max_bad_steps=0")
    config = config_of("two_view", overrides, tmp_path, *options)
    config = with_engine(config, 0, MICRO_BATCHES[kind])
    backend = Backend(config.backend)
    run = open_run(config, backend)
    state = run.engine.optimizer_state()
    state["scaler"]["scale"] = 2.0**24
    run.engine.load_optimizer_state(state)
    before, rows = run.engine.weights(), []
    for taken in run.data.batches(backend.device):
        rows.append(train_step(run, taken.samples, taken.consumed, is_logged=True))
        if not rows[-1]:
            assert_same(run.engine.weights(), before)
        before = run.engine.weights()
        if run.progress.step == 20:
            break
    left_out = rows.count({})
    assert 2 < left_out < 18
    assert not rows[0]
    assert run.engine.optimizer_state()["scaler"]["scale"] == 2.0 ** (24 - left_out)
    assert run.progress.bad_steps == 0
    backend.close()


def bad_step_of(config: RunConfig) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Bad steps counted, weights before and after, of a finite loss without a finite gradient."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    compare = run.task.compare
    run.task.compare = lambda embeddings, *rest: {  # the root's derivative at 0 is not a number
        "contrastive": compare(embeddings, *rest)["contrastive"]
        + (embeddings[0] * 0).square().sum().sqrt()
    }
    before = run.engine.weights()
    batch = next(iter(run.data.batches(backend.device)))
    assert train_step(run, batch.samples, batch.consumed, is_logged=True) == {}
    bad_steps, after = run.progress.bad_steps, run.engine.weights()
    backend.close()
    return bad_steps, before, after


@pytest.mark.parametrize(  # all stages in fp32: above
    ("stage", "precision"), [(0, "bf16"), pytest.param(2, "bf16", marks=pytest.mark.slow)]
)
def test_a_gradient_that_is_not_finite_changes_nothing(stage, precision, tmp_path, overrides):
    precise = f"backend.precision={precision}"
    config = with_engine(config_of("two_view", overrides, tmp_path, precise), stage, None)
    found = run_ranks(bad_step_of, 2, config, timeout_s=GUARD_S)
    assert [bad_steps for bad_steps, _, _ in found] == [1, 1]
    _, before, after = found[0]
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_fp16_that_never_works_stops(tmp_path, overrides, monkeypatch):
    options = ("backend.precision=fp16", LEARNABLE, "train.steps=400")
    config = config_of("two_view", overrides, tmp_path, *options)
    backend = Backend(config.backend)
    run = open_run(config, backend)
    compare = run.task.compare
    run.task.compare = lambda embeddings, *rest: {
        "contrastive": compare(embeddings, *rest)["contrastive"]
        + (embeddings[0] * 0).square().sum().sqrt()
    }
    batches = run.data.batches(backend.device)
    with pytest.raises(NonFiniteError, match="bad step number 4 without a good one between"):
        all(train_step(run, x.samples, x.consumed, is_logged=False) == {} for x in batches)
    assert run.progress.step < 30
    backend.close()


def reductions_of(cases: list[RunConfig]) -> list[int]:
    """Reductions over ranks that gloo was asked for in one step, those of the loss included."""
    found = []
    for config in cases:
        backend = Backend(config.backend)
        run = open_run(config, backend)
        first, second = islice(run.data.batches(backend.device), 2)
        train_step(run, first.samples, first.consumed, is_logged=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            train_step(run, second.samples, second.consumed, is_logged=False)
        found.append(sum(e.name.startswith("gloo:") and "reduce" in e.name for e in seen.events()))
        backend.close()
    return found


@pytest.mark.parametrize(
    "stage", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_a_cached_step_reduces_as_often_as_a_plain_one(stage, tmp_path, overrides):
    """Asked of gloo itself: four micro-batches send their gradients once."""
    cases = [
        with_engine(config_of("two_view", overrides, tmp_path / str(size)), stage, size)
        for size in (None, 3)  # of 12 rows
    ]
    for plain, cached in run_ranks(reductions_of, 2, cases, timeout_s=GUARD_S):
        assert plain == cached > 0
