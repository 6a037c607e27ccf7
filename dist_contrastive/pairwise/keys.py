"""Blocks of the keys of all ranks, and the reduction of what is summed for them over ranks.

    for block in source.blocks():              every key once, in one block or several
        reduction.add(sums for the block)      what this rank's rows add to each of its keys
    reduction.finish()                         the sums over all ranks, for this rank's own keys

`WholeKeys` holds the keys of all ranks, gathered once; sums go back by a reduce-scatter. `RingKeys`
holds those of one rank at a time, two while the next arrive, and sums accumulate along the ring:
memory does not depend on the number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.pairs import Block, Pairs

# Blocks and sums are exchanged at the same time: where messages are matched by tag, by these.
_BLOCK_TAG, _SUMS_TAG = 0, 100


@dataclass(frozen=True)
class Join:
    """Operation that combines partial results of a row or key: sums, or log-sum-exps."""

    empty: float
    combine: Callable[..., Tensor]  # (total, part, out=...)
    over_ranks: Callable[..., Tensor]  # (partial, group), differentiable

    def start(self, like: Tensor) -> Tensor:
        """Empty result, one number for every row of `like`.

        In fp64: a softmax is ``exp(score - lse)``, and rounding lse to fp32 would be an error of
        every weight of the row. There are few such numbers beside the scores.
        """
        return like.new_full((len(like),), self.empty, dtype=torch.float64)


SUM = Join(0.0, torch.add, collectives.sum_over_ranks)
LOGSUMEXP = Join(-torch.inf, torch.logaddexp, collectives.logsumexp_over_ranks)


class KeyReduction(Protocol):
    """Reduction over ranks of what is summed for keys, onto the rank that has the key."""

    def add(self, parts: Sequence[Tensor]) -> None:
        """Add this rank's part for the keys of the block just visited, each [k, ...]."""

    def finish(self) -> list[Tensor]:
        """Results for this rank's own keys, each [n, ...], after the last block."""


class KeySource(Protocol):
    """Keys of all ranks, one block after the other."""

    def blocks(self, *extras: Tensor) -> Iterator[Block]:
        """Every key once, with further numbers that this rank has for its own keys [n, ...]."""

    def reduction(self, *joins: Join) -> KeyReduction:
        """Reduction for a single round over the blocks."""


def open_keys(pairs: Pairs) -> KeySource:
    """Keys as `pairs.keys_from` names them. Collectives: gather all-gathers all of them."""
    if pairs.keys_from == "ring":
        return RingKeys(pairs)
    keys = gathered(pairs, pairs.keys)
    beside: Any = {name: gathered(pairs, x) for name, x in pairs.beside_keys.items()}
    return WholeKeys(pairs, Block(0, keys, **beside))


def gathered(pairs: Pairs, x: Tensor) -> Tensor:
    """Rows for the keys of all ranks [B, ...] from those for this rank's keys [n, ...]."""
    if pairs.keys_from == "local":
        return x
    return collectives.gather_rows(x, pairs.sizes, pairs.group)


class WholeKeys:
    """All keys as one block: gathered from all ranks, or only this rank's own (``local``)."""

    def __init__(self, pairs: Pairs, block: Block) -> None:
        self._pairs, self.block = pairs, block

    def blocks(self, *extras: Tensor) -> Iterator[Block]:
        """One block. Collectives: one all-gather for each of the extras."""
        yield replace(self.block, extras=tuple(gathered(self._pairs, x) for x in extras))

    def reduction(self, *joins: Join) -> KeyReduction:
        return _GatheredReduction(self._pairs, joins)


class _GatheredReduction:
    def __init__(self, pairs: Pairs, joins: tuple[Join, ...]) -> None:
        self._pairs, self._joins = pairs, joins
        self._parts: list[Tensor] = []

    def add(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)

    def finish(self) -> list[Tensor]:
        if self._pairs.keys_from == "local":
            return self._parts
        return [self._total(*pair) for pair in zip(self._parts, self._joins, strict=True)]

    def _total(self, part: Tensor, join: Join) -> Tensor:
        pairs = self._pairs
        if join is SUM:
            return collectives.reduce_scatter_rows(part, pairs.sizes, pairs.group)
        return join.over_ranks(part, pairs.group)[pairs.start : pairs.start + len(pairs.keys)]


class RingKeys:
    """Keys of one rank after the other, in a ring exchange."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def blocks(self, *extras: Tensor) -> Iterator[Block]:
        """A block of each rank; the next one arrives while the caller works on this one."""
        pairs, owner = self._pairs, collectives.rank(self._pairs.group)
        sizes, beside = pairs.sizes, pairs.beside_keys
        held = [pairs.keys, *beside.values(), *extras]
        for step in range(len(sizes)):
            following = (owner - 1) % len(sizes)
            last = step == len(sizes) - 1
            arrive = None if last else self._start_shift(held, sizes[following])
            keys, *others = held
            of_block: Any = dict(zip(beside, others, strict=False))
            yield Block(sum(sizes[:owner]), keys, **of_block, extras=tuple(others[len(beside) :]))
            if arrive is not None:
                held, owner = arrive(), following

    def _start_shift(self, held: list[Tensor], rows: int) -> Callable[[], list[Tensor]]:
        return collectives.start_shift(held, rows, _BLOCK_TAG, self._pairs.group)

    def reduction(self, *joins: Join) -> KeyReduction:
        return _RingReduction(self._pairs, joins)


class _RingReduction:
    """Sums follow their block, one step behind it, and after the last step are on its rank."""

    def __init__(self, pairs: Pairs, joins: tuple[Join, ...]) -> None:
        self._pairs, self._joins = pairs, joins
        self._owner = collectives.rank(pairs.group)
        self._arrive: Callable[[], list[Tensor]] | None = None

    def add(self, parts: Sequence[Tensor]) -> None:
        parts = list(parts)
        if self._arrive is not None:
            before = self._arrive()
            parts = [j.combine(a, b) for j, a, b in zip(self._joins, before, parts, strict=True)]
        # What arrives next is of the block that the previous rank has just visited.
        self._owner = (self._owner - 1) % len(self._pairs.sizes)
        rows = self._pairs.sizes[self._owner]
        self._arrive = collectives.start_shift(parts, rows, _SUMS_TAG, self._pairs.group)

    def finish(self) -> list[Tensor]:
        assert self._arrive is not None, "no block was visited"
        return self._arrive()
