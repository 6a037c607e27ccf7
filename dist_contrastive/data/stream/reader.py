"""The rows of one process in every batch: which they are, and reading them."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from dist_contrastive.data.collate import Batch, collate, without_rows
from dist_contrastive.data.source import Source
from dist_contrastive.data.stream.order import Order
from dist_contrastive.data.stream.unreadable import (
    MAX_ATTEMPTS,
    Skipped,
    check_skipped,
    substitute,
)
from dist_contrastive.errors import DataError, UnreadableSample

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class Part(NamedTuple):
    """Some rows of a batch."""

    stop: int  # samples consumed after the batch, over all ranks
    batch: Batch | None  # None: no row of this part, and another part has some
    skipped: list[Skipped]


class Reader:
    """Reads this rank's rows of each batch, or a part of them.

    Args:
        index, order: what is read, and in which order.
        lanes: those of this rank.
        consumed, total: samples over all ranks from which, and to which, it reads; total may be
            None for no end.
        only: the fields that every sample must have, the others are not read; None: all there are.
        transform: applied to every decoded sample.
        max_skipped: different samples that may be unreadable.
    """

    def __init__(
        self,
        index: Source,
        order: Order,
        lanes: range,
        consumed: int,
        total: int | None,
        only: Collection[str] | None,
        transform: Transform | None,
        max_skipped: int,
    ) -> None:
        self.index = index
        self.order = order
        self.lanes = lanes
        self.consumed = consumed
        self.total = total
        self.only = only
        self.transform = transform
        self.max_skipped = max_skipped
        self._skipped: list[Skipped] = []  # one of each sample that proved unreadable

    def parts(self, part: int = 0, parts: int = 1) -> Iterator[Part]:
        """The part-th of equal, consecutive parts of this rank's rows of every batch."""
        start = self.consumed
        while self.total is None or start < self.total:
            stop = start + self.order.global_batch_size
            if self.total is not None:
                stop = min(stop, self.total)
            yield self._part(start, stop, part, parts)
            start = stop

    def _part(self, start: int, stop: int, part: int, parts: int) -> Part:
        position = self.order.position
        spans = [(lane, position(lane, start), position(lane, stop)) for lane in self.lanes]
        count = sum(last - first for _, first, last in spans)
        begin, end = (count * edge // parts for edge in (part, part + 1))
        wanted: list[tuple[int, int]] = []
        upcoming: list[int] = []
        for lane, first, last in _cut(spans, begin, end):
            epochs, numbers = self.order.samples(lane, first, last)
            wanted += zip(epochs.tolist(), numbers.tolist(), strict=True)
            upcoming += self.order.upcoming(lane, first, last).tolist()
        for number in [*(number for _, number in wanted), *upcoming]:
            self.index.prefetch(number, self.only)
        skipped: list[Skipped] = []
        rows = [self._read_or_replace(epoch, number, skipped) for epoch, number in wanted]
        if rows:
            return Part(stop, collate(rows), skipped)
        return Part(stop, None if count or part else self._empty(stop), skipped)

    def _empty(self, stop: int) -> Batch:
        """A batch without rows: some sample tells the fields, types and shapes."""
        last = self.order.position(self.lanes[0], stop) - 1
        epochs, numbers = self.order.samples(self.lanes[0], last, last + 1)
        return without_rows(collate([self._read_or_replace(int(epochs[0]), int(numbers[0]), [])]))

    def _read_or_replace(self, epoch: int, number: int, skipped: list[Skipped]) -> dict[str, Any]:
        tried: dict[int, str] = {}
        sample, attempt = number, 0
        while True:
            try:
                found = self._read(epoch, sample)
                break
            except UnreadableSample as error:
                tried[sample] = str(error)
                self._note(epoch, sample, str(error))
            while sample in tried:
                if attempt >= MAX_ATTEMPTS:
                    raise DataError(
                        f"{len(tried)} samples that could take the place of each other cannot be "
                        f"read; last: {tried[sample]}"
                    )
                sample = substitute(self.order, epoch, number, attempt)
                attempt += 1
        skipped += [self._record(epoch, *one, replaced_by=sample) for one in tried.items()]
        return found

    def _note(self, epoch: int, sample: int, reason: str) -> None:
        if all(one.sample != sample for one in self._skipped):
            self._skipped.append(self._record(epoch, sample, reason, replaced_by=-1))
            check_skipped(self._skipped, self.max_skipped)

    def _record(self, epoch: int, sample: int, reason: str, replaced_by: int) -> Skipped:
        shard = self.index.shards[self.index.shard_of(sample)]
        return Skipped(epoch, sample, shard, self.index.key(sample), reason, replaced_by)

    def _read(self, epoch: int, number: int) -> dict[str, Any]:
        sample = self.index.read(number, self.only)
        sample = {**sample, "__epoch__": epoch, "__index__": number}
        return sample if self.transform is None else self.transform(sample)


def _cut(spans: list[tuple[int, int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The rows [begin, end) of lanes one after the other: lane, first and last position."""
    at = 0
    for lane, first, last in spans:
        low, high = max(begin - at, 0), min(end - at, last - first)
        if low < high:
            yield lane, first + low, first + high
        at += last - first
