"""Fields of decoded samples as tasks take them: images, labels, a second modality."""

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from dist_contrastive.data.classes import MISSING_CLASS, as_class, as_number, is_missing
from dist_contrastive.data.collate import Batch, collate
from dist_contrastive.data.pixels import as_float, as_image, check_images, fit_image, is_image
from dist_contrastive.data.places import (
    ABSENT,
    drawn_text,
    inside,
    place_in_json,
    place_of_label,
)
from dist_contrastive.data.shards.encoding import is_image_field
from dist_contrastive.data.source import Source, alternatives
from dist_contrastive.errors import DataError, UnreadableSample
from dist_contrastive.settings import ImageSize, Settings


def _joined(name: Any) -> Any:
    names = name if isinstance(name, list | tuple) else [name]
    is_text = all(isinstance(one, str) and one and not set(one) & set(",|") for one in names)
    if isinstance(name, list | tuple | str) and not (names and is_text):
        raise ValueError("no names of fields; give one, or a list of some, as [jpg, png, webp]")
    return ";".join(names) if isinstance(name, list | tuple) else name


FieldName = Annotated[str, BeforeValidator(_joined)]
"""Name of a field; a list of names is the first of them that a sample has."""


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name is there twice; give every class a name of its own")
    return names


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError("the first is not below the second; give [BLACK, WHITE], as [0, 4095]")
    return ends


@dataclass(frozen=True)
class Samples:
    """Rows of this rank, with what identifies each of them in the stream."""

    images: Tensor  # float32: images [b, C, H, W] in [0, 1]; or arrays [b, ...] as they are
    labels: Tensor | None  # [b] int64, -1 where missing; or [b] float64, NaN where missing
    epoch: Tensor  # [b] int64
    index: Tensor  # [b] int64, number of the sample in its data set
    pair: Tensor | tuple[str, ...] | None = None  # [b, ...] float32, or b texts
    host_labels: Tensor | None = None  # where labels are on a GPU: those they were copied from

    @property
    def labels_on_host(self) -> Tensor | None:
        """The labels on the CPU, for which the host does not wait if they came from there."""
        known = self.host_labels
        return self.labels.cpu() if known is None and self.labels is not None else known

    def _each(self, changed: Callable[[Tensor], Tensor]) -> "Samples":
        tensors: dict[str, Any] = {k: x for k, x in vars(self).items() if isinstance(x, Tensor)}
        tensors.pop("host_labels", None)
        return replace(self, **{name: changed(x) for name, x in tensors.items()})

    def to(self, device: torch.device, non_blocking: bool = False) -> "Samples":
        """The same rows on another device; texts stay where they are."""
        host = None if device.type == "cpu" else self.labels_on_host
        moved = self._each(lambda x: x.to(device, non_blocking=non_blocking))
        return replace(moved, host_labels=host)

    def pin_memory(self) -> "Samples":
        """The same rows in memory from which a GPU copies beside the computation."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that this stream uses the rows too."""
        for rows in (self.images, self.labels, self.epoch, self.index, self.pair):
            if isinstance(rows, Tensor):
                rows.record_stream(stream)

    def rows(self, numbers: Tensor | slice) -> "Samples":
        """Some of the rows: a slice of them, or by their numbers, int64 [n]."""
        pair, host = self.pair, None
        if isinstance(numbers, slice) and self.host_labels is not None:
            host = self.host_labels[numbers]
        if isinstance(pair, tuple):
            places = numbers.tolist() if isinstance(numbers, Tensor) else range(len(pair))[numbers]
            pair = tuple(pair[place] for place in places)
        return replace(replace(self, pair=pair)._each(lambda x: x[numbers]), host_labels=host)


class FieldsConfig(Settings):
    """Which fields of a sample hold what."""

    image: FieldName = "png"
    """Field of a sample that holds the image, or, for generators of points, an array of numbers; of
    a list, as [jpg, png, webp], the first that the sample has."""
    label: str | None = None
    """Field that holds a label, as `cls` or `json.label`; null without labels."""
    num_classes: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Labels are classes 0 ... num_classes - 1; null where they are continuous."""
    pair: FieldName | None = None
    """Field that holds a second modality of the same sample, as `txt` or `npy`; or a list, as of
    image; or the name of a text inside of a JSON field, as `json.caption`. Of a list of texts one
    is drawn each epoch."""
    image_size: ImageSize | None = None
    """Pixels: images are scaled so that their shorter side has as many, and cut to the square in
    the middle; null for images of one size."""
    image_channels: Literal[1, 3] | None = None
    """1 makes all images gray, 3 makes gray ones RGB; null for images that are alike."""
    image_range: Annotated[tuple[float, float], AfterValidator(_ascending)] | None = None
    """Values that become 0 and 1, as [0, 4095], of gray images of 16 bits and of arrays named by
    image; null: [0, 65535] of images, and arrays stay as they are."""
    classes: Annotated[tuple[str, ...], AfterValidator(_different)] | None = None
    """Names of the classes 0, 1, ..., for labels that are texts; null: those that are stored with
    data.train, or else all that it has, sorted."""


class Fields(FieldsConfig):
    """Reader of the fields that a task takes: ``Fields("png", "json.label", num_classes=10)``.

    With `num_classes` labels are int64, without float64. A label is missing where the sample holds
    null or NaN, or -1 for a class.
    """

    labels_required: bool = False
    """Refuse samples whose label is missing."""
    seed: int = 0
    """Of the draws among several texts of a sample."""

    def __init__(self, *values: Any, **settings: Any) -> None:
        super().__init__(**dict(zip(FieldsConfig.model_fields, values, strict=False)), **settings)

    @property
    def names(self) -> frozenset[str]:
        """The fields of a sample that must be decoded."""
        label = None if self.label is None else place_of_label(self.label)[0]
        pair = None if self.pair is None else place_in_json(self.pair)[0]
        return frozenset(name for name in (self.image, label, pair) if name is not None)

    def check(self, index: Source, max_missing: int = 0) -> None:
        """Refuse a data set of which too many samples lack a field, before any is read.

        Args:
            max_missing: samples that may lack one of the fields.

        Raises:
            DataError: no sample has it, or more than `max_missing` have not.
        """
        for name in sorted(self.names):
            if not index.has_field(name):
                raise DataError(_no_field(name, index.fields))
            lacking = index.lacking(name)
            if len(lacking) > max_missing:
                raise DataError(_lacking_in(index, name, lacking))

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A decoded sample, its images scaled, cut and coloured as asked for, its text drawn.

        Raises:
            UnreadableSample: no text is where one is named inside of a JSON field.
        """
        changed: dict[str, Any] = {
            name: fit_image(image, self.image_size, self.image_channels)
            for name in (self.image, self.pair)
            if name is not None and (image := as_image(sample.get(name))) is not None
        }
        if self.pair is not None and place_in_json(self.pair)[0].endswith("json"):
            changed[self.pair] = drawn_text(sample, self.pair, self.seed)
        return {**sample, **changed}

    def samples(self, batch: Batch) -> Samples:
        """Images, labels and second modality of a batch of `ShardStream`; it may have no rows.

        Raises:
            DataError: a field is missing or is not what it should be, naming the field.
        """
        images = self._images(batch)
        labels = None if self.label is None else self._batch_labels(batch, self.label)
        pair = None if self.pair is None else _pair(batch, self.pair)
        return Samples(images, labels, batch["__epoch__"], batch["__index__"], pair)

    def read(self, index: Source, numbers: Iterable[int]) -> Samples:
        """These samples of a data set, all of which must fit in memory, in their order; DataError
        as `check` and `samples`."""
        self.check(index, len(index) - 1)
        return self.samples(collate([self.row(index, number) for number in numbers]))

    def row(self, index: Source, number: int) -> dict[str, Any]:
        """A sample as the first epoch of a stream has it; UnreadableSample as `prepare`."""
        sample = index.read(number, self.names)
        return self.prepare({"__epoch__": 0, "__index__": number, **sample})

    def labels(
        self, index: Source, numbers: Iterable[int], unreadable_is_missing: bool = False
    ) -> Tensor:
        """The labels alone of these samples, in their order: ``read(index, numbers).labels``.

        Args:
            unreadable_is_missing: as of `stored_labels`.

        Raises:
            DataError: as `samples`; or no field is named that holds labels.
        """
        return self._label_tensor(
            self._label(*one) for one in self.stored_labels(index, numbers, unreadable_is_missing)
        )

    def stored_labels(
        self, index: Source, numbers: Iterable[int], unreadable_is_missing: bool = False
    ) -> Iterator[tuple[str | None, Any]]:
        """Key and label of each of these samples as it is stored; missing ones are None.

        Of each sample only the field that holds the label is read.

        Args:
            unreadable_is_missing: a label that cannot be read counts as missing, with the key None,
                even where labels are required: a stream that reads the field will not give that
                sample.
        """
        if self.label is None:
            raise DataError("data.label is null; set it to the field that holds the labels")
        name = place_of_label(self.label)[0]
        if not index.has_field(name):
            raise DataError(_no_field(name, index.fields))
        for number in numbers:
            try:
                sample = index.read(number, only={name})
                yield sample["__key__"], self._stored_label(sample["__key__"], sample[name])
            except UnreadableSample:
                if not unreadable_is_missing:
                    raise
                yield None, None

    def class_names(self, index: Source) -> Mapping[int, str]:
        """Names of the classes by number, as far as they are known."""
        return index.classes if self.classes is None else dict(enumerate(self.classes))

    def _images(self, batch: Batch) -> Tensor:
        column = _field(batch, self.image)
        if isinstance(column, list) and _are_alike(column):  # some have 8 bits, some 16
            return torch.cat([as_float(image[None], self.image_range) for image in column])
        wanted = self.image_size, self.image_channels
        check_images(column, batch["__key__"], self.image, *wanted)
        return _numbers(batch, self.image, column, self.image_range)

    def _batch_labels(self, batch: Batch, path: str) -> Tensor:
        column = _field(batch, place_of_label(path)[0])
        values = column.tolist() if isinstance(column, Tensor) and column.dim() == 1 else column
        rows = zip(batch["__key__"], values, strict=True)
        return self._label_tensor(self._label(key, self._stored_label(key, x)) for key, x in rows)

    def _label_tensor(self, labels: Iterable[float | None]) -> Tensor:
        classes = self.num_classes is not None
        missing = MISSING_CLASS if classes else math.nan
        numbers = [missing if label is None else label for label in labels]
        return torch.tensor(numbers, dtype=torch.int64 if classes else torch.float64)

    def _stored_label(self, key: str, value: Any) -> Any:
        """Label of one sample in the content of its field; None where it is missing."""
        path = str(self.label)
        name, inner = place_of_label(path)
        if inner:
            value = inside(value, inner)
            if value is ABSENT:
                raise DataError(
                    f"sample {key} has no {inner!r} in its field {name!r}; set data.label "
                    f"to FIELD.NAME with a name that it has"
                )
        if isinstance(value, Tensor | np.ndarray):
            value = value.tolist()
        if not is_missing(value, self.num_classes):
            return value
        if self.labels_required:
            raise DataError(
                f"sample {key} has no label ({path!r} holds {value}), but here every sample "
                f"needs one; label it, or leave it out and pack again"
            )
        return None

    def _label(self, key: str | None, value: Any) -> float | None:
        """Number of a label as it is stored."""
        if value is None:
            return None
        path = str(self.label)
        if self.num_classes is None:
            return as_number(key, value, path)
        if isinstance(value, str) and self.classes is not None:
            if value not in self._numbers_of_classes:
                raise DataError(
                    f"sample {key} has label {reprlib.repr(value)} in {path!r}, which is none of "
                    f"the {len(self.classes)} classes {reprlib.repr(list(self.classes))}; set "
                    f"data.classes to all, or leave it out"
                )
            value = self._numbers_of_classes[value]
        return as_class(key, value, path, self.num_classes)

    @cached_property
    def _numbers_of_classes(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes or ())}


def _are_alike(column: list[Any]) -> bool:
    return all(map(is_image, column)) and len({image.shape for image in column}) == 1


def _pair(batch: Batch, name: str) -> Tensor | tuple[str, ...]:
    column = _field(batch, name)
    if isinstance(column, Tensor):
        return _numbers(batch, name, column)
    for key, value in zip(batch["__key__"], column, strict=True):
        if not isinstance(value, str):
            raise DataError(
                f"sample {key} holds {_kind(value)} in {name!r}, but a second modality is texts, "
                f"or images or arrays of one shape in all samples; pack it so, or name another "
                f"field as data.pair"
            )
    return tuple(column)


def _numbers(
    batch: Batch, name: str, column: Tensor, ends: tuple[float, float] | None = None
) -> Tensor:
    """As `as_float`; NaN and infinity are refused."""
    numbers = as_float(column, ends)
    bad = (~numbers.isfinite()).nonzero()
    if len(bad):
        raise DataError(
            f"sample {batch['__key__'][int(bad[0, 0])]} holds NaN or infinity in {name!r}; "
            f"repair it, or leave it out and pack again"
        )
    return numbers


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"an array of shape {list(shape)}"


def _field(batch: Batch, name: str) -> Any:
    if name not in batch:
        raise DataError(_no_field(name, [key for key in batch if not key.startswith("__")]))
    return batch[name]


def _no_field(name: str, known: Iterable[str]) -> str:
    return (
        f"samples have no field {name!r}; set data.image, data.label and data.pair to fields "
        f"that they have: {', '.join(known) or 'none'}"
    )


def _image_fields(index: Source) -> str:
    """Fields of images of which every sample has one, joined; none if there are no such."""
    joined = ";".join(name for name in index.fields if is_image_field(name))
    return joined if joined and not len(index.lacking(joined)) else ""


def _lacking_in(index: Source, name: str, lacking: NDArray[np.int64]) -> str:
    """Where samples lack a field: a whole shard, or some samples of one."""
    if all(map(is_image_field, alternatives(name))) and (named := _image_fields(index)):
        return (
            f"{len(lacking)} of {len(index)} samples have no field {name!r}, but another one of an "
            f"image; name all: data.image=[{named.replace(';', ', ')}]"
        )
    counts = np.bincount(np.searchsorted(index.shard_starts, lacking, side="right") - 1)
    shard = int(counts.argmax())
    start, stop = index.shard_starts[shard : shard + 2].tolist()
    if counts[shard] == stop - start:
        others = [
            field
            for field in index.fields
            if np.isin(np.arange(start, stop), index.lacking(field), invert=True).any()
        ]
        return (
            f"shard {index.shards[shard]} has other fields than the rest: its {stop - start} "
            f"samples hold {', '.join(others)}, but none {name!r}; pack all shards alike, or leave "
            f"it out"
        )
    key = index.key(int(lacking[lacking >= start][0]))
    return (
        f"{len(lacking)} of {len(index)} samples have no field {name!r}, as {key!r} in shard "
        f"{index.shards[shard]} ({counts[shard]} there); pack them with one, leave them out, or "
        f"let them be replaced: data.max_skipped={len(lacking)}"
    )
