"""Training and held-out samples of an evaluation, and the table of its measures."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dist_contrastive.data.collate import collate
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.progress import progress_bar
from dist_contrastive.data.source import Source
from dist_contrastive.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    UnreachableError,
    UserError,
)

_logger = logging.getLogger(__name__)

Line = tuple[str, float, dict[str, float]]
"""Name of a measure, its value, and reference values by name, as the same measure of raw pixels."""


@dataclass(frozen=True)
class Splits:
    """All samples of data.train and data.test, with the labels that training was not to use."""

    train: Samples
    test: Samples
    classes: Mapping[int, str] = field(
        default_factory=dict
    )  # names by number, where they are known


@dataclass
class Table:
    """Lines of an evaluation as they come; what cannot be measured is left out and named."""

    changed: Callable[["Table"], None] = lambda _: None
    """Called after each measure, as to write what there is."""
    lines: list[Line] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """What, and why."""

    def measure(self, what: str, lines: Callable[[], list[Line]]) -> None:
        """Add the lines, or leave `what` out where they cannot be computed."""
        _logger.info("measuring %s", what)
        try:
            self.add(lines())
        except (UserError, NonFiniteError) as error:
            self.left_out.append((what, str(error)))
            self.changed(self)

    def add(self, lines: list[Line]) -> None:
        """Add lines that are measured."""
        self.lines += lines
        self.changed(self)


def usable_samples(fields: Fields, index: Source, what: str) -> tuple[Samples, list[str]]:
    """All samples of a data set that can be used, and why each of the others cannot.

    Args:
        what: the data set is, beside the progress bar.

    Raises:
        DataError: no sample has one of the fields, or none can be used.
    """
    fields.check(index, len(index) - 1)
    rows, shapes, reasons = [], [], []
    for number in progress_bar(range(len(index)), len(index), f"reading {what}"):
        try:
            row = fields.row(index, number)
            shape = _shape(fields.samples(collate([row])))
        except UnreachableError:
            raise
        except DataError as error:
            reasons.append(str(error))
        else:
            rows.append(row)
            shapes.append(shape)
    if not rows:
        raise DataError(f"none of {len(index)} samples can be used; the first: {reasons[0]}")
    usual = Counter(shapes).most_common(1)[0][0]
    reasons += [
        f"sample {row['__key__']} has the shape {shape} and most have {usual}; set "
        f"data.image_size and data.image_channels"
        for row, shape in zip(rows, shapes, strict=True)
        if shape != usual
    ]
    alike = [row for row, shape in zip(rows, shapes, strict=True) if shape == usual]
    return fields.samples(collate(alike)), reasons


def _shape(sample: Samples) -> str:
    """Shape of an image, and of the array beside it."""
    both = [x for x in (sample.images, sample.pair) if isinstance(x, Tensor)]
    return " and ".join(str(list(x.shape[1:])) for x in both)


def with_labels(splits: Splits, table: Table) -> Splits:
    """Labelled samples of both splits; the table tells how many are left out.

    Raises:
        ConfigError: the data set has no labels, or in one of the two all are missing.
    """
    train, test = _labelled(splits.train, "train"), _labelled(splits.test, "test")
    for name, all_of, kept in (("train", splits.train, train), ("test", splits.test, test)):
        missing = len(all_of.images) - len(kept.images)
        if missing:
            reason = f"{missing} of {len(all_of.images)} have no label, by which is measured"
            table.left_out.append((f"samples of data.{name}", reason))
    return replace(splits, train=train, test=test)


def labels_of(samples: Samples) -> Tensor:
    """Labels of samples that have them."""
    assert samples.labels is not None
    return samples.labels


def _labelled(samples: Samples, name: str) -> Samples:
    labels = samples.labels
    if labels is None:
        raise ConfigError(
            "eval measures this run by labels; set data.label to a field that holds them"
        )
    is_labelled = labels.isfinite() if labels.is_floating_point() else labels >= 0
    if not is_labelled.any():
        raise ConfigError(f"no sample of data.{name} has a label; eval needs some to measure by")
    return samples.rows(is_labelled.nonzero().flatten())
