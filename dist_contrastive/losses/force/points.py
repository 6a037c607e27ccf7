"""Points of several kinds that interact: rows of this rank against the keys of all, tile by tile.

Of each block of keys those of one kind and label are put side by side, so that a tile has rows of
one kind and keys of one kind, all of one label, and none that do not interact.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dist_contrastive.pairwise.distances import distances
from dist_contrastive.pairwise.keys import Block, open_keys
from dist_contrastive.pairwise.pairs import Pairs, chunks

# The kinds of points, in the order of rows: generated ones, which move; other negatives; data.
GENERATED, FIXED, POSITIVE = 0, 1, 2

# 512 x 512 fp32 distances are 1 MiB; some ten arrays of this size are in use at a time.
_DEFAULT_CHUNK = 512

_CLOSE = 0.1

OfKinds = Callable[[int, int], bool]
"""Something about tiles, by the kind of their rows and the kind of their keys."""


class _Run(NamedTuple):
    """Neighbours that have one kind and label."""

    kind: int
    label: int
    span: slice

    @property
    def size(self) -> int:
        return self.span.stop - self.span.start


@dataclass(frozen=True)
class Tile:
    """Some rows and some keys, which all interact. What is computed of them stays with the tile."""

    g: slice  # which groups
    r: slice  # which rows
    k: slice  # which keys, in the order of `sorting`
    rows: Tensor  # [g, r, D]
    keys: Tensor  # [g, k, D]
    row_kind: int
    kind: int  # of the keys
    label: int  # of all
    at: Tensor  # [k] int64: where the keys are in their block
    self_at: Tensor | None  # [r] int64: where in the block the rows are; None: not among the keys
    is_mirrored: bool  # whether the keys are rows k too; the tile of these, if wanted, comes later
    mirror: "Tile | None"  # the mirrored tile, where it came before and is kept

    @cached_property
    def _found(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Distances, the smallest of each row, and which points coincide."""
        if self.mirror is not None:
            d, coinciding = self.mirror.d.mT.contiguous(), self.mirror.coinciding
            return d, d.amin(-1), None if coinciding is None else coinciding.mT
        same = None if self.self_at is None else self.self_at[:, None] == self.at
        d = distances(self.rows, self.keys, same)
        nearest, coinciding = d.amin(-1), None
        if (nearest == 0).any():
            coinciding = d == 0
            nearest = d.masked_fill_(coinciding, torch.inf).amin(-1)
        return d, nearest, coinciding

    @property
    def d(self) -> Tensor:
        """Distances [g, r, k]; infinite where row and key are the same point, and where they
        coincide, since nothing acts along a distance of 0."""
        return self._found[0]

    @property
    def nearest(self) -> Tensor:
        """The smallest distance of each row [g, r]."""
        return self._found[1]

    @cached_property
    def nearest_of_keys(self) -> Tensor:
        """The smallest distance of each key [g, k]."""
        return self.d.amin(-2)

    @cached_property
    def has_close(self) -> bool:
        """Whether some rows are much closer to a key than to the origin: then sums of keys, less
        sums of rows, have lost the digits of their difference."""
        origin = torch.linalg.vector_norm(self.rows, dim=-1)
        return bool((self.nearest < _CLOSE * origin).any())

    @property
    def coinciding(self) -> Tensor | None:
        """Where two points are in the same place: bool [g, r, k], None for nowhere."""
        return self._found[2]

    @property
    def lengths(self) -> Tensor:
        """The distances with 0 in the place of infinity."""
        if self.self_at is None and self.coinciding is None:
            return self.d
        return self.d.masked_fill(self.d == torch.inf, 0.0)

    @property
    def num_pairs(self) -> int:
        """Of one group; a point with itself counts."""
        return self.rows.shape[1] * self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        """What keeping it costs."""
        return len(self.rows) * self.num_pairs * self.rows.element_size()


class Points:
    """Rows of this rank and the keys that they interact with, in G independent groups.

    Args:
        pairs: rows [R, G, D], which are this rank's keys too, near the origin, since distances are
            rounded relative to norms; tags [R, 2] int64, kind and label, in the order of `sorting`.
        chunk_size: rows and keys of a tile; None chooses.
        cache_mb: distances that are kept from pass to pass take up to so many MiB; the others are
            computed again in each. Keys from a ring pass by, and nothing of them is kept.

    Collectives: see `open_keys`.
    """

    def __init__(self, pairs: Pairs, chunk_size: int | None, cache_mb: float) -> None:
        assert pairs.tags is not None, "tags tell the kinds"
        self.rows = pairs.rows.transpose(0, 1).contiguous()  # [G, R, D]
        self.labels = pairs.tags[:, 1]  # [R]
        self.source = open_keys(pairs)
        self.pairs = pairs
        self._kept: dict[tuple[int, ...], Tile] = {}
        self._budget = 0.0 if pairs.keys_from == "ring" else cache_mb * 2**20
        self._keys_are_rows = len(pairs.sizes) == 1
        self._chunk_size = chunk_size or _DEFAULT_CHUNK
        self._runs = _runs(pairs.tags)
        self.num_generated = sum(run.size for run in self._runs if run.kind == GENERATED)

    def tiles(
        self, wanted: OfKinds, *extras: Tensor, once: OfKinds | None = None
    ) -> Iterator[tuple[Tile, tuple[Tensor, ...]]]:
        """All pairs that interact, and the extras of each tile's keys, each [k, ...].

        Args:
            wanted: which of the tiles.
            extras: numbers of the rows of this rank [R, ...], which travel with them as keys.
            once: of which tiles the mirrored ones are left out, where there are such: all keys are
                rows of this rank. None: of none.

        Collectives: those of one round over the keys, see `KeySource.blocks`.
        """
        for block in self.source.blocks(*extras):
            assert block.tags is not None
            order = sorting(block.tags)
            in_order = torch.equal(order, torch.arange(len(order), device=order.device))
            sorted_extras = block.extras if in_order else [x[order] for x in block.extras]
            for tile in self._tiles(block, order, in_order, wanted, once):
                yield tile, tuple(x[tile.k] for x in sorted_extras)

    def _tiles(
        self, block: Block, order: Tensor, in_order: bool, wanted: OfKinds, once: OfKinds | None
    ) -> Iterator[Tile]:
        assert block.tags is not None
        for keys in _runs(block.tags[order]):
            row_runs = [
                x for x in self._runs if x.label == keys.label and wanted(x.kind, keys.kind)
            ]
            for k in chunks(keys.span, self._chunk_size) if row_runs else ():
                at = order[k]
                points = (
                    (block.keys[k] if in_order else block.keys[at]).transpose(0, 1).contiguous()
                )
                for rows in row_runs:
                    alone = once is not None and once(rows.kind, keys.kind)
                    for r in chunks(rows.span, self._chunk_size):
                        if alone and self._keys_are_rows and r.start > k.start:
                            continue
                        self_at = self._own(r, block.first, at) if rows.kind == keys.kind else None
                        for g in self._chunks_of_groups((r.stop - r.start) * len(at)):
                            yield self._kept.get((k.start, r.start, g.start)) or self._keep(
                                (k.start, r.start, g.start),
                                Tile(
                                    g, r, k, self.rows[g, r], points[g],
                                    rows.kind, keys.kind, keys.label, at, self_at,
                                    self._keys_are_rows and r.start < k.start,
                                    self._mirror(k.start, r.start, g.start),
                                ),
                            )  # fmt: skip

    def _mirror(self, k: int, r: int, g: int) -> Tile | None:
        """The tile that is kept of the same points, where rows and keys are in one order."""
        return self._kept.get((r, k, g)) if self._keys_are_rows and r != k else None

    def _own(self, r: slice, first: int, at: Tensor) -> Tensor | None:
        """Where in their block rows are, if some of them are among the keys `at`."""
        begin, end = (self.pairs.start + x - first for x in (r.start, r.stop))
        if not ((at >= begin) & (at < end)).any():
            return None
        return torch.arange(begin, end, device=at.device)

    def _chunks_of_groups(self, num_pairs: int) -> Iterator[slice]:
        """Of which a tile holds as many as make it as large as one of a single large group."""
        return chunks(slice(0, len(self.rows)), max(1, self._chunk_size**2 // num_pairs))

    def _keep(self, place: tuple[int, ...], tile: Tile) -> Tile:
        if tile.mirror is None and tile.num_bytes <= self._budget:
            self._budget -= tile.num_bytes
            self._kept[place] = tile
        return tile


def sorting(tags: Tensor) -> Tensor:
    """The order [R] that puts equal tags [R, 2] side by side, sorted by kind, then by label."""
    order = tags[:, 1].argsort(stable=True)
    return order[tags[order, 0].argsort(stable=True)]


def _runs(tags: Tensor) -> list[_Run]:
    """Of sorted tags [R, 2]."""
    if len(tags) == 0:
        return []
    starts = [0, *(1 + (tags[1:] != tags[:-1]).any(1).nonzero().flatten()).tolist()]
    spans = itertools.pairwise([*starts, len(tags)])
    values = tags[starts].tolist()
    return [_Run(k, label, slice(*s)) for (k, label), s in zip(values, spans, strict=True)]
