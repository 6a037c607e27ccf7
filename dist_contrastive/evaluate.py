"""Evaluation of trained runs on held-out data.

Every number stands beside a reference: the same measure of raw pixels, or of training data in the
place of generated samples.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dist_contrastive import atomic, metrics, report, tables
from dist_contrastive import config as configs
from dist_contrastive.backend import compute_device
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.training import first_sample
from dist_contrastive.errors import ConfigError, UserError
from dist_contrastive.evaluation.encoders import encode, measure_encoder
from dist_contrastive.evaluation.generators import measure_generator
from dist_contrastive.evaluation.measure import measure_own
from dist_contrastive.evaluation.splits import (
    Encoded,
    EvalOptions,
    OpenSplits,
    Rows,
    Split,
    Splits,
    Table,
    labels_of,
    open_splits,
    with_labels,
)
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import Drift, ImageTask, Paired

GENERATED_PER_HELD_OUT = 4


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


def evaluate_runs(
    runs: list[Path], is_trusted: bool = False, options: EvalOptions | None = None
) -> Iterator[Measurement | LeftOut]:
    """Measurements of each run; writes RUN/eval.json, measure by measure, and pictures in
    RUN/plots. What cannot be measured is left out.

    Args:
        is_trusted: the code that their configs name may run, wherever these come from.
        options: what of it is wanted; None: all.

    Raises:
        UserError: runs of which nothing can be measured, after all others.
    """
    errors: list[UserError] = []
    for run in runs:
        try:
            yield from _evaluate(run, is_trusted, options or EvalOptions())
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


def read_splits(config: RunConfig, table: Table | None = None) -> Splits[Samples]:
    """All samples of data.train and data.test that can be used; they must fit in memory.

    Args:
        table: that tells which are left out, and limits them.

    Raises:
        ConfigError: there is no data.test. DataError: one of the two has no sample.
    """
    opened = _open_splits(config, table)
    train, test = (
        _name_left_out(split, split.samples(), table) for split in (opened.train, opened.test)
    )
    return Splits(train, test, opened.classes)


def _open_splits(config: RunConfig, table: Table | None) -> OpenSplits:
    limit = table.options.limit if table is not None else None
    left_out = table.left_out if table is not None and _is_paired(config) else None
    return open_splits(config.data, config.fields, limit, left_out)


def _is_paired(config: RunConfig) -> bool:
    return isinstance(config.task, Paired.Config)


def _name_left_out(split: Split, read: tuple[Rows, list[str]], table: Table | None) -> Rows:
    """What was read, when the table tells what could not be."""
    samples, reasons = read
    if reasons and table is not None:
        of = len(samples.index) + len(reasons)
        reason = f"{len(reasons)} of {of} cannot be used; the first: {reasons[0]}"
        table.left_out.append((f"samples of {split.what}", reason))
    return samples


def _evaluate(run: Path, is_trusted: bool, options: EvalOptions) -> Iterator[Measurement | LeftOut]:
    """What could be measured comes before the error that ended it."""
    table = Table(partial(_write_table, run), options)
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
    opened, splits = _open_splits(config, table), None
    example = first_sample(opened.train.fields, opened.train.source, len(opened.train.source))
    task = config.build_task(example).eval().to(compute_device(config.backend))
    if isinstance(task, Drift):
        splits = read_splits(config, table)
        _measure_drift(task, config, splits, table)
    else:
        load_weights(task, run)
        if isinstance(task, ImageTask):
            measure_encoder(task, _encoded(task, opened, table), run, table)
    if config.evaluate.measures and table.wants("own"):
        splits = splits or read_splits(config)
        measure_own(config.evaluate, task.cpu(), splits, table)
    if not table.lines:
        why = "; ".join(f"{what}: {reason}" for what, reason in table.left_out)
        raise ConfigError(
            why
            or f"eval has no measure of the task {config.task.name}; name some in evaluate.measures"
        )
    _draw_curves(run)


def _encoded(task: ImageTask, opened: OpenSplits, table: Table) -> Splits[Encoded]:
    train, test = (
        _name_left_out(split, split.encoded(partial(encode, task), table.options.baselines), table)
        for split in (opened.train, opened.test)
    )
    return Splits(train, test, opened.classes)


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


def _measure_drift(task: Drift, config: RunConfig, splits: Splits[Samples], table: Table) -> None:
    """Lines of a generator, beside itself as initialised; loads its weights."""
    train, test = (list(x.images.shape[1:]) for x in (splits.train, splits.test))
    if train != test:
        raise ConfigError(
            f"samples of data.train have the shape {train} and those of data.test {test}, which do "
            f"not fit together; set data.image_size and data.image_channels, or hold out others"
        )
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
