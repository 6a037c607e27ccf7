"""Pairs and keys that a forward pass keeps for its backward."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from dist_contrastive.pairwise.keys import KeySource, RingKeys, WholeKeys
from dist_contrastive.pairwise.pairs import Block, Pairs


def remember(ctx: Any, pairs: Pairs, source: KeySource | None, *others: Tensor) -> None:
    """Keep all that `recall` returns as saved tensors, which autograd frees after backward."""
    block = source.block if isinstance(source, WholeKeys) else None
    records: list[Any] = [x for x in (pairs, block) if x is not None]
    tensors = [_tensors(record) for record in records]
    flat = [x for of_record in tensors for of_field in of_record.values() for x in of_field]
    ctx.save_for_backward(*flat, *others)
    ctx.records = [
        (replace(record, **dict.fromkeys(found)), {name: len(x) for name, x in found.items()})
        for record, found in zip(records, tensors, strict=True)
    ]


def recall(ctx: Any) -> tuple[Pairs, KeySource | None, tuple[Tensor, ...]]:
    """Pairs, keys (None where none were given) and tensors that were kept. Collectives: none."""
    saved = iter(ctx.saved_tensors)
    pairs, *block = (_filled(record, counts, saved) for record, counts in ctx.records)
    source: KeySource | None = WholeKeys(pairs, *block) if block else None
    if pairs.keys_from == "ring":
        source = RingKeys(pairs)
    return pairs, source, tuple(saved)


def _tensors(record: Pairs | Block) -> dict[str, tuple[Tensor | None, ...]]:
    """Those of each field that has any."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    several = {name: x if isinstance(x, tuple) else (x,) for name, x in values.items()}
    return {name: x for name, x in several.items() if x and isinstance(x[0], Tensor)}


def _filled(record: Any, counts: dict[str, int], saved: Iterator[Tensor]) -> Any:
    """The record with the next of the tensors, so many for each field."""
    found = {name: tuple(next(saved) for _ in range(count)) for name, count in counts.items()}
    return replace(record, **{name: x if len(x) > 1 else x[0] for name, x in found.items()})
