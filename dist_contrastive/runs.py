"""Trained runs: their weights, exported, and samples of their generators."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_contrastive import checkpoint, report
from dist_contrastive import config as configs
from dist_contrastive.backend import compute_device
from dist_contrastive.checkpoint import WEIGHTS, Checkpoint
from dist_contrastive.config import KeepBestSettings
from dist_contrastive.data.labels import with_class_names
from dist_contrastive.data.sources import join_sources
from dist_contrastive.data.training import first_sample
from dist_contrastive.errors import ConfigError, retired
from dist_contrastive.records import write_sums
from dist_contrastive.tasks import Drift, ImageTask, Task

__getattr__ = retired(
    __name__,
    {
        "Measurement": "dist_contrastive.evaluate.Measurement",
        "evaluate_runs": "dist_contrastive.evaluate.evaluate_runs",
        "print_table": "dist_contrastive.evaluate.print_table",
        "read_splits": "dist_contrastive.evaluate.read_splits",
    },
)

PER_CLASS_IN_GRID = 8
MOST_SAMPLES = 1_000_000  # they are made in memory, then written


def load_weights(task: Task, run_dir: Path, weights: Literal["live", "ema"] = "live") -> None:
    """Put the weights of a run's newest checkpoint, or those exported, into the task.

    Args:
        weights: ema: an encoder is its moving average from then on.

    Raises:
        ConfigError: they are those of other modules than the config names; or there is no average.
    """
    try:
        task.load_state_dict(checkpoint.run_weights(run_dir))
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{run_dir} holds weights of other modules than its config names ({problem} ...); if "
            f"train() was given modules from Python, load the weights and measure them there"
        ) from error
    if weights == "ema" and isinstance(task, ImageTask):
        task.use_averages()


def export(run_dir: Path, folder: Path, which: str, is_trusted: bool = False) -> Checkpoint:
    """Write the weights of a checkpoint and the config: what `eval`, `sample` and features need;
    and their checksums.

    Args:
        which: "newest", or "best" by `train.keep_best`.
        is_trusted: as of `evaluate_runs`.

    Raises:
        ConfigError: there is no such checkpoint, or the folder cannot be written.
    """
    config = configs.load_run(run_dir, is_trusted=is_trusted)
    if which == "newest":
        exported = checkpoint.run_newest(run_dir)
    else:
        exported = _best(run_dir, config.train.keep_best)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(folder / WEIGHTS, exported.weights())
        configs.save(configs.absolute(config), folder)
        write_sums(folder, [WEIGHTS, "config.yaml"])
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}); choose another --out") from error
    return exported


def _best(run_dir: Path, best: KeepBestSettings | None) -> Checkpoint:
    if best is None:
        raise ConfigError(f"{run_dir} kept no best checkpoint; set train.keep_best for that")
    kept = checkpoint.best(run_dir / "checkpoints", best.mode)
    if kept is None:
        raise ConfigError(f"{run_dir} has no checkpoint with a {best.metric} yet; train it first")
    return kept


def write_samples(
    run: Path,
    out: Path,
    count: int = 80,
    classes: list[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    is_trusted: bool = False,
) -> Path:
    """Samples of a run's newest checkpoint: OUT/sample-00000.png ... and OUT/grid.png, or of arrays
    OUT/samples.npy, and OUT/grid.png if they are points of the plane.

    Args:
        count: how many, of the classes in turn.
        classes: None: all that there are.
        guidance: strength, 1 or more; above 1 only of runs that trained with guidance.
        seed: the same gives the same samples.
        is_trusted: as of `evaluate_runs`.

    Returns:
        The path of the grid, or of the array if there is none.

    Raises:
        ConfigError: the run trains no generator, has no checkpoint, or not such classes; OUT cannot
            be written.
    """
    if not 1 <= count <= MOST_SAMPLES or not 1 <= guidance < math.inf:
        raise ConfigError(
            f"count={count} and guidance={guidance:g} must both be 1 or more, count up to "
            f"{MOST_SAMPLES}, guidance finite; guidance of 1 is none"
        )
    config = configs.load_run(run, is_trusted=is_trusted)
    index = join_sources(config.data.open_train())
    fields = with_class_names(config.fields, index)
    example, names = first_sample(fields, index, len(index)), fields.class_names(index)
    task = config.build_task(example).eval().to(compute_device(config.backend))
    if not isinstance(task, Drift):
        raise ConfigError(
            f"{run} is a run of task {config.task.name!r}, which trains no generator; sample a run "
            f"of task drift"
        )
    load_weights(task, run)
    labels = _classes_in_turn(config.data.num_classes, classes, count)
    samples = task.generate(labels, count, seed, guidance)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _write_files(samples, labels, names, out, str(run))
    except OSError as error:
        raise ConfigError(
            f"samples cannot be written to {out} ({error.strerror}); choose another folder"
        ) from error


def _write_files(
    samples: Tensor, labels: Tensor | None, names: Mapping[int, str], out: Path, title: str
) -> Path:
    """Path of the grid, or of the array if there is none."""
    grid = out / "grid.png"
    if not report.are_images(samples):
        np.save(_new(out / "samples.npy"), samples.numpy())
        if samples[0].numel() != 2:
            return out / "samples.npy"
        report.point_clouds({"generated": samples.flatten(1)}, grid, title)
        return grid
    for number, image in enumerate(samples):
        name = f"sample-{number:05d}" + ("" if labels is None else f"-class-{labels[number]}")
        _as_picture(image).save(_new(out / f"{name}.png"))
    rows = torch.zeros(len(samples), dtype=torch.int64) if labels is None else labels
    report.sample_grid(
        samples, rows, path=grid, per_class=PER_CLASS_IN_GRID, title=title, names=names
    )
    return grid


def _new(path: Path) -> Path:
    """A path without what was there: a file is not written through a link."""
    path.unlink(missing_ok=True)
    return path


def _classes_in_turn(
    num_classes: int | None, classes: list[int] | None, count: int
) -> Tensor | None:
    """Class of each sample [count]; None for a generator without classes."""
    if num_classes is None:
        if classes:
            raise ConfigError(f"classes={classes}, but this generator was trained without classes")
        return None
    chosen = classes or list(range(num_classes))
    wrong = [c for c in chosen if not 0 <= c < num_classes]
    if wrong:
        raise ConfigError(f"classes {wrong} are not among 0 ... {num_classes - 1}; choose of these")
    return torch.tensor(chosen).repeat(-(-count // len(chosen)))[:count]


def _as_picture(image: Tensor) -> Image.Image:
    """8-bit picture of an image [C, H, W] in [0, 1], C 1 or 3."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
