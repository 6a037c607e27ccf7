"""Opening a run: its data, its task, and the newest checkpoint if there is one."""

import sys
from dataclasses import dataclass

from dist_contrastive import checkpoint, collectives, optim
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend, Engine
from dist_contrastive.checkpoint import Checkpoint, Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.record import check_record
from dist_contrastive.data.training import TrainingData, open_data
from dist_contrastive.errors import ConfigError
from dist_contrastive.metrics import Clock
from dist_contrastive.models import check_row_independent
from dist_contrastive.tasks import Task, build_task


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
    """Open everything, and write nothing; what is wrong on one rank is raised on all."""
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
        sources = config.data.open_train()
        if resumed:
            check_record(config.run_dir, config.data, sources)
    data = open_data(
        config.data,
        seed=config.seed,
        uses_labels=config.task.uses_labels,
        labels_required=config.task.labels_required,
        consumed=progress.consumed,
        rank=backend.rank,
        world_size=backend.world_size,
        sources=sources,
    )
    with collectives.raised_together():
        task = build_task(config, data.example)
        _check_rows_alone(task, config, backend.world_size)
        optimizer = optim.build_optimizer(task, config.optim)
        if resumed:
            _load(task, resumed)
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


def _check_rows_alone(task: Task, config: RunConfig, world_size: int) -> None:
    """Statistics of a part of the batch would make a run depend on its parts."""
    parts = [f"on {world_size} ranks"] if world_size > 1 else []
    if config.train.micro_batch_size is not None:
        parts.append(f"with train.micro_batch_size={config.train.micro_batch_size}")
    if parts:
        check_row_independent(task, f"{' and '.join(parts)} those are of a part of it")


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
