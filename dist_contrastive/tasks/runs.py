"""Trained tasks from run directories."""

from pathlib import Path

from torch import nn

from dist_contrastive import checkpoint, config
from dist_contrastive.config import TwoViewSettings
from dist_contrastive.errors import ConfigError
from dist_contrastive.tasks.base import Task
from dist_contrastive.tasks.two_view import TwoView


def load_weights(task: Task, run_dir: Path) -> None:
    """Put the weights of a run's newest checkpoint into the task."""
    found = checkpoint.newest(run_dir / "checkpoints")
    if found is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train it first")
    task.load_state_dict(found.weights())


def load_encoder(run_dir: Path, image_shape: tuple[int, int, int]) -> nn.Module:
    """The encoder (without head) that a two-view run trained, for images of the given shape."""
    run = config.load_run(run_dir)
    if not isinstance(run.task, TwoViewSettings):
        raise ConfigError(
            f"{run_dir} is a run of task {run.task.name!r}; features need a two_view run"
        )
    task = TwoView(run.task, image_shape, run.seed)
    load_weights(task, run_dir)
    return task.encoder
