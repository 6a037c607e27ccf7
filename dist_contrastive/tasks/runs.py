"""Trained tasks from run directories."""

from pathlib import Path

from torch import nn

from dist_contrastive import checkpoint, config
from dist_contrastive.checkpoint import Checkpoint
from dist_contrastive.config import DriftSettings
from dist_contrastive.errors import ConfigError
from dist_contrastive.models import build_encoder
from dist_contrastive.tasks.base import Task
from dist_contrastive.tasks.images import seen_shape


def load_weights(task: Task, run_dir: Path) -> None:
    """Put the weights of a run's newest checkpoint into the task."""
    task.load_state_dict(_newest(run_dir).weights())


def load_encoder(run_dir: Path, image_shape: tuple[int, int, int]) -> nn.Module:
    """The encoder of images (without head) that a run trained, for images of the given shape."""
    settings = config.load_run(run_dir).task
    if isinstance(settings, DriftSettings):
        raise ConfigError(
            f"{run_dir} is a run of task {settings.name!r}, which trains no encoder; features need "
            f"a run of another task, as two_view"
        )
    encoder = build_encoder(settings.encoder, seen_shape(image_shape, settings.views))
    prefix = "encoder."
    weights = _newest(run_dir).weights()
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"the encoder of {run_dir} does not fit images of shape {image_shape} (channels, "
            f"height, width); use a run that trained on such images"
        ) from error
    return encoder


def _newest(run_dir: Path) -> Checkpoint:
    found = checkpoint.newest(run_dir / "checkpoints")
    if found is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train it first")
    return found
