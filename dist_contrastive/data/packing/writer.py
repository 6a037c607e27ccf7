"""Samples written as shards of bounded size, encoded by several threads.

Every source of samples calls `pack_samples` with items that are cheap to list and a function that
makes a sample of one of them; only a few samples are held at once.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dist_contrastive import atomic
from dist_contrastive.data.packing.options import (
    PackOptions,
    ShardBounds,
    check_key,
    check_target,
)
from dist_contrastive.data.progress import map_in_threads, progress_bar
from dist_contrastive.data.shards.encoding import encode_field, image_traits, is_image_field
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import index_folder, load_index
from dist_contrastive.data.shards.tars import BLOCK, ShardWriter, tar_bytes
from dist_contrastive.errors import DataError, UnreadableSample

_T = TypeVar("_T")
_RECORD = 20 * BLOCK  # bytes; a tar ends in two empty blocks and is padded to it
_MAX_SHARDS = 100_000  # five digits: more would not sort by name

Sample = Mapping[str, Any]
"""`__key__`, and fields by extension, as `encode_field` takes them."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Index of what was written, and what was not.

    Attributes:
        left_out: for each sample that could not be read, the reason.
        not_packed: number of files of the source that are no part of a sample, by kind.
        traits: number of images that decode to other pixels than are stored, by `image_traits`.
    """

    index: ShardIndex
    left_out: list[str]
    not_packed: Counter[str] = field(default_factory=Counter)
    traits: Counter[str] = field(default_factory=Counter)

    def field_counts(self) -> dict[str, int]:
        """Number of samples that have each field."""
        counts = self.index.field_counts().sum(axis=0).tolist()
        return dict(zip(self.index.fields, counts, strict=True))


def pack_samples(
    items: Iterable[_T],
    make: Callable[[_T], Sample],
    folder: Path | str,
    options: PackOptions | None = None,
    total: int | None = None,
    classes: Mapping[int, str] | None = None,
) -> Packed:
    """Write FOLDER/NAME-00000.tar, ... in the order of the items, and index them.

    The folder is written atomically. Equal items give equal bytes.

    Args:
        items: listed by the calling thread, a few ahead of what has been written.
        make: makes one sample, in one of several threads, and may raise UnreadableSample.
        folder: new or empty; see also `PackOptions.overwrite`.
        total: how many items there are, for the bar.
        classes: names of classes by number, also of those that no sample is of.

    Raises:
        ConfigError: as `check_target`.
        DataError: the folder holds something else, or cannot be written; no samples; a key that is
            given twice or cannot be one; samples that cannot be read.
    """
    options = options or PackOptions()
    name = check_target(folder, options)
    folder, left_out, traits = Path(folder).resolve(), list[str](), Counter[str]()
    try:
        with (
            atomic.new_folder(folder) as partial_folder,
            closing(
                map_in_threads(partial(_sample_or_error, make), items, options.workers)
            ) as samples,
        ):
            progress = progress_bar(samples, total, f"packing {name}")
            readable = _readable(progress, left_out, traits, options.skip_unreadable)
            if not write_shards(_unique(readable), partial_folder, name, options.bounds):
                what = f"all {len(left_out)} samples were left out" if left_out else "no samples"
                raise DataError(f"there is nothing to pack into {folder}: {what}; see the source")
            index_folder(
                partial_folder,
                progress=lambda shards, n: progress_bar(shards, n, f"indexing {name}"),
                classes=classes or {},
            )
    except OSError as error:
        raise DataError(f"packing into {folder} failed ({error}); see to it and start again") from (
            error
        )
    return Packed(load_index(folder), left_out, traits=traits)


def write_shards(
    samples: Iterable[Mapping[str, Any]], folder: Path, name: str, bounds: ShardBounds
) -> int:
    """Write FOLDER/NAME-00000.tar, ... and return the number of samples.

    Args:
        samples: encoded: `__key__`, and fields as bytes, see `encoded`.

    Raises:
        DataError: there would be more than 100,000 shards.
    """
    shards = _Shards(folder, name, bounds)
    count = 0
    try:
        for sample in samples:
            shards.write(sample)
            count += 1
    finally:
        shards.close()
    return count


def encoded(sample: Sample) -> dict[str, Any]:
    """A sample with its fields as bytes.

    Raises:
        DataError: a key that cannot be one, or a value that cannot be written.
    """
    fields = {
        name: encode_field(name, value) for name, value in sample.items() if name != "__key__"
    }
    check_key(sample["__key__"])
    return {"__key__": sample["__key__"], **fields}


_Made = tuple[dict[str, Any], list[str]] | UnreadableSample


def _sample_or_error(make: Callable[[_T], Sample], item: _T) -> _Made:
    """Sample with its fields as bytes, and the traits of its images."""
    try:
        sample = encoded(make(item))
    except UnreadableSample as error:
        return error
    images = [value for name, value in sample.items() if is_image_field(name)]
    return sample, [trait for image in images for trait in image_traits(image)]


def _readable(
    samples: Iterable[_Made], left_out: list[str], traits: Counter[str], skip: bool
) -> Iterator[dict[str, Any]]:
    """Samples that could be read; the reasons of the others go to `left_out`.

    Unless they are to be left out nothing is written after the first of them: the rest is read
    only to count them.
    """
    count = 0
    for sample in samples:
        count += 1
        if isinstance(sample, UnreadableSample):
            left_out.append(str(sample))
        elif skip or not left_out:
            traits.update(sample[1])
            yield sample[0]
    if left_out and not skip:
        raise DataError(
            f"{len(left_out)} of {count} samples cannot be read, the first because {left_out[0]}; "
            f"repair or remove them, or leave them out with --skip-unreadable"
        )


def _unique(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    keys: set[str] = set()
    for sample in samples:
        if sample["__key__"] in keys:
            raise DataError(
                f"two samples have the key {sample['__key__']!r}; give every sample a key of its "
                f"own"
            )
        keys.add(sample["__key__"])
        yield sample


class _Shards:
    """Numbered tars, of which a new one begins where the next sample would exceed a bound.

    By hand: webdataset.ShardWriter(maxsize) counts contents only, and ends a shard after the sample
    that exceeds the bound: of samples of 1 KiB its tars of 50 KiB have 230 KiB.
    """

    def __init__(self, folder: Path, name: str, bounds: ShardBounds) -> None:
        self._folder, self._name, self._bounds = folder, name, bounds
        self._writer: ShardWriter | None = None
        self._count = self._samples = self._bytes = 0

    def write(self, sample: Mapping[str, Any]) -> None:
        fields = {name: value for name, value in sample.items() if name != "__key__"}
        size = tar_bytes(fields.values())
        size += sum(_extended_header(f"{sample['__key__']}.{name}") for name in fields)
        if self._writer is None or self._is_full(size):
            self._writer = self._next()
        self._writer.write(sample)
        self._samples += 1
        self._bytes += size

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _is_full(self, size: int) -> bool:
        most, mib = self._bounds.samples, self._bounds.mib
        tar = -(-(self._bytes + size + 2 * BLOCK) // _RECORD) * _RECORD
        return (most is not None and self._samples >= most) or (
            mib is not None and tar > mib * 2**20
        )

    def _next(self) -> ShardWriter:
        self.close()
        if self._count >= _MAX_SHARDS:
            raise DataError(
                f"the samples need more than {_MAX_SHARDS} shards; raise --samples-per-shard "
                f"(now {self._bounds.samples}) or --shard-mb (now {self._bounds.mib})"
            )
        path = self._folder / f"{self._name}-{self._count:05d}.tar"
        self._count, self._samples, self._bytes = self._count + 1, 0, 0
        return ShardWriter(path)


def _extended_header(name: str) -> int:
    """Bytes in front of a member's own header that a long or foreign name takes."""
    if name.isascii() and len(name) <= tarfile.LENGTH_NAME:
        return 0
    return len(tarfile.TarInfo(name).tobuf(tarfile.PAX_FORMAT)) - BLOCK
