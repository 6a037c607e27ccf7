"""Pairs and keys that a forward pass keeps for its backward."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from dist_contrastive.pairwise.keys import KeySource, RingKeys, WholeKeys
from dist_contrastive.pairwise.pairs import Pairs


def remember(ctx: Any, pairs: Pairs, source: KeySource | None, *others: Tensor) -> None:
    """Keep all that `recall` returns as saved tensors, which autograd frees after backward."""
    held: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(source, WholeKeys):
        held = source.keys, source.tags, source.factors
    scale = pairs.scale if isinstance(pairs.scale, Tensor) else None
    own = pairs.rows, pairs.keys, pairs.tags, pairs.bias, scale, *(pairs.factors or (None, None))
    ctx.save_for_backward(*own, *held, *others)
    nothing = pairs.rows.new_empty(0)
    ctx.setting = replace(
        pairs, rows=nothing, keys=nothing, tags=None, bias=None, scale=None, factors=None
    )


def recall(ctx: Any) -> tuple[Pairs, KeySource | None, tuple[Tensor, ...]]:
    """Pairs, keys (None where none were given) and tensors that were kept. Collectives: none."""
    rows, keys, tags, bias, scale, *factors = ctx.saved_tensors[:7]
    saved = ctx.saved_tensors[7:]
    given = {"factors": None if factors[0] is None else tuple(factors), "bias": bias}
    pairs = replace(ctx.setting, rows=rows, keys=keys, tags=tags, scale=scale, **given)
    if pairs.keys_from == "ring":
        return pairs, RingKeys(pairs), saved[3:]
    return pairs, None if saved[0] is None else WholeKeys(pairs, *saved[:3]), saved[3:]
