"""Every task with its config: the gradient contract, and the same run on any number of ranks."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS, run
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive import config as configs
from dist_contrastive.config import RunConfig
from dist_contrastive.data import ShardIndex
from dist_contrastive.data.fields import Samples
from dist_contrastive.metrics import read_rows
from dist_contrastive.tasks import Moco, Task, build_task
from dist_contrastive.testing import run_ranks

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
ROWS = 24
SPLITS = {1: [24], 2: [9, 15], 3: [4, 0, 20], 4: [6, 6, 6, 6]}


class Step(NamedTuple):
    """What one step leaves: the terms, the gradient that the optimiser sees, and the state."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def small(name: str, overrides, run_dir: Path, *more: str) -> RunConfig:
    pixels = ["task.features=[{name: pixels}]"] if name == "digits_generator" else []
    return configs.load(CONFIGS / f"{name}.yaml", overrides(run_dir, *pixels, *more))


def batch_of(config: RunConfig) -> Samples:
    """Real digits; where labels take part some are missing."""
    samples = config.fields.read(ShardIndex.load(config.data.train), range(ROWS))
    if config.task.uses_labels:
        samples.labels[2::5] = -1 if config.data.num_classes else torch.nan
    return samples


def prepared(config: RunConfig, example: Samples) -> Task:
    """The task in fp64, in the middle of a run, with some keys queued."""
    task = build_task(config, example).double()
    task.progress = 0.4
    if isinstance(task, Moco):
        torch.manual_seed(3)
        task.queue.normal_()
        task.num_queued += len(task.queue) // 2
    return task


def step_of(config: RunConfig, rows: slice) -> Step:
    samples = batch_of(config)
    task = prepared(config, samples)
    samples = samples.rows(torch.arange(ROWS)[rows])
    inputs = [x.double() if x.is_floating_point() else x for x in task.inputs(samples)]
    module = DistributedDataParallel(task) if dist.is_initialized() else task
    embeddings = module(*inputs)
    terms = task.compare(embeddings, samples)
    torch.stack(list(terms.values())).sum().backward()
    task.finish_step(embeddings)
    gradients = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    found = {name: term.detach() for name, term in terms.items()}
    return Step(found, gradients, dict(task.named_buffers()))


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradient_contract(world_size, all_configs, right):
    """Uneven rows, and a rank without any: terms, gradients and queues are those of one process."""
    for rank, steps in enumerate(run_ranks(steps_of, world_size, all_configs)):
        for name, found, expected in zip(NAMES, steps, right, strict=True):
            where = f"{name}, rank {rank} of {world_size}"
            for kind in ("terms", "gradients", "buffers"):
                mine, theirs = getattr(found, kind), getattr(expected, kind)
                assert mine.keys() == theirs.keys(), where
                for key, x in theirs.items():
                    scale = x.abs().max().item() or 1.0
                    error = (mine[key] - x).abs().max().item() / scale
                    assert error < 1e-9, f"{where}: {kind} {key} off by {error}"


def test_every_parameter_is_trained(right):
    """None without a gradient (DDP would wait for it), none whose gradient is 0 throughout."""
    for name, step in zip(NAMES, right, strict=True):
        for key, gradient in step.gradients.items():
            assert gradient is not None, f"{name}: {key}"
            assert gradient.abs().max() > 0, f"{name}: {key}"


# Batches as large as the configs' own, where these are: small ones of a young generator amplify
# rounding.
STEPS = ("train.steps=6", "optim.warmup_steps=20", "train.log_every=1")


def train_all(folder: Path, world_size: int, overrides) -> dict[str, list[dict]]:
    """Metrics of every config, trained on so many ranks."""
    folder.mkdir()
    jobs = folder / "jobs.jsonl"
    lines = []
    for name in NAMES:
        config = configs.load(CONFIGS / f"{name}.yaml")
        batch = f"data.global_batch_size={config.data.global_batch_size}"
        workers = f"data.num_workers={world_size // 2}"
        more = ["task.features=[{name: pixels}]"] if name == "digits_generator" else []
        options = overrides(folder / name, *STEPS, batch, workers, *more)
        lines.append(json.dumps([str(CONFIGS / f"{name}.yaml"), *options]))
    jobs.write_text("\n".join(lines) + "\n")
    script = [str(Path(__file__).with_name("train_many.py")), str(jobs)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = run([sys.executable, *launcher, *script])
    assert done.returncode == 0, done.stderr
    return {name: read_rows(folder / name) for name in NAMES}


def test_world_size_does_not_change_any_run(tmp_path, overrides):
    """1, 2 and 4 ranks, with 0, 1 and 2 workers each: the same curves."""
    runs = {n: train_all(tmp_path / str(n), n, overrides) for n in (1, 2, 4)}
    for name in NAMES:
        curves = {n: [row["loss"] for row in rows[name]] for n, rows in runs.items()}
        assert len(curves[1]) == 6
        for world_size in (2, 4):
            assert curves[world_size] == pytest.approx(curves[1], rel=1e-4), name
