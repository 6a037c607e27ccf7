"""Summaries of shards: samples, sizes, fields, the types of values, classes.

Numbers and sizes come from the index and are of all samples; types of values and classes come from
samples that are read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.encoding import (
    decode_or_explain,
    image_traits,
    is_image_field,
)
from dist_contrastive.data.shards.index import ABSENT, ShardIndex
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.locations import counted, find_shards, folder_of
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.errors import DataError, UnreachableError
from dist_contrastive.tables import format_table

_DECODED = 64  # samples of which every field is decoded
_LABELLED = 10_000  # samples of which the label is read, if they are on this machine
_FIRST_KEYS = 3
_MAX_CLASSES = 20  # that are listed one by one
_MAX_LABEL = 30  # characters of a class
_MAX_VALUES = 8  # of an object that are listed by name


@dataclass(frozen=True)
class FieldSummary:
    """One field: the samples that have it, the bytes of its content, the types of its values."""

    name: str
    samples: int
    mean_bytes: float
    max_bytes: int
    kind: str


@dataclass(frozen=True)
class LabelSummary:
    """The labels of `read` samples, some of which may have none. Null and -1 are labels too."""

    path: str  # "cls", or "json.label" for the value "label" in the object "json"
    read: int
    counts: Mapping[Any, int]  # of every label, most frequent first
    classes: Mapping[int, str]  # names of classes, also of those that were not met


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_shards`."""

    shards: int
    samples: int
    tar_bytes: int
    shard_samples: tuple[int, float, int]  # of a shard: least, median, most
    fields: tuple[FieldSummary, ...]
    decoded: int  # samples from which `kind` of the fields is known
    unreadable: int  # of these: samples that could not be read
    labels: LabelSummary | None
    first_keys: tuple[str, ...]
    left_out: Mapping[str, int]  # members of the tars that belong to no sample, by kind

    def text(self) -> str:
        """Summary of several lines."""
        least, middle, most = self.shard_samples
        each = f"{most:,} samples"
        if least < most:
            each = f"{least:,} to {most:,} samples (median {middle:,g})"
        evenly = " spread evenly" if self.decoded < self.samples else ""
        values = f"decodes to (of {self.decoded:,} samples{evenly})"
        lines = [
            f"shards   {self.shards:,} of {each}, {_size(self.tar_bytes)}",
            f"samples  {self.samples:,}, the first are {', '.join(self.first_keys)}",
            "",
            format_table(
                ["field", "samples", "mean bytes", "max bytes", values],
                [
                    (x.name, f"{x.samples:,}", f"{x.mean_bytes:,.0f}", f"{x.max_bytes:,}", x.kind)
                    for x in self.fields
                ],
            ),
        ]
        if self.left_out:
            lines.append(f"left out by the index: {counted(self.left_out)}")
        if self.unreadable:
            lines.append(
                f"{self.unreadable} of these samples cannot be read: see `dist-contrastive shards "
                f"verify`"
            )
        return "\n".join([*lines, *_label_lines(self.labels, self.samples)])


def spread(total: int, count: int) -> list[int]:
    """Numbers of `count` samples spread evenly over `total`, or of all if these are fewer."""
    count = min(count, total)
    return [total * i // count for i in range(count)]


def inspect_shards(shards: ShardIndex | Path | str) -> Inspection:
    """Summary of shards.

    Args:
        shards: an index, or what `load_index` takes.

    Raises:
        DataError: as `load_index`.
        UnreachableError: a server does not answer.
    """
    index = shards if isinstance(shards, ShardIndex) else load_index(shards)
    numbers = spread(len(index), _DECODED)
    contents = [content for number in numbers if (content := _read(index, number, None))]
    shard_samples = index.shard_samples.tolist()
    keys = (index.key(number) for number in range(min(_FIRST_KEYS, len(index))))
    return Inspection(
        shards=len(index.shards),
        samples=len(index),
        tar_bytes=int(index.shard_bytes.sum()),
        shard_samples=(min(shard_samples), median(shard_samples), max(shard_samples)),
        fields=tuple(_field(index, column, contents) for column in range(len(index.fields))),
        decoded=len(numbers),
        unreadable=len(numbers) - len(contents),
        labels=_labels(index),
        first_keys=tuple(key for key in keys if key is not None),
        left_out=index.left_out,
    )


def _read(index: ShardIndex, number: int, only: set[str] | None) -> dict[str, Any] | None:
    """Bytes of a sample's fields, with its `__shard__`; None where they cannot be read."""
    try:
        shard = index.shards[index.shard_of(number)]
        return {**index.read_contents(number, only), "__shard__": shard}
    except UnreachableError:
        raise
    except DataError:
        return None


def _field(index: ShardIndex, column: int, contents: Sequence[Mapping[str, Any]]) -> FieldSummary:
    name = index.fields[column]
    sizes = index.member_size[index.member_start[:, column] != ABSENT, column]
    values, failed = [], 0
    for content in contents:
        if name in content:
            try:
                values.append(_decode(content, name))
            except DataError:
                failed += 1
    types = _types(values)
    images = [content[name] for content in contents if is_image_field(name) and name in content]
    traits = Counter(trait for image in images for trait in image_traits(image))
    types += [f"{count} {trait}" for trait, count in traits.items()]
    if failed:
        types.append(f"{failed} of {failed + len(values)} cannot be decoded")
    mean, most = (float(sizes.mean()), int(sizes.max())) if len(sizes) else (0.0, 0)
    return FieldSummary(name, len(sizes), mean, most, "; ".join(types) or "not seen")


def _decode(content: Mapping[str, Any], name: str) -> Any:
    return decode_or_explain(name, content[name], content["__key__"], content["__shard__"])


# ---------------------------------------------------------------------------- labels


def _labels(index: ShardIndex) -> LabelSummary | None:
    """Labels of samples, from `cls`, or from "label" in `json`."""
    name = "cls" if "cls" in index.fields else "json"
    if name not in index.fields:
        return None
    is_remote = any(is_url(shard) for shard in index.shards)
    counts: Counter[Any] = Counter()
    numbers = spread(len(index), _DECODED if is_remote else _LABELLED)
    for number in numbers:
        content = _read(index, number, {name})
        if content is None or name not in content:
            continue
        try:
            value = _decode(content, name)
        except DataError:
            continue
        if name == "json":
            if not isinstance(value, dict) or "label" not in value:
                continue
            value = value["label"]
        counts[value if isinstance(value, str | int | None) else str(value)] += 1
    path = "cls" if name == "cls" else "json.label"
    if not counts:
        return None
    return LabelSummary(path, len(numbers), dict(counts.most_common()), index.classes)


# ---------------------------------------------------------------------------- types of values


def _types(values: Sequence[Any]) -> list[str]:
    """Types and sizes of decoded values in words, as "image uint8 3 x 180..500 x 240"."""
    groups: dict[str, list[Any]] = {}
    for value in values:
        groups.setdefault(_kind(value), []).append(value)
    described = []
    for kind, members in groups.items():
        share = f" ({len(members)} of {len(values)})" if len(groups) > 1 else ""
        described.append(kind + _details(members) + share)
    return described


def _kind(value: Any) -> str:
    match value:
        case Tensor():
            return "image " + str(value.dtype).removeprefix("torch.")
        case np.ndarray():
            return f"array {value.dtype}" + ("" if value.ndim else " (a single number)")
        case bool() | None:
            return "null" if value is None else "truth value"
        case int():
            return "whole number"
        case float():
            return "number"
        case str():
            return "text"
        case bytes():
            return "bytes, not decoded"
        case dict():
            return "object"
        case list():
            return "list"
    return type(value).__name__


def _details(values: Sequence[Any]) -> str:
    """Range of the sizes of values of one type."""
    first = values[0]
    if isinstance(first, dict):
        return f": {_names(values)}"
    if isinstance(first, str | list):
        what = "characters" if isinstance(first, str) else "values"
        return f" of {_range([len(value) for value in values])} {what}"
    if isinstance(first, int | float) and not isinstance(first, bool):
        return f" {_range(values)}"
    if isinstance(first, Tensor | np.ndarray):
        shapes = sorted({tuple(value.shape) for value in values}, key=lambda shape: len(shape))
        ranks = {len(shape) for shape in shapes}
        if len(ranks) > 1:
            return f" of {_range(sorted(ranks))} dimensions"
        return "".join(
            f"{' x' if axis else ''} {_range(sides)}"
            for axis, sides in enumerate(zip(*shapes, strict=True))
        )
    return ""


def _names(objects: Sequence[Mapping[str, Any]]) -> str:
    """Values in JSON objects: name, types, and how many objects have them."""
    types: dict[str, Counter[str]] = {}
    for members in objects:
        for name, value in members.items():
            types.setdefault(name, Counter())[_json_type(value)] += 1
    described = [
        f"{name} {'|'.join(counts)}"
        + ("" if counts.total() == len(objects) else f" (in {counts.total()})")
        for name, counts in sorted(types.items())
    ]
    more = f" and {len(described) - _MAX_VALUES} more" if len(described) > _MAX_VALUES else ""
    return ", ".join(described[:_MAX_VALUES]) + more


def _json_type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _range(numbers: Iterable[float]) -> str:
    numbers = list(numbers)
    low, high = min(numbers), max(numbers)
    return f"{low:,g}" if low == high else f"{low:,g}..{high:,g}"


# ---------------------------------------------------------------------------- as text


def _label_lines(labels: LabelSummary | None, samples: int) -> list[str]:
    if labels is None:
        return []
    counts, evenly = list(labels.counts.values()), ""
    if labels.read < samples:
        evenly = " spread evenly"
    labelled = "" if sum(counts) == labels.read else f"{sum(counts):,} of "
    head = f"{labels.path}: {len(counts):,} different in {labelled}{labels.read:,} samples{evenly}"
    if len(counts) > _MAX_CLASSES:
        return ["", f"{head}, each in {counts[-1]:,} to {counts[0]:,}"]
    order = sorted(
        {**dict.fromkeys(labels.classes, 0), **labels.counts},
        key=lambda x: (type(x).__name__, 0 if x is None else x),
    )
    cells = [f"{_named(x, labels.classes)}: {labels.counts.get(x, 0):,}" for x in order]
    return ["", head, *(f"  {'   '.join(cells[i : i + 10])}" for i in range(0, len(cells), 10))]


def _named(label: Any, names: Mapping[int, str]) -> str:
    name = f" {names[label]}" if label in names else ""
    return "null" if label is None else f"{label}{name}"[:_MAX_LABEL]


def _size(count: int) -> str:
    """Bytes for people, in powers of 1000 as disks are sold."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


# ---------------------------------------------------------------------------- sizes


class ShardSize(NamedTuple):
    """Size of a shard, as far as it is known without reading it."""

    shard: str
    size: int | None  # bytes; None where a server does not send it
    samples: int | None  # None without an index


def list_shards(locations: Sequence[Path | str]) -> tuple[list[ShardSize], list[str]]:
    """Shards of folders, patterns or URLs of these, and why samples of some are not known.

    Raises:
        DataError: no such folder, or no shard matches.
        UnreachableError: a server does not answer.
    """
    shards = [shard for location in locations for shard in find_shards(str(location))]
    counts: dict[str, dict[str, int]] = {}
    problems = []
    for folder in dict.fromkeys(map(folder_of, shards)):
        try:
            index = load_index(folder)
        except DataError as error:
            counts[folder] = {}
            problems.append(str(error))
        else:
            names = (shard.rpartition("/")[2] for shard in index.shards)
            counts[folder] = dict(zip(names, index.shard_samples.tolist(), strict=True))
    rows = [
        ShardSize(shard, _bytes(shard), counts[folder_of(shard)].get(shard.rpartition("/")[2]))
        for shard in shards
    ]
    return rows, problems


def _bytes(shard: str) -> int | None:
    return remote.size(shard) if is_url(shard) else Path(shard).stat().st_size
