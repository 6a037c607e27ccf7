"""Several sources with weights, as a pure function: no state that matters.

Weights are whole numbers, T their sum after division by their greatest common divisor. The
positions of a lane are cut into rounds of T; in every round each source takes as many positions as
its weight says, at places permuted by a key (seed, lane, round). The n-th of its positions in a
lane gets the n-th sample of that lane in the source's own endless order (`SampleOrder` with
tail="carry"), so that each sample is seen once in every epoch of its source, whatever the weights.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_contrastive.data.keyed_random import keyed_number, keyed_permutation
from dist_contrastive.data.stream.order import (
    Rows,
    SampleOrder,
    check_batch,
    check_whole_batches,
)
from dist_contrastive.errors import ConfigError

# First word of a generator's key; `order` and `balanced` have those below.
_ROUND_KEY, _SOURCE_KEY = 5, 7
_MAX_SEED = 2**62
_MAX_ROUND = 4096  # positions; a round is kept in memory for each lane


class WeightedOrder:
    """Maps (lane, position in the lane) to (epoch of the source, sample number).

    The stream has no end. Samples are numbered through all sources.

    Args:
        sources: [S] for each source the number of samples of each of its shards.
        weights: S whole numbers, how many of every sum(weights) samples of a lane are of a source.
        global_batch_size: B, samples of one step over all ranks; a multiple of `lanes`.
        lanes, seed, shuffle_window: as of `SampleOrder`.

    Raises:
        ConfigError: a value that is out of range or does not fit the others.
    """

    def __init__(
        self,
        sources: Sequence[ArrayLike],
        weights: Sequence[int],
        *,
        global_batch_size: int,
        lanes: int,
        seed: int,
        shuffle_window: int,
    ) -> None:
        check_batch(global_batch_size, lanes, seed)
        self._weights = _lowest_terms(weights)
        self._round = sum(self._weights)
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self.seed = seed
        self._orders = [
            _source_order(number, shards, (weight, self._round), global_batch_size, lanes, seed,
                          shuffle_window)
            for number, (shards, weight) in enumerate(zip(sources, self._weights, strict=True))
        ]  # fmt: skip
        sizes = [order.num_samples for order in self._orders]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._rounds: dict[int, tuple[int, NDArray[np.int64]]] = {}

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return int(self._starts[-1])

    @property
    def samples_per_epoch(self) -> int:
        """As many samples as all sources have, to count by; no epoch begins or ends there."""
        return self.num_samples

    def position(self, lane: int, consumed: int) -> int:
        """Position of `lane` after `consumed` samples, in whole batches, of all lanes together."""
        return consumed // self.lanes

    def samples(self, lane: int, start: int, stop: int) -> Rows:
        """Epochs of their sources and sample numbers at positions [start, stop) of a lane."""
        which = self._sources(lane, start, stop)
        epochs, numbers = np.empty(len(which), np.int64), np.empty(len(which), np.int64)
        for source, (order, span) in enumerate(self._spans(lane, start, stop)):
            chosen = which == source
            epochs[chosen], own = order.samples(lane, *span)
            numbers[chosen] = own + self._starts[source]
        return epochs, numbers

    def upcoming(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Samples that will be read soon after these positions, as of `SampleOrder`."""
        parts = [
            order.upcoming(lane, *span) + self._starts[source]
            for source, (order, span) in enumerate(self._spans(lane, start, stop))
        ]
        return np.concatenate(parts)

    def alternatives(self, number: int) -> range:
        """Samples of the same source."""
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return range(int(self._starts[source]), int(self._starts[source + 1]))

    def check_consumed(self, consumed: int, epochs: int | None) -> None:
        """Refuse a resume point at which no batch begins, and epochs, by a ConfigError."""
        check_whole_batches(consumed, epochs, self.global_batch_size, "weighted sources")

    def _spans(self, lane: int, start: int, stop: int) -> list[tuple[SampleOrder, tuple[int, int]]]:
        """Of each source its order, and the positions in the source's lane."""
        before, after = (self._counts(lane, position) for position in (start, stop))
        spans = zip(before, after, strict=True)
        return list(zip(self._orders, spans, strict=True))

    def _counts(self, lane: int, position: int) -> list[int]:
        """How many of the first positions of a lane each source has."""
        whole, rest = divmod(position, self._round)
        begun = np.bincount(self._places(lane, whole)[:rest], minlength=len(self._weights))
        return [whole * w + n for w, n in zip(self._weights, begun.tolist(), strict=True)]

    def _sources(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Source of each of these positions."""
        first, last = start // self._round, -(-stop // self._round)
        rounds = [np.empty(0, np.int64), *(self._places(lane, n) for n in range(first, last))]
        begin = first * self._round
        return np.concatenate(rounds)[start - begin : stop - begin]

    def _places(self, lane: int, number: int) -> NDArray[np.int64]:
        """Source of each position of one round of a lane."""
        cached = self._rounds.get(lane)
        if cached is None or cached[0] != number:
            shuffle = keyed_permutation(self._round, self.seed, _ROUND_KEY, lane, number)
            sources = np.repeat(np.arange(len(self._weights)), self._weights)
            cached = self._rounds[lane] = (number, sources[shuffle])
        return cached[1]


def _lowest_terms(weights: Sequence[int]) -> list[int]:
    if any(weight < 1 for weight in weights):
        raise ConfigError(f"weights {list(weights)} must be 1 or more; leave out a source of 0")
    divisor = math.gcd(*weights)
    lowest = [weight // divisor for weight in weights]
    if sum(lowest) > _MAX_ROUND:
        raise ConfigError(
            f"weights {list(weights)} sum to {sum(lowest)} in lowest terms, more than "
            f"{_MAX_ROUND}; use smaller whole numbers in about the same proportion"
        )
    return lowest


def _source_order(
    number: int,
    shards: ArrayLike,
    share: tuple[int, int],
    batch: int,
    lanes: int,
    seed: int,
    window: int,
) -> SampleOrder:
    """The endless order of one source, which must have the samples that one batch takes of it."""
    weight, total_weight = share
    num_samples = -(-batch // lanes * weight // total_weight) * lanes
    total = int(np.sum(np.asarray(shards, dtype=np.int64)))
    if num_samples > total:
        raise ConfigError(
            f"source {number + 1} has {total} samples, fewer than the {num_samples} of a batch of "
            f"{batch} that are its share; lower its weight, or global_batch_size"
        )
    return SampleOrder(
        shards,
        global_batch_size=max(num_samples, 2),
        lanes=lanes,
        seed=keyed_number(_MAX_SEED, seed, _SOURCE_KEY, number),
        shuffle_window=window,
        tail="carry",
    )
