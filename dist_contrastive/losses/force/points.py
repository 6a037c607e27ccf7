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
from dist_contrastive.pairwise.keys import open_keys
from dist_contrastive.pairwise.pairs import Block, Pairs, chunks

# The kinds of points, in the order of rows: generated ones, which move; other negatives; data.
GENERATED, FIXED, POSITIVE = 0, 1, 2
Counts = tuple[int, int, int]
"""Numbers of points of each kind."""

# 512 x 512 fp32 distances are 1 MiB; some ten arrays of this size are in use at a time.
_DEFAULT_CHUNK = 512

_CLOSE = 0.1

KindFilter = Callable[[int, int], bool]
"""Predicate on tiles, by the kind of their rows and the kind of their keys."""


class _Run(NamedTuple):
    """Neighbours in a sorted order that have one kind and label."""

    kind: int
    label: int
    span: slice


@dataclass(frozen=True)
class PointTile:
    """Some rows and some keys, which all interact. What is computed of them stays with the tile."""

    g: slice  # which groups
    r: slice  # which rows
    k: slice  # which keys, in the order of `sorting`
    rows: Tensor  # [g, r, D]
    keys: Tensor  # [g, k, D]
    row_kind: int
    key_kind: int
    label: int  # of all
    key_index: Tensor  # [k] int64: places of the keys in their block
    own_index: Tensor | None  # [r] int64: places of the rows in it; None: they are not among k
    is_off_diagonal: bool  # whether the keys are rows too, of a transposed tile that comes later
    transposed: "PointTile | None"  # the transposed tile, where it came before and is kept

    @cached_property
    def _distances(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Distances, the smallest of each row, and which points coincide."""
        if self.transposed is not None:
            d, coinciding = self.transposed.d.mT.contiguous(), self.transposed.coinciding
            return d, d.amin(-1), None if coinciding is None else coinciding.mT
        same = None if self.own_index is None else self.own_index[:, None] == self.key_index
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
        return self._distances[0]

    @property
    def nearest(self) -> Tensor:
        """The smallest distance of each row [g, r]."""
        return self._distances[1]

    @property
    def coinciding(self) -> Tensor | None:
        """Where two points are in the same place: bool [g, r, k], None for nowhere."""
        return self._distances[2]

    @cached_property
    def nearest_of_keys(self) -> Tensor:
        """The smallest distance of each key [g, k]."""
        return self.d.amin(-2)

    @property
    def finite_distances(self) -> Tensor:
        """Distances with 0 in the place of infinity."""
        if self.own_index is None and self.coinciding is None:
            return self.d
        return self.d.masked_fill(self.d == torch.inf, 0.0)

    @property
    def num_pairs(self) -> int:
        """Pairs of one group; a point with itself counts."""
        return self.rows.shape[1] * self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of its distances."""
        return len(self.rows) * self.num_pairs * self.rows.element_size()

    @cached_property
    def has_close(self) -> bool:
        """Whether some rows are much closer to a key than to the origin: then sums of keys, less
        sums of rows, have lost the digits of their difference."""
        origin = torch.linalg.vector_norm(self.rows, dim=-1)
        return bool((self.nearest < _CLOSE * origin).any())

    def weighted_differences(self, weight: Tensor) -> Tensor:
        """``sum_k weight[j, k] (rows[j] - keys[k])``: [g, r, D]."""
        return _weighted_differences(weight, self.rows, self.keys, self.has_close)

    def weighted_differences_of_keys(self, weight: Tensor) -> Tensor:
        """``sum_j weight[j, k] (keys[k] - rows[j])``: [g, k, D]."""
        return _weighted_differences(weight.mT, self.keys, self.rows, self.has_close)


def _weighted_differences(weight: Tensor, rows: Tensor, keys: Tensor, has_close: bool) -> Tensor:
    """Two matrix products; in fp64 where much cancels."""
    if has_close:
        wide = _weighted_differences(weight.double(), rows.double(), keys.double(), False)
        return wide.to(rows.dtype)
    return weight.sum(-1, keepdim=True) * rows - weight @ keys


def no_kind(row_kind: int, key_kind: int) -> bool:
    """Filter that no tile passes."""
    return False


def generated_rows(row_kind: int, key_kind: int) -> bool:
    """Filter of tiles whose rows are generated points."""
    return row_kind == GENERATED


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
        assert pairs.tags is not None, "kinds and labels are tags"
        self.rows = pairs.rows.transpose(0, 1).contiguous()  # [G, R, D]
        self.labels = pairs.tags[:, 1]  # [R]
        self.source = open_keys(pairs)
        self.pairs = pairs
        self._kept: dict[tuple[int, ...], PointTile] = {}
        self._budget = 0.0 if pairs.keys_from == "ring" else cache_mb * 2**20
        # Then tiles come in transposed pairs. To compute one of each pair, and to copy the
        # distances of the other, makes the whole loss 1.29 times as fast (M = N = 2048, D = 256).
        self._keys_are_rows = len(pairs.sizes) == 1
        self._chunk_size = chunk_size or _DEFAULT_CHUNK
        self._runs = _runs(pairs.tags)
        spans = (run.span for run in self._runs if run.kind == GENERATED)
        self.num_generated = sum(span.stop - span.start for span in spans)

    def tiles(
        self, wanted: KindFilter, *extras: Tensor, halved: KindFilter = no_kind
    ) -> Iterator[tuple[PointTile, tuple[Tensor, ...]]]:
        """All pairs that interact, and the extras of each tile's keys, each [k, ...].

        Args:
            wanted: which of the tiles.
            extras: numbers of the rows of this rank [R, ...], sent with them as keys.
            halved: of which tiles the transposed ones are left out, where there are such: where all
                keys are rows of this rank.

        Collectives: those of one round over the keys, see `KeySource.blocks`.
        """
        for block in self.source.blocks(*extras):
            assert block.tags is not None
            order = sorting(block.tags)
            in_order = torch.equal(order, torch.arange(len(order), device=order.device))
            sorted_extras = block.extras if in_order else [x[order] for x in block.extras]
            for keys in _runs(block.tags[order]):
                rows = [x for x in self._runs if x.label == keys.label and wanted(x[0], keys[0])]
                for k in chunks(keys.span, self._chunk_size) if rows else ():
                    selected = k if in_order else order[k]
                    points = block.keys[selected].transpose(0, 1).contiguous()
                    for tile in self._tiles(rows, keys, k, points, order[k], block, halved):
                        yield tile, tuple(x[k] for x in sorted_extras)

    def _tiles(
        self,
        row_runs: list[_Run],
        keys: _Run,
        k: slice,
        points: Tensor,
        key_index: Tensor,
        block: Block,
        halved: KindFilter,
    ) -> Iterator[PointTile]:
        """Tiles of all rows with some keys [G, k, D]."""
        for rows in row_runs:
            is_halved = self._keys_are_rows and halved(rows.kind, keys.kind)
            for r in chunks(rows.span, self._chunk_size):
                if is_halved and r.start > k.start:
                    continue
                own = self._own_index(r, block, key_index) if rows.kind == keys.kind else None
                for g in self._chunks_of_groups((r.stop - r.start) * len(key_index)):
                    yield self._kept.get((k.start, r.start, g.start)) or self._keep(
                        PointTile(
                            g=g,
                            r=r,
                            k=k,
                            rows=self.rows[g, r],
                            keys=points[g],
                            row_kind=rows.kind,
                            key_kind=keys.kind,
                            label=keys.label,
                            key_index=key_index,
                            own_index=own,
                            is_off_diagonal=self._keys_are_rows and r.start < k.start,
                            transposed=self._transposed(g, r, k),
                        )
                    )

    def _transposed(self, g: slice, r: slice, k: slice) -> PointTile | None:
        """The tile that is kept of the same points, where rows and keys are in one order."""
        is_other = self._keys_are_rows and r.start != k.start
        return self._kept.get((r.start, k.start, g.start)) if is_other else None

    def _own_index(self, r: slice, block: Block, key_index: Tensor) -> Tensor | None:
        """Places of rows in a block, if some of them are among these keys."""
        begin, end = (self.pairs.start + x - block.first for x in (r.start, r.stop))
        if not ((key_index >= begin) & (key_index < end)).any():
            return None
        return torch.arange(begin, end, device=key_index.device)

    def _chunks_of_groups(self, num_pairs: int) -> Iterator[slice]:
        """So many groups that a tile is as large as one of a single large group."""
        return chunks(slice(0, len(self.rows)), max(1, self._chunk_size**2 // num_pairs))

    def _keep(self, tile: PointTile) -> PointTile:
        if tile.transposed is None and tile.num_bytes <= self._budget:
            self._budget -= tile.num_bytes
            self._kept[tile.k.start, tile.r.start, tile.g.start] = tile
        return tile


def sorting(tags: Tensor) -> Tensor:
    """The order [R] that puts equal tags [R, 2] side by side, sorted by kind, then by label."""
    order = tags[:, 1].argsort(stable=True)
    return order[tags[order, 0].argsort(stable=True)]


def _runs(tags: Tensor) -> list[_Run]:
    """Runs of sorted tags [R, 2]."""
    if len(tags) == 0:
        return []
    starts = [0, *(1 + (tags[1:] != tags[:-1]).any(1).nonzero().flatten()).tolist()]
    spans = itertools.pairwise([*starts, len(tags)])
    values = tags[starts].tolist()
    return [_Run(k, label, slice(*s)) for (k, label), s in zip(values, spans, strict=True)]
