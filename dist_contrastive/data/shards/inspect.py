"""What shards hold, in numbers: samples, fields, what these decode to, classes.

Numbers and sizes come from the index and are of all samples; what fields decode to, and classes,
are told from samples that are read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dist_contrastive.data.shards.encoding import decode_or_explain
from dist_contrastive.data.shards.index import ABSENT, ShardIndex
from dist_contrastive.data.shards.index_file import load_index
from dist_contrastive.data.shards.kinds import kinds
from dist_contrastive.data.shards.locations import is_url
from dist_contrastive.errors import DataError, UnreachableError

_DECODED = 64  # samples of which every field is decoded
_LABELLED = 10_000  # samples of which the label is read, if they are on this machine
_FIRST_KEYS = 3
_MAX_CLASSES = 20  # that are told one by one
_MAX_NAME = 30  # characters of a class


@dataclass(frozen=True)
class FieldSummary:
    """One field: the samples that have it, the bytes of its content, what it decodes to."""

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


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shards` found."""

    shards: int
    samples: int
    tar_bytes: int
    shard_samples: tuple[int, float, int]  # of a shard: least, median, most
    fields: tuple[FieldSummary, ...]
    decoded: int  # samples from which `kind` of the fields is known
    unreadable: int  # of these: samples that could not be read
    labels: LabelSummary | None
    first_keys: tuple[str, ...]

    def text(self) -> str:
        """A readable summary of several lines."""
        least, middle, most = self.shard_samples
        each = f"{most:,} samples"
        if least < most:
            each = f"{least:,} to {most:,} samples (median {middle:,g})"
        evenly = " spread evenly" if self.decoded < self.samples else ""
        lines = [
            f"shards   {self.shards:,} of {each}, {_size(self.tar_bytes)}",
            f"samples  {self.samples:,}, the first are {', '.join(self.first_keys)}",
            "",
            *_table(self.fields, f"decodes to (of {self.decoded:,} samples{evenly})"),
        ]
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
    """Sum up what shards hold.

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
    )


def _read(index: ShardIndex, number: int, only: set[str] | None) -> dict[str, Any] | None:
    """The bytes of a sample's fields, with its `__shard__`, or None where they cannot be read."""
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
    told = kinds(values)
    if failed:
        told.append(f"{failed} of {failed + len(values)} cannot be decoded")
    mean, most = (float(sizes.mean()), int(sizes.max())) if len(sizes) else (0.0, 0)
    return FieldSummary(name, len(sizes), mean, most, "; ".join(told) or "not seen")


def _decode(content: Mapping[str, Any], name: str) -> Any:
    return decode_or_explain(name, content[name], content["__key__"], content["__shard__"])


# ---------------------------------------------------------------------------- labels


def _labels(index: ShardIndex) -> LabelSummary | None:
    """The labels of samples that hold some in `cls`, or as "label" in `json`."""
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
    return LabelSummary(path, len(numbers), dict(counts.most_common())) if counts else None


# ---------------------------------------------------------------------------- as text


def _table(fields: Sequence[FieldSummary], kind: str) -> list[str]:
    rows = [("field", "samples", "mean bytes", "max bytes", kind)]
    rows += [
        (one.name, f"{one.samples:,}", f"{one.mean_bytes:,.0f}", f"{one.max_bytes:,}", one.kind)
        for one in fields
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}"
        for row in rows
    ]


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
    order = sorted(labels.counts, key=lambda x: (type(x).__name__, 0 if x is None else x))
    names = ["null" if label is None else str(label)[:_MAX_NAME] for label in order]
    told = [f"{name}: {labels.counts[label]:,}" for name, label in zip(names, order, strict=True)]
    return ["", head, *(f"  {'   '.join(told[i : i + 10])}" for i in range(0, len(told), 10))]


def _size(count: int) -> str:
    """Bytes for people, in powers of 1000 as disks are sold."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
