"""Reader of the rows of one process in every batch; unreadable samples are replaced.

Substitutes are known from the order alone: every rank, at any time, would choose the same.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from dist_contrastive.data.collate import Batch, collate, without_rows
from dist_contrastive.data.keyed_random import keyed_number
from dist_contrastive.data.source import Source
from dist_contrastive.data.stream.order import Order
from dist_contrastive.errors import DataError, UnreadableSample

Transform = Callable[[dict[str, Any]], dict[str, Any]]

_REPLACE_KEY = 6  # first word of a generator's key; the orders have the others below 8
_MAX_ATTEMPTS = 1000  # draws of a substitute for one sample


class Skipped(NamedTuple):
    """A sample that could not be read, and the one that took its place."""

    epoch: int
    sample: int
    shard: str
    key: str | None
    reason: str
    replaced_by: int  # a sample number


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

    def parts(self, part: int = 0, parts: int = 1, is_shared: bool = False) -> Iterator[Part]:
        """The part-th of equal, consecutive parts of this rank's rows of every batch.

        Args:
            is_shared: as of `collate`.
        """
        start = self.consumed
        while self.total is None or start < self.total:
            stop = start + self.order.global_batch_size
            if self.total is not None:
                stop = min(stop, self.total)
            yield self._part(start, stop, part, parts, is_shared)
            start = stop

    def _part(self, start: int, stop: int, part: int, parts: int, is_shared: bool) -> Part:
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
            return Part(stop, collate(rows, is_shared), skipped)
        return Part(stop, None if count or part else self._empty(stop), skipped)

    def _empty(self, stop: int) -> Batch:
        """A batch without rows, with fields, types and shapes of some sample."""
        last = self.order.position(self.lanes[0], stop) - 1
        epochs, numbers = self.order.samples(self.lanes[0], last, last + 1)
        return without_rows(collate([self._read_or_replace(int(epochs[0]), int(numbers[0]), [])]))

    def _read_or_replace(self, epoch: int, number: int, skipped: list[Skipped]) -> dict[str, Any]:
        tried: dict[int, str] = {}
        sample, attempt = number, 0
        while True:
            try:
                row = self._read(epoch, sample)
                break
            except UnreadableSample as error:
                tried[sample] = str(error)
                self._note(epoch, sample, str(error))
            while sample in tried:
                if attempt >= _MAX_ATTEMPTS:
                    raise DataError(
                        f"{len(tried)} samples that could take the place of each other cannot be "
                        f"read; last: {tried[sample]}"
                    )
                sample = substitute(self.order, epoch, number, attempt)
                attempt += 1
        skipped += [self._record(epoch, *one, replaced_by=sample) for one in tried.items()]
        return row

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


def substitute(order: Order, epoch: int, sample: int, attempt: int) -> int:
    """Number of the sample that takes the place of another one.

    Drawn by a key (seed, epoch, sample, attempt) from `order.alternatives(sample)`, which keeps it
    in its class or source.
    """
    choices = order.alternatives(sample)
    key = _REPLACE_KEY, epoch, sample, attempt
    return int(choices[keyed_number(len(choices), order.seed, *key)])


def check_skipped(skipped: Iterable[Skipped], max_skipped: int) -> None:
    """Refuse to go on where more samples than the bound were skipped.

    Raises:
        DataError: more than `max_skipped` different samples, naming shards.
    """
    first: dict[int, Skipped] = {}
    for one in skipped:
        first.setdefault(one.sample, one)
    if len(first) > max_skipped:
        raise DataError(_too_many(list(first.values()), max_skipped))


def _too_many(skipped: list[Skipped], max_skipped: int) -> str:
    if max_skipped == 0:
        return skipped[0].reason
    counts = Counter(one.shard for one in skipped)
    shards = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{shard} ({count})" for shard, count in shards[:4])
    more = f" and {len(shards) - 4} more" if len(shards) > 4 else ""
    return (
        f"{len(skipped)} samples cannot be read, more than max_skipped={max_skipped}: in {named}"
        f"{more}; first: {skipped[0].reason}"
    )
