"""Trained tasks from run directories, and from what was exported of them."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from dist_contrastive import checkpoint, config
from dist_contrastive.checkpoint import WEIGHTS, Checkpoint
from dist_contrastive.config import DriftSettings, KeepBestSettings
from dist_contrastive.errors import ConfigError
from dist_contrastive.models import build_encoder
from dist_contrastive.tasks.base import Task
from dist_contrastive.tasks.images import seen_shape


def load_weights(task: Task, run_dir: Path) -> None:
    """Put the weights of a run's newest checkpoint, or those exported, into the task."""
    task.load_state_dict(_weights(run_dir))


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
    weights = _weights(run_dir)
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"the encoder of {run_dir} does not fit images of shape {image_shape} (channels, "
            f"height, width); use a run that trained on such images"
        ) from error
    return encoder


def export(run_dir: Path, folder: Path, which: str) -> Checkpoint:
    """Write the weights of a checkpoint and the config: what `eval`, `sample` and features need.

    Args:
        which: "newest", or "best" by `train.keep_best`.

    Raises:
        ConfigError: there is no such checkpoint, or the folder cannot be written.
    """
    settings = config.load_run(run_dir)
    found = _newest(run_dir) if which == "newest" else _best(run_dir, settings.train.keep_best)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(folder / WEIGHTS, found.weights())
        config.save(settings, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}); choose another --out") from error
    return found


def _weights(run_dir: Path) -> dict[str, Tensor]:
    exported = run_dir / WEIGHTS
    return load_file(exported) if exported.exists() else _newest(run_dir).weights()


def _best(run_dir: Path, best: KeepBestSettings | None) -> Checkpoint:
    if best is None:
        raise ConfigError(f"{run_dir} kept no best checkpoint; set train.keep_best for that")
    found = checkpoint.best(run_dir / "checkpoints", best.mode)
    if found is None:
        raise ConfigError(f"{run_dir} has no checkpoint with a {best.metric} yet; train it first")
    return found


def _newest(run_dir: Path) -> Checkpoint:
    found = checkpoint.newest(run_dir / "checkpoints")
    if found is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train it first")
    return found
