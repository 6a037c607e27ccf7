"""Trained runs: measured on held-out data, and sampled from.

Every number of an evaluation stands beside a reference: the same measure of raw pixels, or of
training data in the place of generated samples.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_contrastive import checkpoint, metrics, report, tables
from dist_contrastive import config as configs
from dist_contrastive.checkpoint import WEIGHTS, Checkpoint
from dist_contrastive.config import KeepBestSettings, RunConfig
from dist_contrastive.data.labels import refuse_other_classes, with_class_names
from dist_contrastive.data.sources import join_sources
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.encoders import measure_encoder
from dist_contrastive.evaluation.generators import measure_generator
from dist_contrastive.evaluation.measure import measure_own
from dist_contrastive.evaluation.splits import Line, Splits, labels_of, with_labels
from dist_contrastive.tasks import Drift, ImageTask, Task

__all__ = [
    "Measurement",
    "evaluate_runs",
    "export",
    "load_weights",
    "print_table",
    "read_splits",
    "write_samples",
]

GENERATED_PER_HELD_OUT = 4
PER_CLASS_IN_GRID = 8
MOST_SAMPLES = 1_000_000  # they are made in memory, then written


@dataclass(frozen=True)
class Measurement:
    """One line of the table of an evaluation."""

    run: str
    name: str
    value: float
    beside: dict[str, float]
    """Reference values by name."""


def evaluate_runs(runs: list[Path]) -> list[Measurement]:
    """Measurements of each run; writes RUN/eval.json and the pictures in RUN/plots."""
    return [measurement for run in runs for measurement in _evaluate(run)]


def print_table(measurements: list[Measurement]) -> None:
    """One table of all measurements on stdout, and the folders of the pictures."""
    rows = []
    for m in measurements:
        beside = ", ".join(f"{name} {value:.4f}" for name, value in m.beside.items())
        rows.append((m.run, m.name, f"{m.value:.4f}", beside))
    tables.print_table(("run", "measure", "value", "to compare with"), rows)
    for run in dict.fromkeys(m.run for m in measurements):
        print(f"pictures: {run}/plots")


def load_weights(task: Task, run_dir: Path) -> None:
    """Put the weights of a run's newest checkpoint, or those exported, into the task.

    Raises:
        ConfigError: they are those of other modules than the config names.
    """
    try:
        task.load_state_dict(checkpoint.run_weights(run_dir))
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{run_dir} holds weights of other modules than its config names ({problem} ...); if "
            f"train() was given modules from Python, load the weights and measure them there"
        ) from error


def export(run_dir: Path, folder: Path, which: str) -> Checkpoint:
    """Write the weights of a checkpoint and the config: what `eval`, `sample` and features need.

    Args:
        which: "newest", or "best" by `train.keep_best`.

    Raises:
        ConfigError: there is no such checkpoint, or the folder cannot be written.
    """
    config = configs.load_run(run_dir)
    if which == "newest":
        exported = checkpoint.run_newest(run_dir)
    else:
        exported = _best(run_dir, config.train.keep_best)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(folder / WEIGHTS, exported.weights())
        configs.save(configs.absolute(config), folder)
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


def read_splits(config: RunConfig) -> Splits:
    """All samples of data.train and data.test, which must fit in memory.

    Raises:
        ConfigError: there is no data.test.
    """
    if config.data.test is None:
        raise ConfigError("eval needs data.test, a folder of held-out shards; set it for the run")
    train, test = config.data.open_train(), config.data.open_test()
    refuse_other_classes(config.data.label, [*train, *test])
    indexes = join_sources(train), join_sources(test)
    fields = with_class_names(config.fields, indexes[0])
    samples = [fields.read(index, range(len(index))) for index in indexes]
    return Splits(samples[0], samples[1], fields.class_names(indexes[0]))


def _evaluate(run: Path) -> list[Measurement]:
    config = configs.load_run(run)
    splits = read_splits(config)
    task = config.build_task(splits.train).eval()
    if isinstance(task, Drift):
        lines = _measure_drift(task, config, splits)
    else:
        load_weights(task, run)
        lines = measure_encoder(task, splits, run) if isinstance(task, ImageTask) else []
    lines += measure_own(config.evaluate, task, splits)
    if not lines:
        raise ConfigError(
            f"eval has no measure of the task {config.task.name}; name some in evaluate.measures"
        )
    _draw_curves(run)
    measurements = [Measurement(str(run), *line) for line in lines]
    text = json.dumps([asdict(m) for m in measurements], indent=1) + "\n"
    (run / "eval.json").write_text(text)
    return measurements


def _measure_drift(task: Drift, config: RunConfig, splits: Splits) -> list[Line]:
    """Lines of a generator, beside itself as initialised; loads its weights."""
    labels, count = None, len(splits.test.images) * GENERATED_PER_HELD_OUT
    if config.data.num_classes is not None:
        splits = with_labels(splits)
        labels = labels_of(splits.test).repeat(GENERATED_PER_HELD_OUT)
        count = len(labels)
    before = task.generate(labels, count, seed=0)
    load_weights(task, config.run_dir)
    return measure_generator(task, before, labels, splits, config.run_dir)


def _draw_curves(run: Path) -> None:
    rows = metrics.read_rows(run)
    terms = sorted({name for row in rows for name in row if name.startswith("loss/")})
    fields = ("loss", *terms, "mean_reward", "lr")
    report.loss_curves(rows, run / "plots" / "loss.png", fields, title=str(run))


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
    index = join_sources(config.data.open_train())
    fields = with_class_names(config.fields, index)
    example, names = fields.read(index, [0]), fields.class_names(index)
    task = config.build_task(example).eval()
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
        np.save(out / "samples.npy", samples.numpy())
        if samples[0].numel() != 2:
            return out / "samples.npy"
        report.point_clouds({"generated": samples.flatten(1)}, grid, title)
        return grid
    for number, image in enumerate(samples):
        name = f"sample-{number:05d}" + ("" if labels is None else f"-class-{labels[number]}")
        _as_picture(image).save(out / f"{name}.png")
    rows = torch.zeros(len(samples), dtype=torch.int64) if labels is None else labels
    report.sample_grid(
        samples, rows, path=grid, per_class=PER_CLASS_IN_GRID, title=title, names=names
    )
    return grid


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
