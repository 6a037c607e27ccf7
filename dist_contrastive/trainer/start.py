"""Opening a run: its data, its task, and the newest checkpoint if there is one."""

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import dist_contrastive
from dist_contrastive import checkpoint, collectives, optim
from dist_contrastive import config as configs
from dist_contrastive.atomic import write_text
from dist_contrastive.backend import Backend, Engine
from dist_contrastive.checkpoint import Checkpoint, Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.errors import ConfigError
from dist_contrastive.metrics import Clock
from dist_contrastive.tasks import Task, build_task
from dist_contrastive.trainer.data import TrainingData, open_data
from dist_contrastive.trainer.data_record import check_record, write_record


@dataclass
class Run:
    """A run in progress on this rank."""

    config: RunConfig
    backend: Backend
    task: Task
    engine: Engine
    data: TrainingData
    progress: Progress
    saved: Progress  # that of the newest checkpoint
    clock: Clock

    def say(self, text: str) -> None:
        """A line for whoever watches, from the first rank."""
        if self.backend.is_main:
            say(text)


def say(text: str) -> None:
    """A line for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def start(config: RunConfig, backend: Backend) -> Run:
    """Open everything; what is wrong on one rank is raised on all."""
    with collectives.raised_together():
        resumed = _find_checkpoint(config, backend.is_main)
    seen = collectives.gather_objects(None if resumed is None else resumed.progress)
    if any(progress != seen[0] for progress in seen):
        raise ConfigError(
            f"ranks see different checkpoints in {config.run_dir} ({seen}); put run_dir on a file "
            f"system that all ranks share"
        )
    progress = resumed.progress if resumed else Progress()
    with collectives.raised_together():
        indexes = config.data.open_train()
        if resumed:
            check_record(config, indexes)
    data = open_data(config, progress, backend.rank, backend.world_size, indexes)
    with collectives.raised_together():
        task = build_task(config, data.example)
        optimizer = optim.build_optimizer(task, config.optim)
        if resumed:
            _load(task, resumed)
        if backend.is_main:
            _describe(config, backend, indexes)
    engine = backend.engine(task, optimizer, config.optim.clip_norm)
    if resumed:
        engine.load_optimizer_state(resumed.optimizer_state())
    clock = Clock(progress.consumed, backend.device)
    return Run(config, backend, task, engine, data, progress, progress, clock)


def _find_checkpoint(config: RunConfig, is_main: bool) -> Checkpoint | None:
    """The newest checkpoint of this run directory, which must be of the same config."""
    found = checkpoint.newest(config.run_dir / "checkpoints", say if is_main else lambda _: None)
    if found is None:
        return None
    changed = configs.differences(configs.load_run(config.run_dir), config)
    if changed:
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings ({'; '.join(changed[:3])}); choose "
            f"another run_dir, or delete that one to start over"
        )
    return found


def _load(task: Task, resumed: Checkpoint) -> None:
    mine, its = task.state_dict(), resumed.weights()
    problems = [f"it has no {name}" for name in mine.keys() - its.keys()]
    problems += [f"the task has no {name}" for name in its.keys() - mine.keys()]
    problems += [
        f"{name} is {list(its[name].shape)}, and the task's {list(mine[name].shape)}"
        for name in mine.keys() & its.keys()
        if its[name].shape != mine[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(
            f"{resumed.folder} is a checkpoint of another model: {'; '.join(problems[:3])}{more}; "
            f"train in another run_dir, or with the version and config that it was written by"
        )
    task.load_state_dict(its)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """What cannot be written inside is a matter of the run directory.

    Raises:
        ConfigError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run_dir={path} cannot be written ({error.strerror}); choose another folder, or make "
            f"room"
        ) from error


def _describe(config: RunConfig, backend: Backend, indexes: list[ShardIndex]) -> None:
    """What the run is, written into its directory."""
    environment = {
        "dist_contrastive": dist_contrastive.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.node(),
        "device": str(backend.device),
        "world_size": backend.world_size,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(environment, indent=1) + "\n"
    with writable(config.run_dir):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        configs.save(config, config.run_dir)
        write_record(config, indexes)
        write_text(config.run_dir / "environment.json", text)
