"""Class-balanced batches, "P classes x K samples", as a pure function: no state that matters.

Step s belongs to round r = s // floor(C / P), where C classes have labels. A round permutes the
classes by a key (seed, r) and gives each of its steps the next P of them, so that a class is drawn
at most once a round. In round r a class takes its turn r: floor(n / K) turns, of K of its n samples
each, make one pass over the class, which is permuted by a key (seed, class, pass); what fills no
turn is left out of that pass. Where P K is less than the batch, the samples without label fill the
rest: they are one more such pool, which takes a turn every step.

So a sample is drawn at most once a pass of its class, and the class gives exactly K floor(n / K)
samples a pass where P divides C (else C mod P classes miss their turn of a round).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import PositiveInt

from dist_contrastive.data.classes import MISSING_CLASS
from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.stream.order import Rows, check_batch, check_whole_batches
from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import Settings

# First word of a generator's key; `order` has 0 and 1.
_ROUND_KEY, _CLASS_KEY, _UNLABELLED_KEY = 2, 3, 4


class Balance:
    """Class-balanced batches of a stream, in the order of `BalancedOrder`.

    Args:
        labels: [N] whole numbers, -1 where missing: one for every sample of the data set.
        classes, samples_per_class: `Config`.
    """

    class Config(Settings):
        """Equal numbers of samples of some classes; unlabelled samples fill the rest."""

        classes: PositiveInt
        """P, different classes of a batch."""
        samples_per_class: PositiveInt
        """K, different samples of each of them."""

    def __init__(self, labels: ArrayLike, classes: int, samples_per_class: int) -> None:
        self.labels = labels
        settings = {"classes": classes, "samples_per_class": samples_per_class}
        self.config = self.Config.checked(settings)

    def order(
        self, num_samples: int, global_batch_size: int, lanes: int, seed: int
    ) -> "BalancedOrder":
        """The order of a data set of `num_samples`.

        Raises:
            ConfigError: as `BalancedOrder`; or there are more or fewer labels than samples.
        """
        order = BalancedOrder(
            self.labels,
            classes=self.config.classes,
            samples_per_class=self.config.samples_per_class,
            global_batch_size=global_batch_size,
            lanes=lanes,
            seed=seed,
        )
        if order.num_samples != num_samples:
            raise ConfigError(
                f"the balance has {order.num_samples} labels, but the data set has {num_samples} "
                f"samples; give it the label table of this data set"
            )
        return order


class BalancedOrder:
    """Maps (lane, position in the lane) to (pass, sample number) for class-balanced batches.

    Every batch has K different samples of each of P different classes, class by class, and then
    B - P K different samples without label. Row j of a batch is in lane j // (B / L). The pass of
    a sample's class takes the place of the epoch: what is drawn again has another one. Random
    access is cheap: a step costs at most a permutation of each class that it draws; one per class
    is kept, never the history. The stream has no end.

    Args:
        labels: [N] whole numbers, -1 where missing.
        classes: P. samples_per_class: K.
        global_batch_size: B, samples of one step over all ranks; a multiple of `lanes`.
        lanes: L, equal parts in which a batch is read; fixed by the config, not the machine.
        seed: not negative.

    Raises:
        ConfigError: a value that is out of range or does not fit the labels.
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        classes: int,
        samples_per_class: int,
        global_batch_size: int,
        lanes: int,
        seed: int,
    ) -> None:
        check_batch(global_batch_size, lanes, seed)
        table = _whole_numbers(labels)
        present, counts = np.unique(table[table != MISSING_CLASS], return_counts=True)
        _check_counts(present, counts, classes, samples_per_class)
        unlabelled = np.flatnonzero(table == MISSING_CLASS)
        rest = global_batch_size - classes * samples_per_class
        _check_rest(rest, len(unlabelled), global_batch_size, classes, samples_per_class)
        self._table = table
        self.num_samples = len(table)
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self.seed = seed
        self._classes_per_step = classes
        by_class = np.split(
            np.argsort(table, kind="stable")[len(unlabelled) :], counts.cumsum()[:-1]
        )
        self._classes = [
            _Pool(members, samples_per_class, seed, (_CLASS_KEY, number))
            for number, members in zip(present.tolist(), by_class, strict=True)
        ]
        self._unlabelled = _Pool(unlabelled, rest, seed, (_UNLABELLED_KEY,)) if rest else None
        self._batches: dict[int, Rows] = {}

    @property
    def samples_per_epoch(self) -> int:
        """As many samples as the data set has, to count by; no pass begins or ends there."""
        return self.num_samples

    def position(self, lane: int, consumed: int) -> int:
        """Position of `lane` after `consumed` samples, in whole batches, of all lanes together."""
        return consumed // self.lanes

    def samples(self, lane: int, start: int, stop: int) -> Rows:
        """Passes and sample numbers at positions [start, stop) of a lane, int64 both."""
        per_lane = self.global_batch_size // self.lanes
        passes: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        numbers: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        while start < stop:
            step, offset = divmod(start, per_lane)
            left = min(stop - start, per_lane - offset)
            rows = slice(lane * per_lane + offset, lane * per_lane + offset + left)
            for parts, column in zip((passes, numbers), self._batch(step), strict=True):
                parts.append(column[rows])
            start += left
        return np.concatenate(passes), np.concatenate(numbers)

    def upcoming(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples of these rows of the next batch."""
        per_lane = self.global_batch_size // self.lanes
        return self.samples(lane, start + per_lane, stop + per_lane)[1]

    def alternatives(self, number: int) -> NDArray[np.int64]:
        """Samples of the same class, or without label too."""
        return np.flatnonzero(self._table == self._table[number])

    def check_consumed(self, consumed: int, epochs: int | None) -> None:
        """Refuse a resume point at which no batch begins, and epochs, by a ConfigError."""
        check_whole_batches(consumed, epochs, self.global_batch_size, "class-balanced batches")

    def _batch(self, step: int) -> Rows:
        """Passes and numbers of the rows of one step; two are kept for the other lanes."""
        if step not in self._batches:
            while len(self._batches) > 1:
                del self._batches[min(self._batches)]
            self._batches[step] = self._make_batch(step)
        return self._batches[step]

    def _make_batch(self, step: int) -> Rows:
        per_step = self._classes_per_step
        number, place = divmod(step, len(self._classes) // per_step)
        order = keyed_permutation(len(self._classes), self.seed, _ROUND_KEY, number)
        drawn = order[place * per_step : (place + 1) * per_step].tolist()
        turns = [self._classes[i].turn(number) for i in drawn]
        if self._unlabelled is not None:
            turns.append(self._unlabelled.turn(step))
        passes = [np.full(len(numbers), which, np.int64) for which, numbers in turns]
        return np.concatenate(passes), np.concatenate([numbers for _, numbers in turns])


class _Pool:
    """Samples [n] that are drawn `size` at a time; a pass gives each of them at most once."""

    def __init__(
        self, members: NDArray[np.int64], size: int, seed: int, key: tuple[int, ...]
    ) -> None:
        self.members = members
        self.size = size
        self.seed = seed
        self.key = key
        self._shuffled: tuple[int, NDArray[np.int64]] | None = None

    def turn(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """The pass of a turn, and its sample numbers [size]."""
        which, place = divmod(number, len(self.members) // self.size)
        if self._shuffled is None or self._shuffled[0] != which:
            shuffle = keyed_permutation(len(self.members), self.seed, *self.key, which)
            self._shuffled = (which, self.members[shuffle])
        return which, self._shuffled[1][place * self.size : (place + 1) * self.size]


def _whole_numbers(labels: ArrayLike) -> NDArray[np.int64]:
    table = np.asarray(labels)
    if table.ndim != 1 or table.dtype.kind not in "iu":
        raise ConfigError(
            f"labels of shape {list(table.shape)} and type {table.dtype} name no classes; balance "
            f"by one whole number a sample (set data.num_classes), or leave out the balance"
        )
    if table.min(initial=MISSING_CLASS) < MISSING_CLASS:
        raise ConfigError(f"label {table.min()} is below 0; number classes from 0, missing is -1")
    return table.astype(np.int64)


def _check_counts(
    present: NDArray[np.int64], counts: NDArray[np.int64], classes: int, samples_per_class: int
) -> None:
    if not len(present):
        raise ConfigError(
            "all labels are missing, so no batch can be class-balanced; set data.label to a field "
            "that holds labels, or leave out the balance"
        )
    if classes > len(present):
        raise ConfigError(
            f"classes={classes} is more than the {len(present)} classes that have labels; "
            f"set classes={len(present)} or less"
        )
    fewest = int(counts.argmin())
    if counts[fewest] < samples_per_class:
        raise ConfigError(
            f"samples_per_class={samples_per_class} is more than the {counts[fewest]} labelled "
            f"samples of class {present[fewest]}; set samples_per_class={counts[fewest]} or less, "
            f"or label more of them"
        )


def _check_rest(
    rest: int, unlabelled: int, batch: int, classes: int, samples_per_class: int
) -> None:
    product = f"classes={classes} x samples_per_class={samples_per_class}"
    labelled = classes * samples_per_class
    if rest < 0:
        raise ConfigError(
            f"{product} makes {labelled} rows, more than global_batch_size={batch}; set fewer, or "
            f"global_batch_size={labelled}"
        )
    if rest > unlabelled:
        raise ConfigError(
            f"{product} leaves {rest} of global_batch_size={batch} rows to samples without label, "
            f"of which there are {unlabelled}; set more of either, or "
            f"global_batch_size={labelled + unlabelled} at most"
        )
