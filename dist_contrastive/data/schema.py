"""Have all samples the fields that are needed? The index tells, before any is read."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.shards.index import ABSENT, ShardIndex
from dist_contrastive.errors import DataError


def check_fields(index: ShardIndex, names: Iterable[str], max_missing: int) -> None:
    """Refuse a data set of which too many samples lack a field.

    Args:
        names: the fields. max_missing: samples that may lack one of them.

    Raises:
        DataError: no sample has it, or more than `max_missing` have not, with a shard and a key.
    """
    for name in sorted(names):
        if name not in index.fields:
            raise DataError(no_field(name, index.fields))
        missing = index.shard_samples - index.field_counts()[:, index.fields.index(name)]
        if missing.sum() > max_missing:
            raise DataError(_missing_in(index, name, missing))


def no_field(name: str, known: Iterable[str]) -> str:
    """That no sample has a field, for a message."""
    return (
        f"samples have no field {name!r}; set data.image, data.label and data.pair to fields "
        f"that they have: {', '.join(known) or 'none'}"
    )


def _missing_in(index: ShardIndex, name: str, missing: NDArray[np.int64]) -> str:
    """Where samples lack a field: a whole shard, or some samples of one."""
    shard = int(missing.argmax())
    count, total = int(missing[shard]), int(index.shard_samples[shard])
    if count == total:
        counts = index.field_counts()[shard]
        others = [field for field, n in zip(index.fields, counts, strict=True) if n]
        return (
            f"shard {index.shards[shard]} has other fields than the rest: its {total} samples hold "
            f"{', '.join(others)}, but none {name!r}; pack all shards alike, or leave it out"
        )
    column = index.fields.index(name)
    first = int(index.shard_starts[shard])
    lacking = index.member_start[first : first + total, column] == ABSENT
    key = index.key(first + int(lacking.argmax()))
    return (
        f"{int(missing.sum())} of {len(index)} samples have no field {name!r}, as {key!r} in shard "
        f"{index.shards[shard]} ({count} there); pack them with one, leave them out, or let them "
        f"be replaced: data.max_skipped={int(missing.sum())}"
    )
