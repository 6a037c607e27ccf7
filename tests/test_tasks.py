"""Every task with its config: the gradient contract, and the same run on any number of ranks."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS, data_of, global_batches, run_forked
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.config import RunConfig
from dist_contrastive.data import load_index
from dist_contrastive.data.fields import Samples
from dist_contrastive.metrics import read_rows
from dist_contrastive.tasks import ContrastiveTask, DataInfo, Drift, Moco, Task, TwoView
from dist_contrastive.tasks.base import StepContext
from dist_contrastive.testing import run_ranks

SETTINGS = {path.stem: configs.load(path) for path in CONFIGS.glob("*.yaml")}
NAMES = sorted(SETTINGS, key=lambda name: (isinstance(SETTINGS[name].task, Drift.Config), name))
EACH_TASK = (  # its features are the encoder's
    *("digits_encoder", "digits_hybrid", "digits_moco", "digits_profiles", "digits_slant"),
    *("digits_generator", "eight_gaussians"),
)
TASKS = CONFIGS.parent / "docs" / "tasks.md"
ROWS = 24
SPLITS = {1: [24], 2: [9, 15], 3: [4, 0, 20], 4: [4, 0, 13, 7]}


class Step(NamedTuple):
    """What one step leaves: the terms, the gradient that the optimiser sees, and the state."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def short(name: str, overrides, run_dir: Path, *more: str) -> list[str]:
    """The config's path and overrides."""
    path = CONFIGS / f"{name}.yaml"
    return [str(path), *overrides(run_dir, *more, data_name=data_of(path))]


def small(name: str, overrides, run_dir: Path, *more: str) -> RunConfig:
    path, *options = short(name, overrides, run_dir, *untrained_features(name), *more)
    return configs.load(path, options)


def untrained_features(name: str) -> list[str]:
    """For a generator in the features of a run: the same ones of a fresh encoder."""

    def untrained(feature: dict) -> dict:
        if feature["name"] != "run":
            return feature
        encoder = SETTINGS[Path(feature["run_dir"]).name].task.encoder.model_dump(mode="json")
        return {"name": "encoder", "encoder": encoder, "maps": feature["maps"]}

    return changed_features(name, untrained)


def changed_features(name: str, change: Callable[[dict], dict]) -> list[str]:
    task = SETTINGS[name].task
    if not isinstance(task, Drift.Config):
        return []
    features = [change(feature.model_dump(mode="json")) for feature in task.features]
    return [f"task.features={json.dumps(features)}"]


def batch_of(config: RunConfig) -> Samples:
    """The first samples; where labels take part some are missing."""
    samples = config.fields.read(load_index(config.data.train), range(ROWS))
    if config.task.uses_labels:
        samples.labels[2::5] = -1 if config.data.num_classes else torch.nan
    return samples


def prepared(config: RunConfig, example: Samples) -> Task:
    """The task in fp64, in the middle of a run, with some keys queued, or samples banked."""
    task = config.build_task(example).double()
    if isinstance(task, Moco):
        torch.manual_seed(3)
        task.queue.normal_()
        task.num_queued += len(task.queue) // 2
    if isinstance(task, Drift) and task.bank is not None:
        torch.manual_seed(3)
        task.bank.samples.copy_(torch.randn(task.bank.samples.shape) * 50)
        task.bank.added += task.bank.capacity // 2
    return task


def step_of(config: RunConfig, rows: slice) -> Step:
    samples = batch_of(config)
    task = prepared(config, samples)
    samples = samples.rows(torch.arange(ROWS)[rows])
    context = task.begin_step(samples, progress=0.4)
    inputs = task.inputs(samples, context)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    module = DistributedDataParallel(task) if dist.is_initialized() else task
    embeddings = module(*inputs)
    # Frozen encoders are in fp64 too; only their data are not made by `inputs`.
    samples = replace(samples, images=samples.images.double())
    terms = task.compare(embeddings, samples, context)
    torch.stack(list(terms.values())).sum().backward()
    task.finish_step(embeddings, samples, context)
    gradients = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    found = {name: term.detach() for name, term in terms.items()}
    state = {name: x for name, x in task.state_dict().items() if name not in gradients}
    return Step(found, gradients, state)


def steps_of(all_configs: list[RunConfig]) -> list[Step]:
    sizes = SPLITS[dist.get_world_size()]
    first = sum(sizes[: dist.get_rank()])
    rows = slice(first, first + sizes[dist.get_rank()])
    return [step_of(config, rows) for config in all_configs]


@pytest.fixture(scope="module")
def all_configs(tmp_path_factory, overrides) -> list[RunConfig]:
    folder = tmp_path_factory.mktemp("runs")
    return [small(name, overrides, folder / name) for name in NAMES]


@pytest.fixture(scope="module")
def right(all_configs) -> list[Step]:
    """One process with all rows, by dense losses."""
    return [step_of(config, slice(ROWS)) for config in all_configs]


@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_gradient_contract(world_size, all_configs, right):
    """Uneven rows, and a rank without any: terms, gradients and the rest of the state (queues,
    banks, slow copies) are those of one process."""
    for rank, steps in enumerate(run_ranks(steps_of, world_size, all_configs)):
        for name, found, expected in zip(NAMES, steps, right, strict=True):
            where = f"{name}, rank {rank} of {world_size}"
            for kind in ("terms", "gradients", "state"):
                mine, theirs = getattr(found, kind), getattr(expected, kind)
                assert mine.keys() == theirs.keys(), where
                for key, x in theirs.items():
                    scale = x.double().abs().max().item() or 1.0
                    error = (mine[key].double() - x.double()).abs().max().item() / scale
                    assert error < 1e-9, f"{where}: {kind} {key} off by {error}"


def test_every_parameter_is_trained(right):
    """None without a gradient (DDP would wait for it), none whose gradient is 0 throughout."""
    for name, step in zip(NAMES, right, strict=True):
        for key, gradient in step.gradients.items():
            assert gradient is not None, f"{name}: {key}"
            assert gradient.abs().max() > 0, f"{name}: {key}"


def curve_of(name: str) -> tuple[int, list[str]]:
    """How many steps its curve has, and overrides: points cost nothing."""
    data = SETTINGS[name].data
    are_points = data.image == "npy"
    steps = 12 if are_points else 4
    # Small batches of a young generator amplify rounding; balanced ones fit no smaller one.
    batch = data.global_batch_size if are_points or data.balance else 128
    size = [f"train.steps={steps}", f"data.global_batch_size={batch}"]
    if name == "glyphs_generator":
        size += ["task.generator.width=8", "task.bank.positives=4"]
    return steps, [*size, "optim.warmup_steps=20", "train.log_every=1"]


def features_of_runs(name: str, folder: Path) -> list[str]:
    """Those of the config, from the runs in a folder."""

    def moved(feature: dict) -> dict:
        if feature["name"] != "run":
            return feature
        return {**feature, "run_dir": str(folder / Path(feature["run_dir"]).name)}

    return changed_features(name, moved)


def train_all(folder: Path, names: Sequence[str], world_size: int, overrides) -> Path:
    """Configs, trained on so many ranks with 0, 1 or 2 workers each."""
    folder.mkdir()
    jobs = []
    for name in names:  # encoders come before generators
        workers = f"data.num_workers={world_size // 2}"
        options = [*curve_of(name)[1], workers, *features_of_runs(name, folder)]
        jobs.append(short(name, overrides, folder / name, *options))
    codes = run_ranks(train_each, world_size, jobs, timeout_s=600)
    assert codes == [[trainer.EXIT_DONE] * len(names)] * world_size
    return folder


def train_each(jobs: list[list[str]]) -> list[int]:
    return [trainer.train(configs.load(path, options)) for path, *options in jobs]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, overrides) -> Path:
    return train_all(tmp_path_factory.mktemp("ranks") / "1", EACH_TASK, 1, overrides)


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        pytest.param(2, EACH_TASK, id="2"),
        *(pytest.param(n, NAMES, id=f"{n}-every-config", marks=pytest.mark.slow) for n in (2, 4)),
    ],
)
def test_world_size_does_not_change_any_run(world_size, names, one_rank, tmp_path, overrides):
    if names != EACH_TASK:
        one_rank = train_all(tmp_path / "one", names, 1, overrides)
    folder = train_all(tmp_path / "runs", names, world_size, overrides)
    for name in names:
        one, several = ([row["loss"] for row in read_rows(f / name)] for f in (one_rank, folder))
        assert len(one) == curve_of(name)[0]
        assert several == pytest.approx(one, rel=1e-4), name
        assert global_batches(folder / name) == global_batches(one_rank / name), name


def test_rows_tell_every_term(one_rank):
    """Values add up to the loss, and each term has a gradient."""
    row = read_rows(one_rank / "digits_hybrid")[-1]
    terms = ("supervised", "reward", "contrastive")
    assert sum(row[f"loss/{term}"] for term in terms) == pytest.approx(row["loss"], rel=1e-5)
    assert all(row[f"embedding_grad_norm/{term}"] > 0 for term in terms)
    for term in terms:
        assert row[f"loss/{term}"] == pytest.approx(row[f"{term}_weight"] * row[term], rel=1e-5)
    assert {"mean_reward", "mean_baseline", "mean_entropy", "temperature"} <= row.keys()
    assert "loss/contrastive" not in read_rows(one_rank / "digits_moco")[-1]


def test_towers_are_measured_without_labels(one_rank, tmp_path, capsys):
    """Pairs often have none."""
    folder = tmp_path / "run"
    shutil.copytree(one_rank / "digits_profiles", folder)
    text = (folder / "config.yaml").read_text()
    text = text.replace("label: json.label", "label: null").replace(
        "num_classes: 10", "num_classes: null"
    )
    (folder / "config.yaml").write_text(text)
    assert main(["eval", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "image finds its partner" in table
    assert "kNN" not in table


def test_scales_are_kept_within_the_limits_of_clip(tmp_path, overrides):
    """A learnable temperature that a step has carried too far is brought back after it."""
    config = small("digits_captions", overrides, tmp_path)
    samples = batch_of(config)
    task = config.build_task(samples)
    for too_far, limit in ((9.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            task.loss.scale.log_scale.fill_(too_far)
        task.finish_step((), samples, StepContext())
        assert task.loss.scale().item() == pytest.approx(limit)


TERMS = ("supervised", "reward", "contrastive")


def trained(name: str, overrides, run_dir: Path, *more: str) -> dict[str, Tensor]:
    """Weights at the end of a short run."""
    config = small(name, overrides, run_dir, *more)
    assert trainer.train(config) == trainer.EXIT_DONE
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    return found.weights()


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_is_the_run_without_the_term(term, tmp_path, overrides):
    """Exactly: also where a schedule makes it 0, and the term is still computed."""
    short = ["train.steps=4", "data.balance=null"]
    without = trained("digits_hybrid", overrides, tmp_path / "a", *short, f"task.{term}=null")
    zero = trained("digits_hybrid", overrides, tmp_path / "b", *short, f"task.{term}.weight=0")
    held = f"task.{term}.weight=[[0, 0], [1, 0]]"
    scheduled = trained("digits_hybrid", overrides, tmp_path / "c", *short, held)
    with_it = trained("digits_hybrid", overrides, tmp_path / "d", *short, f"task.{term}.weight=1")
    for name, x in without.items():
        assert torch.equal(x, zero[name]), name
        if term != "contrastive" or not name.startswith("head."):  # decayed, though not trained
            assert torch.equal(x, scheduled[name]), name
    same = [torch.equal(x, with_it[name]) for name, x in without.items()]
    assert not all(same)
    losses = [[row["loss"] for row in read_rows(tmp_path / run)] for run in "abc"]
    assert losses[0] == losses[1] == losses[2]


def test_moco_goes_on_at_another_world_size(tmp_path, overrides):
    """One leg on one rank and one on two leave the queue of a single leg on one rank."""
    short = ["train.steps=5", "task.queue_size=192", "optim.warmup_steps=20"]
    whole = trained("digits_moco", overrides, tmp_path / "whole", *short)
    legs = small("digits_moco", overrides, tmp_path / "legs", *short)
    assert trainer.train(legs, stop_after=3) == trainer.EXIT_REQUEUE
    left = checkpoint.newest(tmp_path / "legs" / "checkpoints").weights()
    options = overrides(tmp_path / "legs", *short)
    done = run_forked("train", CONFIGS / "digits_moco.yaml", *options, number=2)
    assert done.returncode == 0, done.stderr
    found = checkpoint.newest(tmp_path / "legs" / "checkpoints").weights()
    assert int(found["num_queued"]) == int(whole["num_queued"]) == 5 * 64
    # Steps 4 and 5 took the places of steps 1 and 2; step 3 stays as the first leg left it.
    assert torch.equal(found["queue"][128:], left["queue"][128:])
    assert not torch.equal(found["queue"][:64], left["queue"][:64])
    assert torch.equal(left["queue"], torch.cat([left["queue"][:128], whole["queue"][128:]]))
    torch.testing.assert_close(found["queue"], whole["queue"], rtol=1e-4, atol=1e-6)
    for name, x in whole.items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-5, msg=name)


def test_the_documented_task_works(overrides, tmp_path):
    """It is two_view in short."""
    blocks = re.findall(r"```python\n(.*?)```", TASKS.read_text(), re.DOTALL)
    code = next(block for block in blocks if "(ContrastiveTask)" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {"ContrastiveTask": ContrastiveTask, "PositiveInt": PositiveInt}
    exec(code, names)
    config = small("digits_encoder", overrides, tmp_path)
    samples = batch_of(config)
    data = DataInfo(samples, None, config.seed)
    losses = []
    for make in (names["Twins"], TwoView):
        torch.manual_seed(0)
        settings = config.task.model_dump(exclude={"crops"} if make is not TwoView else set())
        task = make(make.Config.model_validate(settings), data)
        context = task.begin_step(samples)
        embeddings = task(*task.inputs(samples, context))
        losses.append(task.compare(embeddings, samples, context)["contrastive"])
    assert torch.equal(*losses)
