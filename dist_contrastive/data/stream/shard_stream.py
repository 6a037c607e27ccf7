"""Stream of batches: a function of the index, the seed and the number of samples consumed.

The order of samples is that of `order`, `balanced` or `weighted`. Here ranks divide the lanes of
each batch among themselves, and their workers the rows. Neither changes what a global batch is.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt

from dist_contrastive.data.collate import Batch
from dist_contrastive.data.sources import Location, join_sources, open_locations
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.order import Order, SampleOrder, Tail, nearest_multiples
from dist_contrastive.data.stream.reader import Reader, Skipped, Transform, check_skipped
from dist_contrastive.data.stream.weighted import WeightedOrder
from dist_contrastive.data.stream.workers import StartMethod, read_by_workers
from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import Count, Settings, Size

_T = TypeVar("_T")
_POLL_S = 0.1  # between two calls of `stop` while an item is awaited


class ShardStream:
    """Iterates this rank's part of every global batch.

    A local batch is a dict: `__key__` (list of b strings), `__epoch__` and `__index__` (int64
    [b]; the sample's number in the index), and each decoded field: equal-shaped tensors as
    [b, ...], numbers as [b], all else as lists. Rows come lane by lane, and rank r owns the lanes
    [r L / W, (r + 1) L / W): the local batches of all ranks, one after the other, are the same
    global batch for any number of ranks that divides the lanes, and any number of workers.

    All ranks yield the same number of batches. Only the last batch of finite `epochs` with
    tail="carry" may be smaller than B; a rank may then have fewer rows than others, or none.

    Iterating again continues after the last batch that was yielded. A new stream with
    `consumed=` set to another one's `.consumed` continues that one's sequence.

    Args:
        index: a `ShardIndex` or another `Source`, or what `load_index` takes; or several, whose
            samples are numbered through and read as one data set, or by `weights`.
        config, settings: a `Config`, or its settings by name.
        seed: of the order.
        rank, world_size: which part of the lanes is read here.
        consumed: global samples already consumed, from which to go on.
        epochs: passes over the data; None for an endless stream.
        balance: class-balanced batches in the order of `BalancedOrder` instead, without end:
            `epochs` must be None; `shuffle_window` and `tail` do not apply.
        weights: whole numbers, one for each of several sources: the order of `WeightedOrder`,
            without end: `epochs` must be None, `balance` too; `tail` does not apply.
        only: the fields to read, which every sample must have; None reads what there is.
        transform: applied to every decoded sample, in the workers; it sees `__epoch__` and
            `__index__`, by which its random numbers should be keyed.

    Raises:
        ConfigError: settings that are impossible or do not fit; before any sample is read.
        DataError: no usable shards; while iterating, more samples than `max_skipped` cannot be
            read, or some lack a field that others of the batch have.
        UnreachableError: while iterating, a server did not answer.
    """

    class Config(Settings):
        """Order of the samples, and the processes that read them."""

        global_batch_size: int = Field(ge=2, lt=2**31)
        """Samples of one step over all ranks, a multiple of `lanes`: it defines the run, the number
        of ranks does not."""
        lanes: Size = 8
        """Parts in which an epoch is read; the number of ranks must divide it."""
        shuffle_window: PositiveInt = 4096
        """Samples of a lane that are shuffled among each other; 1 shuffles none."""
        tail: Tail = "carry"
        """What becomes of an epoch's rest that fills no batch: it begins the next epoch's first
        batch, or with `drop` is left out."""
        num_workers: int = Field(default=0, ge=0, le=1024)
        """Processes per rank that read ahead; 0 reads in the training process."""
        prefetch_factor: Count = 2
        """Batches by which they may be ahead, which bounds their memory."""
        worker_start: StartMethod = "fork"
        """How they are started; spawn and forkserver take seconds longer, and share no memory."""
        max_skipped: NonNegativeInt = 0
        """Different samples that may be unreadable or lack a field; each is replaced by another
        one."""

    def __init__(
        self,
        index: Location | Sequence[Location],
        config: Config | None = None,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        consumed: int = 0,
        epochs: int | None = None,
        balance: Balance | None = None,
        weights: Sequence[int] | None = None,
        only: Collection[str] | None = None,
        transform: Transform | None = None,
        **settings: Any,
    ) -> None:
        if "start_method" in settings:
            raise ConfigError("start_method is now worker_start; set that")
        if config is None:
            config = self.Config.checked(settings)
        elif settings:
            raise ConfigError(f"{', '.join(settings)} beside a config; give one or the other")
        batch, lanes = config.global_batch_size, config.lanes
        _check_division(batch, lanes, rank, world_size)
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs={epochs} is below 1; set 1 or more, or none for endless")
        sources = open_locations(index)
        self.config = config
        self.index = join_sources(sources)
        if weights is not None:
            _check_weights(weights, len(sources), balance)
            self.order: Order = WeightedOrder(
                [one.shard_samples for one in sources],
                weights,
                global_batch_size=batch,
                lanes=lanes,
                seed=seed,
                shuffle_window=config.shuffle_window,
            )
        elif balance is not None:
            self.order = balance.order(len(self.index), batch, lanes, seed)
        else:
            self.order = SampleOrder(
                self.index.shard_samples,
                global_batch_size=batch,
                lanes=lanes,
                seed=seed,
                shuffle_window=config.shuffle_window,
                tail=config.tail,
            )
        self.order.check_consumed(consumed, epochs)
        self.epochs = epochs
        self.only = only
        self.transform = transform
        self.lanes = range(lanes * rank // world_size, lanes * (rank + 1) // world_size)
        self._consumed = consumed
        self._skipped: list[Skipped] = []
        self._unreadable: dict[int, Skipped] = {}

    @property
    def consumed(self) -> int:
        """Global samples of all batches yielded so far, those before a resume included."""
        return self._consumed

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, before any tail is dropped."""
        return self.order.num_samples

    @property
    def _total(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.order.samples_per_epoch

    def take_skipped(self) -> list[Skipped]:
        """Samples of this rank that were skipped in the batches since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def __iter__(self) -> Generator[Batch]:
        reader = Reader(
            self.index,
            self.order,
            self.lanes,
            self._consumed,
            self._total,
            self.only,
            self.transform,
            self.config.max_skipped,
        )
        parts = reader.parts()
        if self.config.num_workers:
            parts = read_by_workers(
                reader,
                self.config.num_workers,
                self.config.prefetch_factor,
                self.config.worker_start,
            )
        for stop, batch, skipped in parts:
            assert batch is not None
            for one in skipped:
                self._unreadable.setdefault(one.sample, one)
            check_skipped(self._unreadable.values(), self.config.max_skipped)
            self._consumed = stop
            self._skipped += skipped
            yield batch


def _check_weights(weights: Sequence[int], sources: int, balance: Balance | None) -> None:
    if len(weights) != sources:
        raise ConfigError(f"{len(weights)} weights for {sources} sources; give each source one")
    if balance is not None:
        raise ConfigError("weights and balance exclude each other; leave out one of them")


def _check_division(batch: int, lanes: int, rank: int, world_size: int) -> None:
    """Ranks must divide the lanes, and the fix is in the message."""
    if world_size < 1:
        raise ConfigError(f"world_size={world_size} is below 1; set world_size=1 or more")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank={rank} is outside 0..{world_size - 1} for world_size={world_size}; "
            f"set rank={min(max(rank, 0), world_size - 1)}"
        )
    if lanes % world_size:
        raise ConfigError(
            f"lanes={lanes} is not divisible by world_size={world_size}; "
            f"{_division_fix(batch, lanes, world_size)}"
        )


def _division_fix(batch: int, lanes: int, world_size: int) -> str:
    if batch % world_size == 0:
        fits = [n for n in range(world_size, batch + 1, world_size) if batch % n == 0]
        return f"set lanes={min(fits, key=lambda n: abs(n - lanes))}"
    lanes_text = nearest_multiples(lanes, world_size)
    return f"set lanes={lanes_text} and a global_batch_size that is a multiple of them"


class _Item(NamedTuple, Generic[_T]):
    value: _T


class Prefetcher(Generic[_T]):
    """Items of an iterator, in their order, made up to `depth` ahead by a thread.

    The first one is made by the caller, in whose thread processes may be forked. A context manager:
    at its end the thread ends too, after the item that it is making, and closes the iterator; it is
    not awaited for longer than `leave_s` seconds.
    """

    def __init__(self, items: Iterator[_T], depth: int, leave_s: float = 5.0) -> None:
        self._items = items
        self._leave_s = leave_s
        # The one that the thread holds while there is no room is one more.
        self._made: queue.Queue[_Item[_T] | BaseException] = queue.Queue(max(1, depth - 1))
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def get(self, stop: Callable[[], bool] = lambda: False) -> _T | None:
        """The next item; None after the last one, or if `stop` becomes true while it is awaited.

        Raises: what the iterator raised in the place of this item.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._make, daemon=True)
            first = next(self._items, None)
            self._thread.start()
            return first
        while not stop():
            with contextlib.suppress(queue.Empty):
                made = self._made.get(timeout=_POLL_S)
                if isinstance(made, _Item):
                    return made.value
                self._made.put(made)  # for the next call too
                if isinstance(made, StopIteration):
                    return None
                raise made
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread is None or not self._thread.is_alive():
            _close(self._items)
            return
        deadline = time.monotonic() + self._leave_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # it may wait for room
                self._made.get_nowait()
            self._thread.join(_POLL_S / 10)

    def _make(self) -> None:
        try:
            for item in self._items:
                self._made.put(_Item(item))
                if self._stopped.is_set():
                    break
            else:
                self._made.put(StopIteration())
        except BaseException as error:  # all that may end a thread is the caller's
            self._made.put(error)
        finally:
            _close(self._items)


def _close(items: Iterator[_T]) -> None:
    end = getattr(items, "close", None)
    if end is not None:
        end()
