"""Data sources: random access to the samples of a data set, by number."""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from dist_contrastive.data.classes import join_classes
from dist_contrastive.data.filters import Filter
from dist_contrastive.errors import UnreadableSample
from dist_contrastive.settings import ComponentSettings


def alternatives(name: str) -> list[str]:
    """Fields that a name stands for: ``jpg;png`` is the first of the two that a sample has."""
    return name.split(";")


_PART = 10_000  # samples; as many as `shards pack` puts into a shard


def in_parts(name: str, count: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and sizes of the parts of a data set that has none of its own, as large as shards."""
    sizes = [min(_PART, count - first) for first in range(0, count, _PART)]
    spans = [(first * _PART, first * _PART + size) for first, size in enumerate(sizes)]
    return tuple(f"{name}[{first}:{stop}]" for first, stop in spans), np.array(sizes)


class Source(ABC):
    """Base of the data sets that a stream reads; `ShardIndex` is the usual one.

    An own one is named in the config by its import path, alone or among several sources:
    ``data.train: {name: "my_package.data:MySource", ...}``. The stream makes it by
    ``MySource(config)``. Order, resume, ranks, workers and replacement of unreadable samples are
    the stream's; a source that is read by spawned workers is pickled.

    Attributes:
        fields: names of the fields that samples have.
        shards: names of the S consecutive parts of the data set, for messages.
        shard_samples: [S] samples of each part. An epoch permutes the parts, and then samples
            inside of windows: what is near in the data set is read at about the same time.
        classes: names of classes by number; empty where they have none.
    """

    class Config(ComponentSettings):
        """Settings that all sources share."""

        weight: PositiveInt | None = None
        """Samples of this source in every so many as all weights make together, for as long as the
        run lasts; null, then of all sources, reads them as one data set, each sample once an
        epoch."""
        filter: Filter | None = None
        """Which of its samples are taken; null: all."""

    fields: tuple[str, ...]
    shards: tuple[str, ...]
    shard_samples: Any
    classes: Mapping[int, str] = MappingProxyType({})

    @abstractmethod
    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Decoded sample: `__key__`, a name that stays the same, and its fields.

        Images are uint8 tensors [C, H, W], or uint16; arrays, numbers, texts and dicts are what
        they are.

        Args:
            only: the fields to read; None reads all. A name may be of `alternatives`: what is read
                has that whole name.

        Raises:
            UnreadableSample: the stream may replace a bounded number of them.
        """

    @property
    def fingerprint(self) -> str:
        """Checksum of the content: a resumed run must find the same. To be overridden where the
        content may change and names and sizes of the shards stay."""
        content = type(self).__qualname__, self.shards, [int(n) for n in self.shard_samples]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def key(self, sample_number: int) -> str | None:
        """Key of a sample, or None where it cannot be read."""
        try:
            return self.read(sample_number)["__key__"]
        except UnreadableSample:
            return None

    def has_field(self, name: str) -> bool:
        """Whether samples have a field, or one of several alternatives."""
        return any(one in self.fields for one in alternatives(name))

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Numbers of the samples without a field of `fields`, where that is known."""
        return np.empty(0, np.int64)

    def prefetch(  # noqa: B027 optional
        self, sample_number: int, only: Collection[str] | None = None
    ) -> None:
        """Announcement of a sample that will be read soon, to be fetched meanwhile."""

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """Number of the first sample of each shard, then that of all samples: int64 [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)

    def shard_of(self, sample_number: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect_right(self._starts, sample_number) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return self.shard_starts.tolist()  # in a list a number is found many times faster


class JoinedSource(Source):
    """Several sources as one, whose samples are numbered through."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.fields = tuple(sorted({name for source in sources for name in source.fields}))
        self.shards = tuple(shard for source in sources for shard in source.shards)
        self.classes = join_classes(pair for s in sources for pair in s.classes.items())
        self.shard_samples = np.concatenate([np.asarray(s.shard_samples) for s in sources])
        self._first = np.cumsum([0, *map(len, sources)]).tolist()

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Sample of the source that holds the number."""
        source, number = self._locate(sample_number)
        return source.read(number, only)

    def key(self, sample_number: int) -> str | None:
        """Key of the sample in its source."""
        source, number = self._locate(sample_number)
        return source.key(number)

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Numbers of the samples without a field, all of a source that does not know it."""
        parts = [
            first + (source.lacking(name) if source.has_field(name) else np.arange(len(source)))
            for source, first in zip(self.sources, self._first, strict=False)
        ]
        return np.concatenate(parts)

    def prefetch(self, sample_number: int, only: Collection[str] | None = None) -> None:
        """Announcement to the source that holds the number."""
        source, number = self._locate(sample_number)
        source.prefetch(number, only)

    def _locate(self, sample_number: int) -> tuple[Source, int]:
        place = bisect_right(self._first, sample_number) - 1
        return self.sources[place], sample_number - self._first[place]
