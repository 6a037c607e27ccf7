"""How well the orders of stream.py's table shuffle: numbers alone, nothing is read.

An order is an array of sample numbers, in the sequence in which batches hold them, and the lane
of each. Samples are sorted by class, so that a number tells the class.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from dist_contrastive.data.stream.order import SampleOrder

Numbers = NDArray[np.int64]


class Layout(NamedTuple):
    """A data set that is sorted by class."""

    samples: int
    classes: int
    shards: int
    batch: int

    @property
    def per_shard(self) -> int:
        """Samples of each shard."""
        return self.samples // self.shards


Epoch = Callable[[int], tuple[Numbers, Numbers]]
"""Numbers and lanes of an epoch."""


def ours(layout: Layout, lanes: int, window: int) -> Epoch:
    """The order of ShardStream, whose epochs follow each other without a seam."""
    order = SampleOrder(
        [layout.per_shard] * layout.shards,
        global_batch_size=layout.batch,
        lanes=lanes,
        seed=0,
        shuffle_window=window,
        tail="carry",
    )

    def epoch(which: int) -> tuple[Numbers, Numbers]:
        numbers, of_lane = [], []
        begin, end = which * layout.samples, (which + 1) * layout.samples
        for start in range(begin, end, layout.batch):
            stop = min(start + layout.batch, end)
            for lane in range(lanes):
                span = order.position(lane, start), order.position(lane, stop)
                numbers.append(order.samples(lane, *span)[1])
                of_lane.append(np.full(len(numbers[-1]), lane, np.int64))
        return np.concatenate(numbers), np.concatenate(of_lane)

    return epoch


def plain(layout: Layout, buffer: int) -> Epoch:
    """One process of webdataset: its shards in a random order, then its shuffle buffer."""

    def epoch(which: int) -> tuple[Numbers, Numbers]:
        rng = random.Random(which)
        shards = rng.sample(range(layout.shards), layout.shards)
        in_order = (s * layout.per_shard + i for s in shards for i in range(layout.per_shard))
        numbers = np.fromiter(shuffle(buffer, rng=rng)(in_order), np.int64, layout.samples)
        return numbers, np.zeros_like(numbers)

    return epoch


def full(layout: Layout) -> Epoch:
    """A random permutation of all samples."""

    def epoch(which: int) -> tuple[Numbers, Numbers]:
        numbers = np.random.default_rng(which).permutation(layout.samples)
        return numbers, np.zeros_like(numbers)

    return epoch


class Quality(NamedTuple):
    """See `quality`."""

    neighbours: float
    within_lane: float
    classes: float
    distance: float
    epochs: float


def quality(layout: Layout, epoch: Epoch) -> Quality:
    """Measures of an order.

    Returns:
        neighbours: correlation of the numbers of samples next to each other in the sequence.
        within_lane: the same of samples next to each other in a lane.
        classes: mean number of different classes in a batch.
        distance: mean total variation between the classes of a batch and a uniform distribution.
        epochs: correlation of a sample's places in two epochs.
    """
    (first, lanes), (second, _) = epoch(0), epoch(1)
    by_lane = np.argsort(lanes, kind="stable")
    follows = np.diff(lanes[by_lane]) == 0
    classes, distance = _batch_figures(layout, first)
    return Quality(
        neighbours=_correlation(first[:-1], first[1:]),
        within_lane=_correlation(first[by_lane][:-1][follows], first[by_lane][1:][follows]),
        classes=classes,
        distance=distance,
        epochs=_correlation(np.argsort(first), np.argsort(second)),
    )


def expected_classes(layout: Layout) -> float:
    """Different classes of a batch that is drawn at random without replacement."""
    of_class = layout.samples // layout.classes
    others = layout.samples - of_class - np.arange(layout.batch)
    absent = np.prod(others / (layout.samples - np.arange(layout.batch)))
    return float(layout.classes * (1 - absent))


def _batch_figures(layout: Layout, numbers: Numbers) -> tuple[float, float]:
    whole = len(numbers) // layout.batch
    classes = numbers[: whole * layout.batch] * layout.classes // layout.samples
    counts = np.stack(
        [np.bincount(x, minlength=layout.classes) for x in classes.reshape(whole, layout.batch)]
    )
    distances = np.abs(counts / layout.batch - 1 / layout.classes).sum(axis=1) / 2
    return float((counts > 0).sum(axis=1).mean()), float(distances.mean())


def _correlation(x: Numbers, y: Numbers) -> float:
    return float(np.corrcoef(x, y)[0, 1])
