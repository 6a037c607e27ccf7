"""The stream: batches as a function of the index, the seed and the number of samples consumed.

The order of samples is that of `data.order` or `data.balanced`. Here ranks and workers divide the
lanes of each batch among themselves, in lane order, and read. They never change what a global
batch is.
"""

import atexit
import signal
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dist_contrastive.data.balanced import Balance
from dist_contrastive.data.collate import Batch, collate, join_batches, without_rows
from dist_contrastive.data.index import ShardIndex
from dist_contrastive.data.order import Order, SampleOrder, Tail, nearest_multiples
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.signals import STOP_SIGNALS


class ShardStream:
    """Iterates this rank's part of every global batch.

    A local batch is a dict: `__key__` (list of b strings), `__epoch__` and `__index__` (int64
    [b]; the sample's number in the index), and each decoded field: equal-shaped tensors as
    [b, ...], numbers as [b], all else as lists. Rows come lane by lane, and rank r owns the lanes
    [r L / W, (r + 1) L / W): the local batches of all ranks, one after the other, are the same
    global batch for any number of ranks and workers that divides the lanes.

    All ranks yield the same number of batches. Only the last batch of finite `epochs` with
    tail="carry" may be smaller than B; a rank may then have fewer rows than others, or none.

    Iterating again continues after the last batch that was yielded. A new stream with
    `consumed=` set to another one's `.consumed` continues that one's sequence.

    Args:
        index: a `ShardIndex`, or the folder or index file to load it from.
        global_batch_size: B, samples of one step over all ranks; a multiple of `lanes`.
        lanes: L, parts in which an epoch is read; a multiple of world_size x workers. Part of
            what defines the order, so it stays fixed while ranks and workers may change.
        seed: of the order.
        rank, world_size: which part of the lanes is read here.
        num_workers: processes that read and decode ahead; 0 reads in this one.
        consumed: global samples already consumed, from which to go on.
        epochs: passes over the data; None for an endless stream.
        shuffle_window: samples of a lane shuffled among each other; 1 shuffles none.
        tail: "carry": an epoch's tail begins the first batch of the next one, so that every
            sample is seen once per epoch; "drop": what does not fill a batch is left out.
        balance: class-balanced batches in the order of `BalancedOrder` instead, without end:
            `epochs` must be None; `shuffle_window` and `tail` do not apply.
        only: the fields to decode, the others are left as bytes; None decodes all.

    Raises:
        ConfigError: settings that are impossible or do not fit; before any sample is read.
        DataError: no usable shards; while iterating, samples that cannot be read or lack a
            field that others of the batch have.
    """

    def __init__(
        self,
        index: ShardIndex | Path | str,
        *,
        global_batch_size: int,
        lanes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        consumed: int = 0,
        epochs: int | None = None,
        shuffle_window: int = 4096,
        tail: Tail = "carry",
        balance: Balance | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        _check_division(global_batch_size, lanes, rank, world_size, num_workers)
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs={epochs} is below 1; set 1 or more, or none for endless")
        self.index = index if isinstance(index, ShardIndex) else ShardIndex.load(index)
        self.order: Order
        if balance is None:
            self.order = SampleOrder(
                self.index.shard_samples,
                global_batch_size=global_batch_size,
                lanes=lanes,
                seed=seed,
                shuffle_window=shuffle_window,
                tail=tail,
            )
        else:
            self.order = balance.order(len(self.index), global_batch_size, lanes, seed)
        self.order.check_consumed(consumed, epochs)
        self.epochs = epochs
        self.num_workers = num_workers
        self.only = only
        self.lanes = _split(range(lanes), rank, world_size)
        self._consumed = consumed

    @property
    def consumed(self) -> int:
        """Global samples of all batches yielded so far, those before a resume included."""
        return self._consumed

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, before any tail is dropped."""
        return self.order.num_samples

    @property
    def num_batches(self) -> int | None:
        """Batches of all epochs from the very start, or None if the stream is endless."""
        total = self._total
        return None if total is None else -(-total // self.order.global_batch_size)

    @property
    def _total(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.order.samples_per_epoch

    def __iter__(self) -> Generator[Batch]:
        reader = _LaneReader(
            self.index, self.order, self.lanes, self._consumed, self._total, self.only
        )
        batches = _read_here(reader) if self.num_workers == 0 else self._read_by_workers(reader)
        for stop, batch in batches:
            self._consumed = stop
            yield batch

    def _read_by_workers(self, reader: "_LaneReader") -> Iterator[tuple[int, Batch]]:
        """Join the parts of each batch; the loader asks the workers in turn, in their order."""
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
            # The loader draws a base seed; from the global generator that would make the
            # model's own random numbers depend on the number of workers.
            generator=torch.Generator(),
        )
        parts: Any = iter(loader)
        # Workers ignore signals, so an exit that only signals and then awaits them would hang.
        atexit.register(parts._shutdown_workers)
        try:
            while (first := next(parts, None)) is not None:
                received = [first, *(next(parts) for _ in range(1, self.num_workers))]
                for part in received:
                    if isinstance(part, _Failure):
                        raise DataError(part.message)
                yield received[0][0], join_batches([part for _, part in received])
        finally:
            parts._shutdown_workers()  # now, even while an exception holds this frame
            atexit.unregister(parts._shutdown_workers)


class _Failure:
    """A worker's DataError. The loader would wrap an exception's text in a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _LaneReader(IterableDataset[Any]):
    """Reads the samples of some lanes, step by step.

    Iterated in a worker, it yields that worker's part of every step as (samples consumed after
    the step, batch), or a `_Failure` and then ends.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        lanes: range,
        consumed: int,
        total: int | None,
        only: Collection[str] | None,
    ) -> None:
        self.index = index
        self.order = order
        self.lanes = lanes
        self.consumed = consumed
        self.total = total
        self.only = only

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        lanes = self.lanes
        if worker is not None:
            lanes = _split(lanes, worker.id, worker.num_workers)
        try:
            yield from self.steps(lanes)
        except DataError as error:
            yield _Failure(str(error))

    def steps(self, lanes: range) -> Iterator[tuple[int, Batch]]:
        """Samples consumed after each step, and the rows of the given lanes in it."""
        start = self.consumed
        while self.total is None or start < self.total:
            stop = start + self.order.global_batch_size
            if self.total is not None:
                stop = min(stop, self.total)
            yield stop, self._batch(lanes, start, stop)
            start = stop

    def _batch(self, lanes: range, start: int, stop: int) -> Batch:
        """Rows of the given lanes between two numbers of consumed samples."""
        rows = [sample for lane in lanes for sample in self._samples(lane, start, stop)]
        if rows:
            return collate(rows)
        # Some sample tells the fields, types and shapes of the empty batch.
        last = self.order.position(lanes[0], stop) - 1
        epochs, numbers = self.order.samples(lanes[0], last, last + 1)
        return without_rows(collate([self._read(int(epochs[0]), int(numbers[0]))]))

    def _samples(self, lane: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        positions = (self.order.position(lane, consumed) for consumed in (start, stop))
        epochs, numbers = self.order.samples(lane, *positions)
        for epoch, number in zip(epochs.tolist(), numbers.tolist(), strict=True):
            yield self._read(epoch, number)

    def _read(self, epoch: int, number: int) -> dict[str, Any]:
        sample = self.index.read(number, self.only)
        return {**sample, "__epoch__": epoch, "__index__": number}


def _read_here(reader: _LaneReader) -> Iterator[tuple[int, Batch]]:
    return reader.steps(reader.lanes)


def _split(lanes: range, part: int, parts: int) -> range:
    """The part-th of equal, consecutive parts."""
    size = len(lanes) // parts
    return lanes[part * size : (part + 1) * size]


def _unchanged(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    """Leave signals to the main process: a forked worker inherits its handlers.

    Ctrl-C, a scheduler's warning and torchrun's SIGTERM reach every process of the group; a worker
    that died of one would take the rank along before it has saved. Workers still end with their
    rank: the loader tells them, and each looks every few seconds whether its parent lives.
    """
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def _check_division(batch: int, lanes: int, rank: int, world_size: int, workers: int) -> None:
    """Ranks and workers must divide the lanes, and the fix is in the message."""
    if world_size < 1:
        raise ConfigError(f"world_size={world_size} is below 1; set world_size=1 or more")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank={rank} is outside 0..{world_size - 1} for world_size={world_size}; "
            f"set rank={min(max(rank, 0), world_size - 1)}"
        )
    if workers < 0:
        raise ConfigError(f"num_workers={workers} is negative; set num_workers=0 or more")
    readers = world_size * max(1, workers)
    if lanes >= 1 and lanes % readers:
        raise ConfigError(
            f"lanes={lanes} is not divisible by world_size={world_size} x "
            f"num_workers={workers}, which makes {readers} readers; "
            f"{_division_fix(batch, lanes, world_size, workers)}"
        )


def _division_fix(batch: int, lanes: int, world_size: int, workers: int) -> str:
    readers = world_size * max(1, workers)
    fixes = []
    if lanes % world_size == 0:
        fits = [n for n in range(1, workers) if lanes % (world_size * n) == 0]
        fixes.append(f"set num_workers={fits[-1]}")
    if batch % readers == 0:
        fits = [n for n in range(readers, batch + 1, readers) if batch % n == 0]
        fixes.append(f"set lanes={min(fits, key=lambda n: abs(n - lanes))}")
    if not fixes:
        lanes_text = nearest_multiples(lanes, readers)
        fixes.append(f"set lanes={lanes_text} and a global_batch_size that is a multiple of them")
    return " or ".join(fixes)
