"""Trained runs: measured on held-out data, and sampled from.

Every number of an evaluation stands beside a reference: the same measure of raw pixels, or of
training data in the place of generated samples.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_contrastive import atomic, checkpoint, metrics, report, tables
from dist_contrastive import config as configs
from dist_contrastive.backend import compute_device
from dist_contrastive.checkpoint import WEIGHTS, Checkpoint
from dist_contrastive.config import KeepBestSettings, RunConfig
from dist_contrastive.data.fields import Fields
from dist_contrastive.data.labels import refuse_other_classes, with_class_names
from dist_contrastive.data.places import place_of_label
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import join_sources
from dist_contrastive.data.training import first_sample
from dist_contrastive.errors import ConfigError, UserError
from dist_contrastive.evaluation.encoders import measure_encoder
from dist_contrastive.evaluation.generators import measure_generator
from dist_contrastive.evaluation.measure import measure_own
from dist_contrastive.evaluation.splits import (
    Splits,
    Table,
    labels_of,
    usable_samples,
    with_labels,
)
from dist_contrastive.records import write_sums
from dist_contrastive.tasks import Drift, ImageTask, Paired, Task

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


@dataclass(frozen=True)
class LeftOut:
    """What an evaluation could not measure, or measured without."""

    run: str
    what: str
    reason: str


def evaluate_runs(runs: list[Path], is_trusted: bool = False) -> Iterator[Measurement | LeftOut]:
    """Measurements of each run; writes RUN/eval.json, measure by measure, and pictures in
    RUN/plots. What cannot be measured is left out.

    Args:
        is_trusted: the code that their configs name may run, wherever these come from.

    Raises:
        UserError: runs of which nothing can be measured, after all others.
    """
    errors: list[UserError] = []
    for run in runs:
        try:
            yield from _evaluate(run, is_trusted)
        except UserError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("; ".join(map(str, errors)))


def print_table(results: Iterable[Measurement | LeftOut]) -> None:
    """One table of all measurements on stdout, what was left out, the folders of the pictures; also
    of what came before an error."""
    found: list[Measurement | LeftOut] = []
    try:
        found.extend(results)
    finally:
        if found:
            _print_results(found)


def _print_results(found: list[Measurement | LeftOut]) -> None:
    rows = []
    for m in (m for m in found if isinstance(m, Measurement)):
        beside = ", ".join(f"{name} {value:.4f}" for name, value in m.beside.items())
        rows.append((m.run, m.name, f"{m.value:.4f}", beside))
    tables.print_table(("run", "measure", "value", "to compare with"), rows)
    for one in (m for m in found if isinstance(m, LeftOut)):
        print(f"left out of {one.run}: {one.what}: {one.reason}")
    for run in dict.fromkeys(m.run for m in found):
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


def read_splits(config: RunConfig, table: Table | None = None) -> Splits:
    """All samples of data.train and data.test that can be used; they must fit in memory.

    Args:
        table: that tells which are left out.

    Raises:
        ConfigError: there is no data.test. DataError: one of the two has no sample.
    """
    if config.data.test is None:
        raise ConfigError("eval needs data.test, a folder of held-out shards; set it for the run")
    opened = {"train": config.data.open_train(), "test": config.data.open_test()}
    refuse_other_classes(config.data.label, [*opened["train"], *opened["test"]])
    indexes = {name: join_sources(sources) for name, sources in opened.items()}
    fields, samples = with_class_names(config.fields, indexes["train"]), []
    if isinstance(config.task, Paired.Config) and table is not None:
        fields = _labels_that_are_there(fields, indexes, table)
    for name, index in indexes.items():
        usable, reasons = usable_samples(fields, index, f"data.{name}")
        samples.append(usable)
        if reasons and table is not None:
            reason = f"{len(reasons)} of {len(index)} cannot be used; the first: {reasons[0]}"
            table.left_out.append((f"samples of data.{name}", reason))
    return Splits(samples[0], samples[1], fields.class_names(indexes["train"]))


def _labels_that_are_there(fields: Fields, indexes: Mapping[str, Source], table: Table) -> Fields:
    """Without labels where a split has none; partners find each other all the same."""
    place = None if fields.label is None else place_of_label(fields.label)[0]
    without = [f"data.{n}" for n, x in indexes.items() if place and not x.has_field(place)]
    if not without:
        return fields
    reason = f"samples of {' and '.join(without)} have no field {place!r}"
    table.left_out.append(("what goes by labels", reason))
    return fields.model_copy(update={"label": None})


def _evaluate(run: Path, is_trusted: bool) -> Iterator[Measurement | LeftOut]:
    """What could be measured comes before the error that ended it."""
    table = Table(partial(_write_table, run))
    try:
        _measure(run, table, is_trusted)
    except Exception:
        yield from _results(run, table)
        raise
    yield from _results(run, table)


def _results(run: Path, table: Table) -> Iterator[Measurement | LeftOut]:
    yield from (Measurement(str(run), *line) for line in table.lines)
    if table.lines:
        yield from (LeftOut(str(run), *one) for one in table.left_out)


def _measure(run: Path, table: Table, is_trusted: bool) -> None:
    config = configs.load_run(run, is_trusted=is_trusted)
    if not os.access(run, os.W_OK):
        raise _not_writable(run, "it may only be read")
    splits = read_splits(config, table)
    task = config.build_task(splits.train).eval().to(compute_device(config.backend))
    _check_shapes(task, splits)
    if isinstance(task, Drift):
        _measure_drift(task, config, splits, table)
    else:
        load_weights(task, run)
        if isinstance(task, ImageTask):
            measure_encoder(task, splits, run, table)
    measure_own(config.evaluate, task.cpu(), splits, table)
    if not table.lines:
        why = "; ".join(f"{what}: {reason}" for what, reason in table.left_out)
        raise ConfigError(
            why
            or f"eval has no measure of the task {config.task.name}; name some in evaluate.measures"
        )
    _draw_curves(run)


def _check_shapes(task: Task, splits: Splits) -> None:
    """Refuse held-out samples that neither an encoder can read nor a generator be compared with."""
    train, test = (list(x.images.shape[1:]) for x in (splits.train, splits.test))
    if train == test or not isinstance(task, ImageTask | Drift):
        return
    if isinstance(task, ImageTask):
        with contextlib.suppress(RuntimeError, ValueError):
            task.represent(splits.test.images[:1])
            return
    raise ConfigError(
        f"samples of data.train have the shape {train} and those of data.test {test}, which do not "
        f"fit together; set data.image_size and data.image_channels, or hold out others"
    )


def _write_table(run: Path, table: Table) -> None:
    lines = [asdict(Measurement(str(run), *line)) for line in table.lines]
    try:
        atomic.write_text(run / "eval.json", json.dumps(lines, indent=1) + "\n")
    except OSError as error:
        raise _not_writable(run, error.strerror) from error


def _not_writable(run: Path, reason: str | None) -> ConfigError:
    return ConfigError(
        f"{run}, which keeps what eval measures, cannot be written ({reason}); make room, or copy "
        f"the run to a folder of your own"
    )


def _measure_drift(task: Drift, config: RunConfig, splits: Splits, table: Table) -> None:
    """Lines of a generator, beside itself as initialised; loads its weights."""
    labels, count = None, len(splits.test.images) * GENERATED_PER_HELD_OUT
    if config.data.num_classes is not None:
        splits = with_labels(splits, table)
        labels = labels_of(splits.test).repeat(GENERATED_PER_HELD_OUT)
        count = len(labels)
    before = task.generate(labels, count, seed=0)
    load_weights(task, config.run_dir)
    measure_generator(task, before, labels, splits, config.run_dir, table)


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
