"""Samples of a trained generator, written as files."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_contrastive import config as configs
from dist_contrastive import report
from dist_contrastive.errors import ConfigError
from dist_contrastive.tasks import Drift, build_task
from dist_contrastive.tasks.runs import load_weights

PER_CLASS_IN_GRID = 8
MOST_SAMPLES = 1_000_000  # they are made in memory, then written


def write_samples(
    run: Path,
    out: Path,
    count: int = 80,
    classes: list[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
) -> Path:
    """Samples of a run's newest checkpoint: OUT/sample-00000.png ... and OUT/grid.png, or of arrays
    OUT/samples.npy, and OUT/grid.png if they are points of the plane.

    Args:
        count: how many, of the classes in turn.
        classes: None: all that there are.
        guidance: strength, 1 or more; above 1 only of runs that trained with guidance.
        seed: the same gives the same samples.

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
    config = configs.load_run(run)
    example = config.fields.read(config.data.open_train()[0], [0])
    task = build_task(config, example).eval()
    if not isinstance(task, Drift):
        raise ConfigError(
            f"{run} is a run of task {config.task.name!r}, which trains no generator; sample a run "
            f"of task drift"
        )
    load_weights(task, run)
    labels = _labels(config.data.num_classes, classes, count)
    made = task.generate(labels, count, seed, guidance)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _write(made, labels, out, str(run))
    except OSError as error:
        raise ConfigError(
            f"samples cannot be written to {out} ({error.strerror}); choose another folder"
        ) from error


def _write(made: Tensor, labels: Tensor | None, out: Path, title: str) -> Path:
    grid = out / "grid.png"
    if not report.are_images(made):
        np.save(out / "samples.npy", made.numpy())
        if made[0].numel() != 2:
            return out / "samples.npy"
        report.point_clouds({"generated": made.flatten(1)}, grid, title)
        return grid
    for number, image in enumerate(made):
        name = f"sample-{number:05d}" + ("" if labels is None else f"-class-{labels[number]}")
        _image(image).save(out / f"{name}.png")
    shown = torch.zeros(len(made), dtype=torch.int64) if labels is None else labels
    report.sample_grid(made, shown, path=grid, per_class=PER_CLASS_IN_GRID, title=title)
    return grid


def _labels(num_classes: int | None, classes: list[int] | None, count: int) -> Tensor | None:
    if num_classes is None:
        if classes:
            raise ConfigError(f"classes={classes}, but this generator was trained without classes")
        return None
    chosen = classes or list(range(num_classes))
    wrong = [c for c in chosen if not 0 <= c < num_classes]
    if wrong:
        raise ConfigError(f"classes {wrong} are not among 0 ... {num_classes - 1}; choose of these")
    return torch.tensor(chosen).repeat(-(-count // len(chosen)))[:count]


def _image(image: Tensor) -> Image.Image:
    """[C, H, W] in [0, 1], C 1 or 3."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
