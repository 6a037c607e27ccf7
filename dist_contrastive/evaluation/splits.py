"""Training and held-out samples of an evaluation, read whole or encoded batch by batch, and the
table of its measures."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.data.collate import collate
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.labels import refuse_other_classes, with_class_names
from dist_contrastive.data.places import place_of_label
from dist_contrastive.data.progress import progress_bar
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import join_sources
from dist_contrastive.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    UnreachableError,
    UserError,
)
from dist_contrastive.evaluation import encoded as encodings
from dist_contrastive.evaluation.encoded import Encoded, gathered, joined, num_pixels
from dist_contrastive.evaluation.options import EvalOptions, MeasureName

_logger = logging.getLogger(__name__)

_REPORT_S = 20.0  # from one line of progress to the next
BATCH = 256  # samples that are decoded and encoded at a time
Line = tuple[str, float, dict[str, float]]
"""Name of a measure, its value, and reference values by name, as the same measure of raw pixels."""


Rows = TypeVar("Rows", Samples, Encoded)
_Row = tuple[dict[str, Any], str]  # and its shape


@dataclass(frozen=True)
class Splits(Generic[Rows]):
    """All samples of data.train and data.test, with the labels that training was not to use."""

    train: Rows
    test: Rows
    classes: Mapping[int, str] = field(
        default_factory=dict
    )  # names by number, where they are known


@dataclass
class Table:
    """Lines of an evaluation as they come; what cannot be measured is left out and named."""

    changed: Callable[["Table"], None] = lambda _: None
    """Called after each measure, as to write what there is."""
    options: EvalOptions = field(default_factory=EvalOptions)
    lines: list[Line] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """What, and why."""

    def wants(self, *names: MeasureName) -> bool:
        """Whether one of these is wanted."""
        return not self.options.only.isdisjoint(names)

    def measure(self, name: MeasureName, what: str, lines: Callable[[], list[Line]]) -> None:
        """Add the lines if they are wanted, or leave `what` out where they cannot be computed."""
        if name not in self.options.only:
            return
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


@dataclass(frozen=True)
class Split:
    """A data set that an evaluation reads."""

    fields: Fields
    source: Source
    what: str  # it is, beside the progress bar
    limit: int | None = None
    rank: int = 0
    world_size: int = 1  # ranks that share the samples, each of which then gets those of all

    def usable_rows(self, reasons: list[str]) -> Iterator[_Row]:
        """Each sample that can be used, and its shape.

        Args:
            reasons: gets a sentence for each of the others.

        Raises:
            DataError: no sample has one of the fields.
        """
        fields, count = self.fields, len(self.source)
        fields.check(self.source, count - 1)
        wanted = self._num_wanted
        local = range(self.rank, wanted, self.world_size)
        numbers = (number * count // wanted for number in local)
        for number in progress_bar(numbers, len(local), f"reading {self.what}"):
            found = usable_row(fields, self.source, number)
            if isinstance(found, str):
                reasons.append(found)
            else:
                yield found

    def _reported(self, rows: Iterator[_Row]) -> Iterator[_Row]:
        """The same, with a line of the log at the begin and now and then."""
        share = len(range(self.rank, self._num_wanted, self.world_size))
        others = f" of {self._num_wanted}, the share of this rank" if self.world_size > 1 else ""
        _logger.info("reading %s: %d samples%s", self.what, share, others)
        last = time.monotonic()
        for number, row in enumerate(rows):
            if time.monotonic() - last > _REPORT_S:
                last = time.monotonic()
                _logger.info("reading %s: %d of %d", self.what, number, share)
            yield row

    @property
    def _num_wanted(self) -> int:
        count = len(self.source)
        return count if self.limit is None else min(self.limit, count)

    def usual_shape(self, keys: dict[str, list[str]], reasons: list[str]) -> str:
        """The shape that most samples have; those of other shapes cannot be used either.

        Args:
            keys: of the samples of each shape.

        Raises:
            DataError: none can be used.
        """
        if not keys:
            raise DataError(
                f"none of {len(self.source)} samples can be used; the first: {reasons[0]}"
            )
        usual = max(keys, key=lambda shape: len(keys[shape]))
        reasons += [
            f"sample {key} has the shape {shape} and most have {usual}; set data.image_size and "
            f"data.image_channels"
            for shape, of_shape in keys.items()
            for key in of_shape
            if shape != usual
        ]
        return usual

    def samples(self) -> tuple[Samples, list[str]]:
        """All samples that can be used, in memory, and why each of the others cannot; DataError as
        `usable_rows` and `usual_shape`."""
        reasons: list[str] = []
        rows: dict[str, list[dict[str, Any]]] = {}
        for row, shape in self._reported(self.usable_rows(reasons)):
            rows.setdefault(shape, []).append(row)
        usual = self.usual_shape(
            {shape: [row["__key__"] for row in alike] for shape, alike in rows.items()}, reasons
        )
        return self.fields.samples(collate(rows[usual])), reasons

    def encoded(
        self, encode: Callable[[Samples], Encoded], baselines: bool
    ) -> tuple[Encoded, list[str]]:
        """The same samples, of which only what networks make of them stays in memory.

        Args:
            encode: what is kept of some samples.
            baselines: their pixels are kept, however many there are.

        Raises:
            DataError: as `samples`. ConfigError: networks cannot take them. On all ranks.

        Collectives: gathers of rows and of objects, where ranks share the samples.
        """
        reasons: list[str] = []
        parts: dict[str, list[Encoded]] = {}
        keys: dict[str, list[str]] = {}
        refused: dict[str, str] = {}
        with collectives.raised_together():
            for batch in batched(self._reported(self.usable_rows(reasons)), BATCH):
                by_shape: dict[str, list[dict[str, Any]]] = {}
                for row, shape in batch:
                    by_shape.setdefault(shape, []).append(row)
                for shape, alike in by_shape.items():
                    keys.setdefault(shape, []).extend(row["__key__"] for row in alike)
                    try:
                        part = encode(self.fields.samples(collate(alike)))
                    except (RuntimeError, ValueError) as error:
                        refused[shape] = str(error).splitlines()[0]
                        continue
                    of_shape = parts.setdefault(shape, [])
                    of_shape.append(part)
                    if not baselines and num_pixels(of_shape) > encodings.MOST_PIXELS:
                        parts[shape] = [replace(x, pixels=None) for x in of_shape]
        keys, refused, reasons = self._pooled(keys, refused, reasons)
        usual = self.usual_shape(keys, reasons)
        if usual in refused:
            raise ConfigError(
                f"the encoder cannot read samples of {self.what} of the shape {usual}: "
                f"{refused[usual]}; set data.image_size and data.image_channels, or hold out others"
            )
        return gathered(joined(parts[usual]) if usual in parts else None, baselines), reasons

    def _pooled(
        self, keys: dict[str, list[str]], refused: dict[str, str], reasons: list[str]
    ) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
        """What all ranks have found, which share the samples."""
        if self.world_size == 1:
            return keys, refused, reasons
        keys_of, refused_of, reasons_of = zip(
            *collectives.gather_objects((keys, refused, reasons)), strict=True
        )
        keys = {}
        for shape, found in itertools.chain(*(x.items() for x in keys_of)):
            keys.setdefault(shape, []).extend(found)
        refused = dict(itertools.chain(*(x.items() for x in refused_of)))
        return keys, refused, list(itertools.chain(*reasons_of))


@dataclass(frozen=True)
class OpenSplits:
    """Both splits of a run before they are read, and names of classes by number."""

    train: Split
    test: Split
    classes: Mapping[int, str]


def open_splits(
    data: DataConfig,
    fields: Fields,
    limit: int | None = None,
    left_out: list[tuple[str, str]] | None = None,
    *,
    shared: bool = False,
) -> OpenSplits:
    """Splits of data.train and data.test, of which nothing is read yet.

    Args:
        limit: as of `Split`.
        left_out: is told where a split has no labels, which are then read of neither; None: labels
            must be there.
        shared: ranks share the samples.

    Raises:
        ConfigError: there is no data.test.
    """
    if data.test is None:
        raise ConfigError(
            "eval needs data.test, a folder of held-out shards; set it for the run, or name a "
            "folder beside data.train, as --split test"
        )
    opened = {"train": data.open_train(), "test": data.open_test()}
    refuse_other_classes(data.label, [*opened["train"], *opened["test"]])
    indexes = {name: join_sources(sources) for name, sources in opened.items()}
    fields = with_class_names(fields, indexes["train"])
    place = None if fields.label is None else place_of_label(fields.label)[0]
    without = [f"data.{n}" for n, x in indexes.items() if place and not x.has_field(place)]
    if without and left_out is not None:
        reason = f"samples of {' and '.join(without)} have no field {place!r}"
        left_out.append(("what goes by labels", reason))
        fields = fields.model_copy(update={"label": None})
    share = (collectives.rank(), collectives.world_size()) if shared else (0, 1)
    train, test = (Split(fields, indexes[name], f"data.{name}", limit, *share) for name in indexes)
    return OpenSplits(train, test, fields.class_names(indexes["train"]))


def batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def shape_of(sample: Samples) -> str:
    """Shape of an image, and of the array beside it."""
    both = [x for x in (sample.images, sample.pair) if isinstance(x, Tensor)]
    return " and ".join(str(list(x.shape[1:])) for x in both)


def usable_row(fields: Fields, source: Source, number: int) -> tuple[dict[str, Any], str] | str:
    """A sample and its `shape_of`, or why it cannot be used. Raises: UnreachableError."""
    try:
        row = fields.row(source, number)
        return row, shape_of(fields.samples(collate([row])))
    except UnreachableError:
        raise
    except DataError as error:
        return str(error)


def with_labels(splits: Splits[Rows], table: Table) -> Splits[Rows]:
    """Labelled samples of both splits; the table tells how many are left out.

    Raises:
        ConfigError: the data set has no labels, or in one of the two all are missing.
    """
    train, test = _labelled(splits.train, "train"), _labelled(splits.test, "test")
    for name, all_of, kept in (("train", splits.train, train), ("test", splits.test, test)):
        missing = len(all_of.index) - len(kept.index)
        if missing:
            reason = f"{missing} of {len(all_of.index)} have no label, by which is measured"
            table.left_out.append((f"samples of data.{name}", reason))
    return replace(splits, train=train, test=test)


def labels_of(samples: Samples | Encoded) -> Tensor:
    """Labels of samples that have them."""
    assert samples.labels is not None
    return samples.labels


def _labelled(samples: Rows, name: str) -> Rows:
    labels = samples.labels
    if labels is None:
        raise ConfigError(
            "eval measures this run by labels; set data.label to a field that holds them"
        )
    kept = labelled_rows(labels)
    if not len(kept):
        raise ConfigError(f"no sample of data.{name} has a label; eval needs some to measure by")
    return samples.rows(kept)


def labelled_rows(labels: Tensor) -> Tensor:
    """Numbers of the rows whose label is not missing."""
    known = labels.isfinite() if labels.is_floating_point() else labels >= 0
    return known.nonzero().flatten()
