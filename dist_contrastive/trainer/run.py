"""Run in progress on this rank, and how it is opened: data, task, the newest checkpoint."""

import copy
import logging
from dataclasses import dataclass

from torch import nn

from dist_contrastive import checkpoint, collectives, optim
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend, Engine
from dist_contrastive.checkpoint import Checkpoint, Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.record import check_record
from dist_contrastive.data.source import Source
from dist_contrastive.data.training import TrainingData, open_data
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.metrics import Clock
from dist_contrastive.models import check_row_independent
from dist_contrastive.tasks import Task
from dist_contrastive.trainer.run_dir import check_modules

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnModules:
    """Modules given from Python in the place of those that the config names.

    Raises:
        ConfigError: they are no modules.
    """

    model: nn.Module | None = None
    loss: PairLoss | None = None

    def __post_init__(self) -> None:
        for argument, module in (("model", self.model), ("loss", self.loss)):
            if module is not None and not isinstance(module, nn.Module):
                raise ConfigError(
                    f"{argument}={module!r} is no torch.nn.Module; pass a module, or leave it out "
                    f"for that of the config"
                )

    def names(self) -> dict[str, str]:
        """Class name of each module that was given."""
        modules = {"model": self.model, "loss": self.loss}
        return {
            argument: type(module).__qualname__
            for argument, module in modules.items()
            if module is not None
        }

    def task(self, config: RunConfig, data: TrainingData) -> Task:
        """Task of the config with these modules."""
        return config.build_task(data.example, self.model, self.loss)


@dataclass
class Run:
    """A run in progress on this rank."""

    config: RunConfig
    backend: Backend
    task: Task
    engine: Engine
    data: TrainingData
    progress: Progress
    saved: Progress  # of the newest checkpoint
    clock: Clock
    modules: OwnModules  # as they were given, before the engine changed those of the task

    def info(self, message: str) -> None:
        """Log a message, on the first rank."""
        if self.backend.is_main:
            _log.info(message)

    def warning(self, message: str) -> None:
        """Log a warning, on the first rank."""
        if self.backend.is_main:
            _log.warning(message)

    def fresh_task(self) -> Task:
        """Another task of the same architecture, which no engine has changed."""
        return copy.deepcopy(self.modules).task(self.config, self.data)


def open_run(config: RunConfig, backend: Backend, modules: OwnModules | None = None) -> Run:
    """Run from the newest checkpoint in its directory, or from the start; nothing is written.

    Raises:
        ConfigError, DataError: on every rank.

    Collectives: gathers of objects, and what the engine does to share its parameters.
    """
    modules = modules or OwnModules()
    with collectives.raised_together():
        resumed = _find_checkpoint(config, modules, backend.is_main)
    positions = collectives.gather_objects(None if resumed is None else resumed.progress)
    if any(position != positions[0] for position in positions):
        raise ConfigError(
            f"ranks see different checkpoints in {config.run_dir} ({positions}); put run_dir on a "
            f"file system that all ranks share"
        )
    progress = resumed.progress if resumed else Progress()
    with collectives.raised_together():
        sources = config.data.open_train()
        if resumed:
            check_record(config.run_dir, config.data, sources)
    data = open_training_data(config, progress.consumed, backend.rank, backend.world_size, sources)
    unchanged = copy.deepcopy(modules)
    with collectives.raised_together():
        task = modules.task(config, data)
        _check_row_independent(task, config, backend.world_size)
        optimizer = optim.build_optimizer(task, config.optim)
        if resumed:
            _load_weights(task, resumed)
    engine = backend.engine(task, optimizer, config.optim.clip_norm)
    if resumed:
        engine.load_optimizer_state(resumed.optimizer_state())
    clock = Clock(progress.consumed, backend.device)
    return Run(config, backend, task, engine, data, progress, progress, clock, unchanged)


def open_training_data(
    config: RunConfig,
    consumed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sources: list[Source] | None = None,
) -> TrainingData:
    """The data of a run's config, as its task needs it."""
    return open_data(
        config.data,
        seed=config.seed,
        uses_labels=config.task.uses_labels,
        labels_required=config.task.labels_required,
        consumed=consumed,
        rank=rank,
        world_size=world_size,
        sources=sources,
    )


def _find_checkpoint(config: RunConfig, modules: OwnModules, is_main: bool) -> Checkpoint | None:
    """Newest checkpoint of this run directory, which must be of the same config."""
    root = config.run_dir / "checkpoints"
    resumed = checkpoint.newest(root, _log.warning if is_main else lambda _: None)
    if resumed is None:
        return None
    changed = configs.differences(configs.load_run(config.run_dir), config)
    if changed:
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings ({'; '.join(changed[:3])}); choose "
            f"another run_dir, or delete that one to start over"
        )
    check_modules(config.run_dir, modules.names())
    return resumed


def _check_row_independent(task: Task, config: RunConfig, world_size: int) -> None:
    """Statistics of a part of the batch would make a run depend on its parts."""
    parts = [f"on {world_size} ranks"] if world_size > 1 else []
    if config.train.micro_batch_size is not None:
        parts.append(f"with train.micro_batch_size={config.train.micro_batch_size}")
    if parts:
        check_row_independent(task, f"{' and '.join(parts)} those are of a part of it")


def _load_weights(task: Task, resumed: Checkpoint) -> None:
    expected, weights = task.state_dict(), resumed.weights()
    problems = [f"it has no {name}" for name in expected.keys() - weights.keys()]
    problems += [f"the task has no {name}" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} is {list(weights[name].shape)}, and the task's {list(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(
            f"{resumed.folder} is a checkpoint of another model: {'; '.join(problems[:3])}{more}; "
            f"train in another run_dir, or with the version and config that it was written by"
        )
    task.load_state_dict(weights)
