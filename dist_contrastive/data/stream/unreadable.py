"""What takes the place of samples that cannot be read: known from the order alone, so that every
rank, at any time, would choose the same."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dist_contrastive.data.keyed_random import keyed_number
from dist_contrastive.data.stream.order import Order
from dist_contrastive.errors import DataError

_REPLACE_KEY = 6  # first word of a generator's key; the orders have those below
MAX_ATTEMPTS = 1000  # draws of a substitute for one sample


class Skipped(NamedTuple):
    """A sample that could not be read, and the one that took its place."""

    epoch: int
    sample: int
    shard: str
    key: str | None
    reason: str
    replaced_by: int  # a sample number


def substitute(order: Order, epoch: int, sample: int, attempt: int) -> int:
    """The sample that takes the place of another one: drawn by a key (seed, epoch, sample, attempt)
    from `order.alternatives(sample)`, which keeps it in its class or source."""
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


def _too_many(found: list[Skipped], max_skipped: int) -> str:
    if max_skipped == 0:
        return found[0].reason
    counts = Counter(one.shard for one in found)
    shards = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{shard} ({count})" for shard, count in shards[:4])
    more = f" and {len(shards) - 4} more" if len(shards) > 4 else ""
    return (
        f"{len(found)} samples cannot be read, more than max_skipped={max_skipped}: in {named}"
        f"{more}; first: {found[0].reason}"
    )
