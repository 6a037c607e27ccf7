"""Run in progress on this rank, and how it is opened: data, task, the newest checkpoint."""

import copy
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_contrastive import checkpoint, collectives, optim
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend, Engine
from dist_contrastive.changes import Settings, changes_text
from dist_contrastive.checkpoint import Checkpoint, Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.record import check_record
from dist_contrastive.data.source import Source
from dist_contrastive.data.training import TrainingData, open_data
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.metrics import Clock
from dist_contrastive.models import check_row_independent
from dist_contrastive.tasks import Drift, Task
from dist_contrastive.trainer.initial import load_initial
from dist_contrastive.trainer.online import Online
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
    online: Online
    modules: OwnModules  # as they were given, before the engine changed those of the task
    changes: Settings  # that differ from those of the run directory

    def info(self, message: str) -> None:
        """Log a message, on the first rank."""
        if self.backend.is_main:
            _log.info(message)

    def warning(self, message: str) -> None:
        """Log a warning, on the first rank."""
        if self.backend.is_main:
            _log.warning(message)

    def next_commands(self) -> str:
        """What may be done with a trained run."""
        commands = ["eval"] if self.config.data.test is not None else []
        commands += ["sample" if isinstance(self.task, Drift) else "export"]
        lines = [f"dist-contrastive {x} {shlex.quote(str(self.config.run_dir))}" for x in commands]
        return f"; next: {' or '.join(lines)}"

    def begin_step(self, is_logged: bool) -> None:
        """Start of a step; `is_logged`: its row will be written."""
        self.clock.begin_step(is_logged)
        self.online.begin_step()

    def learn_online(self, samples: Samples) -> None:
        """What learns online does so from this step; collectives as of `Online.observe`."""
        if self.online.learners:
            with self.clock.spent("online"):
                self.online.observe(samples)

    def optimizer_state(self) -> dict[str, Any]:
        """Whole state of the optimizer and of what learns online; on ranks other than the first:
        {}."""
        state = self.engine.optimizer_state()
        return {**state, "online": self.online.state()} if self.backend.is_main else {}

    def fresh_task(self) -> Task:
        """Another task of the same architecture, which no engine has changed."""
        return copy.deepcopy(self.modules).task(self.config, self.data)


def open_run(
    config: RunConfig, backend: Backend, modules: OwnModules | None = None, change: bool = False
) -> Run:
    """Run from the newest checkpoint in its directory, or from the start; nothing is written.

    Args:
        change: it may go on with other settings, those of `configs.CHANGEABLE`.

    Raises:
        ConfigError, DataError: on every rank.

    Collectives: gathers of objects, and what the engine does to share its parameters.
    """
    modules = modules or OwnModules()
    with collectives.raised_together():
        resumed = _find_checkpoint(config, modules, backend.is_main)
        warn = _log.warning if backend.is_main else lambda _: None
        step = resumed.progress.step if resumed else 0
        changes = check_changes(config, step, change, warn) if resumed else {}
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
            if "data.lanes" in changes:
                _check_lanes(config, changes["data.lanes"], progress, sum(map(len, sources)))
    data = open_training_data(config, progress.consumed, backend.rank, backend.world_size, sources)
    unchanged = copy.deepcopy(modules)
    with collectives.raised_together():
        task = modules.task(config, data)
        _check_row_independent(task, config, backend.world_size)
        fused = backend.device.type == "cuda" and not config.backend.zero_stage
        optimizer = optim.build_optimizer(task, config.optim, fused)
        if resumed:
            _load_weights(task, resumed)
        elif config.init_from is not None:
            load_initial(task, config.init_from, config.init_strict, backend.is_main)
    online = Online(task, config.evaluate.online, config.data.num_classes, backend.device)
    engine = backend.engine(task, optimizer, config.optim.clip_norm)
    if resumed:
        with collectives.raised_together():
            state = resumed.optimizer_state()
        try:
            engine.load_optimizer_state(state)
            online.load(state.get("online", {}))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{resumed.folder} holds the state of another optimizer ({type(error).__name__}: "
                f"{error}); go on from another checkpoint"
            ) from error
    clock = Clock(progress.consumed, backend.device)
    return Run(
        *(config, backend, task, engine, data, progress, progress, clock, online),
        *(unchanged, changes),
    )


def open_training_data(
    config: RunConfig,
    consumed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sources: list[Source] | None = None,
) -> TrainingData:
    """The data of a run's config, as its task needs it.

    Raises:
        ConfigError, DataError: on all ranks: it cannot be used, or leaves nothing to learn.
    """
    data = open_data(
        config.data,
        seed=config.seed,
        uses_labels=config.task.uses_labels,
        labels_required=config.task.labels_required,
        consumed=consumed,
        rank=rank,
        world_size=world_size,
        sources=sources,
    )
    if data.labels is not None:
        config.task.check_labels(data.labels)  # the same on all ranks
    return data


def _find_checkpoint(config: RunConfig, modules: OwnModules, is_main: bool) -> Checkpoint | None:
    """Newest checkpoint of this run directory, which must be of the same modules."""
    root = config.run_dir / "checkpoints"
    resumed = checkpoint.newest(root, _log.warning if is_main else lambda _: None)
    if resumed is None:
        return None
    check_modules(config.run_dir, modules.names())
    return resumed


def check_changes(
    config: RunConfig, step: int, change: bool, warn: Callable[[str], None] = lambda _: None
) -> Settings:
    """Settings that differ from those of the run directory, which may.

    A run that has done all its steps may have more without being told so.

    Args:
        step: to which it is trained.
        change: it is told so.

    Raises:
        ConfigError: one cannot change, the run was not told that it changes, or no step is left.
    """
    before, steps = configs.load_recorded(config, warn), config.train.steps
    changes = configs.changed(before, config)
    fixed = {key: pair for key, pair in changes.items() if key not in configs.CHANGEABLE}
    holds = f"{config.run_dir} holds a run with other settings ({changes_text(fixed or changes)})"
    if fixed:
        raise ConfigError(
            f"{holds}; choose another run_dir, with init_from={config.run_dir} to start from its "
            f"weights, or delete that one to start over"
        )
    if changes and steps <= step:
        raise ConfigError(
            f"{holds}, but with train.steps={steps} no step is left after step {step}, to which it "
            f"is trained; set train.steps to more than {step}"
        )
    is_longer = changes.keys() == {"train.steps"} and before.train.steps <= step < steps
    if changes and not change and not is_longer:
        raise ConfigError(
            f"{holds}; give --change (from Python change=True) to go on with these from step "
            f"{step} on, choose another run_dir, or delete that one to start over"
        )
    return changes


def _check_lanes(
    config: RunConfig, lanes: Sequence[int], progress: Progress, num_samples: int
) -> None:
    """Refuse other lanes in the middle of an epoch: some samples would come twice, others never."""
    data, (before, after) = config.data, lanes
    if data.balance is not None or data.weights is not None:
        name = "weights of sources" if data.balance is None else "data.balance"
        raise ConfigError(
            f"data.lanes: {before} -> {after} with {name}: these batches have no epochs, at whose "
            f"end alone lanes may change; set data.lanes={before}"
        )
    batch = data.global_batch_size
    epoch = num_samples // batch * batch if data.tail == "drop" else num_samples
    if progress.consumed % epoch == 0:
        return
    every = math.lcm(batch, epoch)
    step = progress.step + (-progress.consumed % every) // batch
    raise ConfigError(
        f"data.lanes: {before} -> {after} at step {progress.step}, in the middle of an epoch of "
        f"{epoch} samples: some would come twice and others never; go on with data.lanes={before} "
        f"to step {step} (train.steps={step}), the next at which an epoch ends exactly, and change "
        f"them there"
    )


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
