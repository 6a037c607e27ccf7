"""Pairs and keys that a forward pass keeps for its backward."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from dist_contrastive.pairwise.keys import KeySource, RingKeys, WholeKeys
from dist_contrastive.pairwise.pairs import Pairs


def remember(ctx: Any, pairs: Pairs, source: KeySource, *others: Tensor) -> None:
    """Keep all that `recall` returns as saved tensors, which autograd frees after backward."""
    held: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(source, WholeKeys):
        held = source.keys, source.tags, source.factors
    factors = pairs.factors or (None, None)
    own = pairs.rows, pairs.keys, pairs.tags, pairs.bias, *factors
    ctx.save_for_backward(*own, *held, *others)
    nothing = pairs.rows.new_empty(0)
    ctx.setting = replace(
        pairs, rows=nothing, keys=nothing, tags=None, bias=None, multiples_of=None, factors=None
    )


def recall(ctx: Any) -> tuple[Pairs, KeySource, tuple[Tensor, ...]]:
    """Pairs, gathered keys and tensors that `remember` kept. Collectives: none."""
    rows, keys, tags, bias, *factors = ctx.saved_tensors[:6]
    saved = ctx.saved_tensors[6:]
    given = {"factors": None if factors[0] is None else tuple(factors), "bias": bias}
    pairs = replace(ctx.setting, rows=rows, keys=keys, tags=tags, **given)
    whole = pairs.keys_from != "ring"
    source = WholeKeys(pairs, *saved[:3]) if whole else RingKeys(pairs)
    return pairs, source, saved[3:]
