"""Evaluation of trained runs on held-out data.

Every number stands beside a reference: the same measure of raw pixels, or of training data in the
place of generated samples.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from dist_contrastive import atomic, collectives, metrics, ranks, report, tables
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend, compute_device
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.training import first_sample
from dist_contrastive.errors import ConfigError, UserError
from dist_contrastive.evaluation.encoded import Encoded
from dist_contrastive.evaluation.encoders import VIEWED, encode, encode_views, measure_encoder
from dist_contrastive.evaluation.generators import (
    draw_samples,
    encode_data,
    generate_encoded,
    measure_generator,
)
from dist_contrastive.evaluation.measure import measure_own
from dist_contrastive.evaluation.options import EvalOptions, held_out
from dist_contrastive.evaluation.splits import (
    OpenSplits,
    Rows,
    Split,
    Splits,
    Table,
    labels_of,
    open_splits,
    with_labels,
)
from dist_contrastive.malloc import keep_freed_memory
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import Drift, ImageTask, Paired

GENERATED_PER_HELD_OUT = 4
SHOWN = 1000  # held-out samples of pictures, where all are too many
# In which ranks wait for the one that measures; one that ends is noticed.
_PATIENCE_S = 7 * 86_400.0


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
    RUN/plots. What cannot be measured is left out. Of another split it is RUN/eval-SPLIT.json.

    Called on each rank of torchrun, or in one process. Ranks share the samples that are encoded,
    and the first one measures what all have encoded: it alone writes and has results.

    Args:
        is_trusted: the code that their configs name may run, wherever these come from.
        options: what of it is wanted; None: the usual.

    Raises:
        UserError: runs of which nothing can be measured, after all others.

    Collectives: gathers of rows and of objects.
    """
    errors: list[UserError] = []
    keep_freed_memory()
    with _all_ranks() as backend:
        for run in runs:
            try:
                yield from _evaluate(run, is_trusted, options or EvalOptions(), backend)
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


def _open_splits(config: RunConfig, table: Table | None, shared: bool = False) -> OpenSplits:
    options = table.options if table is not None else EvalOptions()
    left_out = table.left_out if table is not None and _is_paired(config) else None
    data = held_out(config.data, options.split)
    return open_splits(data, config.fields, options.limit, left_out, shared=shared)


@contextmanager
def _all_ranks() -> Iterator[Backend | None]:
    """The ranks that evaluate together; None for one process alone."""
    if not (ranks.join() and int(os.environ["WORLD_SIZE"]) > 1):
        yield None
        return
    backend = Backend(Backend.Config(timeout_s=_PATIENCE_S))
    try:
        yield backend
    finally:
        backend.close()


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


def _evaluate(
    run: Path, is_trusted: bool, options: EvalOptions, backend: Backend | None
) -> Iterator[Measurement | LeftOut]:
    """What could be measured comes before the error that ended it."""
    is_main = backend is None or backend.is_main
    table = Table(partial(_write_table, run) if is_main else lambda _: None, options)
    try:
        _measure(run, table, is_trusted, backend)
    except Exception:
        yield from _results(run, table)
        raise
    yield from _results(run, table)


def _results(run: Path, table: Table) -> Iterator[Measurement | LeftOut]:
    yield from (Measurement(str(run), *line) for line in table.lines)
    if table.lines:
        yield from (LeftOut(str(run), *one) for one in table.left_out)


def _measure(run: Path, table: Table, is_trusted: bool, backend: Backend | None) -> None:
    views = None
    with collectives.raised_together():
        config = configs.load_run(run, is_trusted=is_trusted)
        if not os.access(run, os.W_OK):
            raise _not_writable(run, "it may only be read")
        opened = _open_splits(config, table, shared=backend is not None)
        example = first_sample(opened.train.fields, opened.train.source, len(opened.train.source))
        device = compute_device(config.backend)
        if backend is not None and device.type != "cpu":
            device = backend.device
        task = config.build_task(example).eval().to(device)
        if not isinstance(task, Drift):
            load_weights(task, run, config.evaluate.weights)
    encoded = None
    if isinstance(task, ImageTask):
        encoded = _encoded(partial(encode, task), opened, table)
        if table.wants("lidar", "alignment"):
            views = _encoded_views(task, opened.test)
    elif isinstance(task, Drift):
        encoded = _encoded(partial(encode_data, task), opened, table)
    if backend is not None and not backend.is_main:
        return
    if isinstance(task, Drift) and encoded is not None:
        _measure_drift(task, config, opened, encoded, table)
    elif isinstance(task, ImageTask) and encoded is not None:
        measure_encoder(task, encoded, views, run, table)
    if config.evaluate.measures and table.wants("own"):
        measure_own(
            config.evaluate, task.cpu(), read_splits(config, Table(options=table.options)), table
        )
    if not table.lines:
        why = "; ".join(f"{what}: {reason}" for what, reason in table.left_out)
        raise ConfigError(
            why
            or f"eval has no measure of the task {config.task.name}; name some in evaluate.measures"
        )
    _draw_curves(run)


def _encoded(
    encode: Callable[[Samples], Encoded], opened: OpenSplits, table: Table
) -> Splits[Encoded]:
    train, test = (
        _name_left_out(split, split.encoded(encode, table.options.baselines), table)
        for split in (opened.train, opened.test)
    )
    return Splits(train, test, opened.classes)


def _encoded_views(task: ImageTask, test: Split) -> Encoded:
    """Views of some held-out samples, spread evenly over the split."""
    limit = VIEWED if test.limit is None else min(VIEWED, test.limit)
    return replace(test, limit=limit).encoded(partial(encode_views, task), baselines=False)[0]


def _write_table(run: Path, table: Table) -> None:
    lines = [asdict(Measurement(str(run), *line)) for line in table.lines]
    split = table.options.split
    name = "eval.json" if split is None else f"eval-{split.rstrip('/').rpartition('/')[2]}.json"
    try:
        atomic.write_text(run / name, json.dumps(lines, indent=1) + "\n")
    except OSError as error:
        raise _not_writable(run, error.strerror) from error


def _not_writable(run: Path, reason: str | None) -> ConfigError:
    return ConfigError(
        f"{run}, which keeps what eval measures, cannot be written ({reason}); make room, or copy "
        f"the run to a folder of your own"
    )


def _measure_drift(
    task: Drift, config: RunConfig, opened: OpenSplits, splits: Splits[Encoded], table: Table
) -> None:
    """Lines of a generator, beside itself as initialised; loads its weights."""
    train, test = (list(x.image_shape) for x in (splits.train, splits.test))
    if train != test:
        raise ConfigError(
            f"samples of data.train have the shape {train} and those of data.test {test}, which do "
            f"not fit together; set data.image_size and data.image_channels, or hold out others"
        )
    labels = None
    if config.data.num_classes is not None:
        splits = with_labels(splits, table)
        labels = labels_of(splits.test).repeat(GENERATED_PER_HELD_OUT)
    has_pixels = splits.train.pixels is not None and splits.test.pixels is not None
    count = len(splits.test.index) * GENERATED_PER_HELD_OUT
    generate = partial(generate_encoded, task, labels, count, has_pixels)
    before = generate()
    load_weights(task, config.run_dir)
    generated = generate()
    measure_generator(task, generated, before, splits, table)
    if table.wants("samples"):
        images, labels, samples = splits.test.pixels, splits.test.labels, generated.pixels
        if images is None or samples is None:
            shown = replace(opened.test, limit=SHOWN, rank=0, world_size=1).samples()[0]
            images, labels = shown.images, shown.labels
            samples = task.generate(labels, len(images), seed=0)
        draw_samples(task, samples, images, labels, splits.classes, config.run_dir)


def _draw_curves(run: Path) -> None:
    rows = metrics.read_rows(run)
    terms = sorted({name for row in rows for name in row if name.startswith("loss/")})
    fields = ("loss", *terms, "mean_reward", "lr")
    report.loss_curves(rows, run / "plots" / "loss.png", fields, title=str(run))
