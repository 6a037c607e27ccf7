"""The order in which samples are read, as a pure function: no files, no state that matters.

Epoch e: the shards are permuted by a generator keyed (seed, e). Their concatenation has N
positions and is cut into L lanes, in lane order, of length

    len_l(e) = floor(((e + 1) N + l) / L) - floor((e N + l) / L).

Lengths differ by at most one and sum to N. After e epochs lane l has given floor((e N + l) / L)
samples, so lanes never drift apart, however many epochs. Inside a lane, windows of
`shuffle_window` samples are each permuted by a generator keyed (seed, e, lane, window).

A global batch takes B / L samples of every lane. When c samples have been consumed over all
lanes, lane l stands at position floor((c + l) / L): one number describes the whole state.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.errors import ConfigError

Tail = Literal["carry", "drop"]
Rows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Epochs and sample numbers, int64 [n] both."""

# First word of a generator's key. Without it the shards of an epoch and a window could share a
# stream: SeedSequence pads short keys with zeros.
_SHARD_KEY, _WINDOW_KEY = 0, 1


def nearest_multiples(value: int, step: int, lowest: int = 1, highest: int | None = None) -> str:
    """The multiples of `step` around `value` within the limits, worded: "96 or 104".

    Empty if there is none.
    """
    below = value // step * step
    if highest is not None:
        below = min(below, highest // step * step)
    fits = [x for x in (below, below + step) if x >= lowest and (highest is None or x <= highest)]
    return " or ".join(str(x) for x in fits)


class Order(Protocol):
    """Interface of the orders: `SampleOrder`, `BalancedOrder`, `WeightedOrder`."""

    @property
    def num_samples(self) -> int:
        """N, samples of the data set."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch gives."""

    @property
    def global_batch_size(self) -> int:
        """B, samples of one step over all ranks."""

    @property
    def lanes(self) -> int:
        """L, equal parts in which each batch is read."""

    @property
    def seed(self) -> int:
        """What the order depends on besides the data set."""

    def position(self, lane: int, consumed: int) -> int:
        """Position of `lane` after `consumed` samples of all lanes together."""

    def samples(self, lane: int, start: int, stop: int) -> Rows:
        """Epochs and sample numbers at positions [start, stop) of a lane."""

    def upcoming(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers of samples to fetch while these positions are read, since they come soon."""

    def alternatives(self, number: int) -> Sequence[int] | NDArray[np.int64]:
        """Numbers of samples of which one may take the place of this one."""

    def check_consumed(self, consumed: int, epochs: int | None) -> None:
        """Refuse a resume point at which no batch of this order begins, by a ConfigError."""


class _EpochLayout(NamedTuple):
    """Where the positions of one epoch's concatenation lie."""

    shards: NDArray[np.int64]  # [S] shard numbers in this epoch's order
    shard_starts: NDArray[np.int64]  # [S] first position of each of them
    lane_starts: NDArray[np.int64]  # [L + 1] first position of each lane, then N


class SampleOrder:
    """Maps (lane, position in the lane) to (epoch, sample number).

    Random access is cheap: a position costs one window of its lane and, once per epoch, the
    permutation of the shards. One window per lane and two epochs are kept, never the history.

    Args:
        shard_samples: [S] number of samples of each shard; samples are numbered through them.
        global_batch_size: B, samples of one step over all ranks; a multiple of `lanes`.
        lanes: L, equal parts in which an epoch is read; fixed by the config, not the machine.
        seed: not negative.
        shuffle_window: samples of a lane that are shuffled among each other; 1 shuffles none.
        tail: "carry" lets the tail of an epoch begin the first batch of the next one; "drop"
            gives floor(N / B) batches of every epoch and leaves out the rest of that epoch.

    Raises:
        ConfigError: a value that is out of range or does not fit the others.
    """

    def __init__(
        self,
        shard_samples: ArrayLike,
        *,
        global_batch_size: int,
        lanes: int,
        seed: int,
        shuffle_window: int,
        tail: Tail,
    ) -> None:
        check_batch(global_batch_size, lanes, seed)
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.num_samples = int(self.shard_samples.sum())
        if global_batch_size > self.num_samples:
            raise ConfigError(_batch_too_large(global_batch_size, self.num_samples, lanes))
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.tail = tail
        self._first_numbers = np.cumsum(self.shard_samples) - self.shard_samples
        self._layouts: dict[int, _EpochLayout] = {}
        self._windows: dict[int, tuple[int, int, NDArray[np.int64]]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch gives: N, or with tail="drop" the whole batches of N."""
        if self.tail == "drop":
            return self.num_samples // self.global_batch_size * self.global_batch_size
        return self.num_samples

    def position(self, lane: int, consumed: int) -> int:
        """Position of `lane` after `consumed` samples of all lanes together."""
        return (consumed + lane) // self.lanes

    def samples(self, lane: int, start: int, stop: int) -> Rows:
        """Epochs and sample numbers at positions [start, stop) of a lane."""
        epochs: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        numbers: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset, left = self._locate(lane, start)
            window, inner = divmod(offset, self.shuffle_window)
            shuffled = self._window(lane, epoch, window)
            part = shuffled[inner : inner + min(stop - start, left)]
            numbers.append(part)
            epochs.append(np.full(len(part), epoch, np.int64))
            start += len(part)
        return np.concatenate(epochs), np.concatenate(numbers)

    def upcoming(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Samples one window further on, in the order of the tars.

        So, when the lane enters a window, all of it has been named, at an even pace.
        """
        start, stop = start + self.shuffle_window, stop + self.shuffle_window
        numbers = [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset, left = self._locate(lane, start)
            layout, count = self._layout(epoch), min(stop - start, left)
            first = int(layout.lane_starts[lane]) + offset
            numbers.append(self._numbers(layout, np.arange(first, first + count)))
            start += count
        return np.concatenate(numbers)

    def alternatives(self, number: int) -> range:
        """All samples."""
        return range(self.num_samples)

    def check_consumed(self, consumed: int, epochs: int | None) -> None:
        """Refuse a resume point at which no batch of this order begins.

        Raises:
            ConfigError: `consumed` is negative, past the last epoch or between two batches.
        """
        total = None if epochs is None else epochs * self.samples_per_epoch
        if consumed < 0:
            raise ConfigError(f"consumed={consumed} is negative; start at consumed=0")
        if total is not None and consumed > total:
            raise ConfigError(
                f"consumed={consumed} is past the {total} samples of epochs={epochs}; "
                f"set epochs={-(-consumed // self.samples_per_epoch)} or more"
            )
        # With "carry" the end of an epoch is a resume point too: a finished run may go on.
        step, name = self.global_batch_size, "global_batch_size"
        if self.tail == "carry":
            step, name = self.lanes, "lanes"
            if consumed % self.num_samples == 0:
                return
        if consumed % step:
            raise ConfigError(
                f"consumed={consumed} is not a multiple of {name}={step}, which "
                f'tail="{self.tail}" needs; use {nearest_multiples(consumed, step, 0)}, '
                "or the settings of the run that is resumed"
            )

    def _locate(self, lane: int, position: int) -> tuple[int, int, int]:
        """Epoch of a lane position, offset within it, and positions left in that epoch."""
        if self.tail == "drop":
            used = self.samples_per_epoch // self.lanes
            epoch, offset = divmod(position, used)
            return epoch, offset, used - offset
        # The last epoch whose start floor((e N + l) / L) is not after the position.
        epoch = ((position + 1) * self.lanes - 1 - lane) // self.num_samples
        start, stop = self._lane_span(lane, epoch)
        return epoch, position - start, stop - position

    def _lane_span(self, lane: int, epoch: int) -> tuple[int, int]:
        start = (epoch * self.num_samples + lane) // self.lanes
        return start, ((epoch + 1) * self.num_samples + lane) // self.lanes

    def _window(self, lane: int, epoch: int, window: int) -> NDArray[np.int64]:
        """Sample numbers of one window of a lane in one epoch, shuffled."""
        cached = self._windows.get(lane)
        if cached is not None and cached[:2] == (epoch, window):
            return cached[2]
        layout = self._layout(epoch)
        start = int(layout.lane_starts[lane]) + window * self.shuffle_window
        stop = min(start + self.shuffle_window, int(layout.lane_starts[lane + 1]))
        shuffle = keyed_permutation(stop - start, self.seed, _WINDOW_KEY, epoch, lane, window)
        numbers = self._numbers(layout, start + shuffle)
        self._windows[lane] = (epoch, window, numbers)
        return numbers

    def _numbers(self, layout: _EpochLayout, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at positions of an epoch's concatenation."""
        # side="right" skips empty shards: they start where the next one does.
        place = np.searchsorted(layout.shard_starts, positions, side="right") - 1
        return self._first_numbers[layout.shards[place]] + positions - layout.shard_starts[place]

    def _layout(self, epoch: int) -> _EpochLayout:
        if epoch not in self._layouts:
            while len(self._layouts) > 1:  # lanes straddle at most two epochs at a time
                del self._layouts[min(self._layouts)]
            self._layouts[epoch] = self._make_layout(epoch)
        return self._layouts[epoch]

    def _make_layout(self, epoch: int) -> _EpochLayout:
        shards = keyed_permutation(len(self.shard_samples), self.seed, _SHARD_KEY, epoch)
        sizes = self.shard_samples[shards]
        spans = (self._lane_span(lane, epoch) for lane in range(self.lanes))
        lengths = [stop - start for start, stop in spans]
        lane_starts = np.cumsum([0, *lengths], dtype=np.int64)
        return _EpochLayout(shards, np.cumsum(sizes) - sizes, lane_starts)


def check_batch(batch: int, lanes: int, seed: int) -> None:
    """Refuse a global batch that lanes do not divide, by a ConfigError; and a negative seed."""
    if batch % lanes:
        raise ConfigError(
            f"global_batch_size={batch} is not divisible by lanes={lanes}; "
            f"set global_batch_size={nearest_multiples(batch, lanes, 2)}"
        )
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; set seed=0 or more")


def check_whole_batches(consumed: int, epochs: int | None, batch: int, what: str) -> None:
    """Of orders without end, refuse a resume point at which no batch begins, and epochs.

    Raises:
        ConfigError: `consumed` is negative or between two batches; `epochs` are given.
    """
    if epochs is not None:
        raise ConfigError(
            f"epochs={epochs} do not apply to {what}, which have no end; leave out epochs"
        )
    if consumed < 0:
        raise ConfigError(f"consumed={consumed} is negative; start at consumed=0")
    if consumed % batch:
        raise ConfigError(
            f"consumed={consumed} is not a multiple of global_batch_size={batch}, which {what} "
            f"need; use {nearest_multiples(consumed, batch, 0)}, or the settings of the run that "
            f"is resumed"
        )


def _batch_too_large(batch: int, num_samples: int, lanes: int) -> str:
    fits = num_samples // lanes * lanes
    fix = f"set global_batch_size={fits} or less"
    if fits < 2:
        fix = "set fewer lanes and a smaller global_batch_size, or pack more samples"
    return f"global_batch_size={batch} is larger than the {num_samples} samples of one epoch; {fix}"
