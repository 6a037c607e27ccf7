"""Distances of this rank's points and blocks of keys by kernels, panel by panel.

A panel has the distances of some rows of every group to all keys of a block. They are kept from
pass to pass as memory allows, else computed again. Keys of a block are sorted by kind, then label;
how many there are of each kind the host knows, and which of them interact it need not.

G groups, R points of this rank, K keys of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.losses.force.kernel_calls import (
    PRECISION,
    generation_of,
    launch,
    num_parts,
    tile_of,
)
from dist_contrastive.losses.force.points import Counts, sorting
from dist_contrastive.losses.force.segments import Segments
from dist_contrastive.pairwise.keys import open_keys
from dist_contrastive.pairwise.pairs import Block, Pairs, chunks
from dist_contrastive.pairwise.tile_shapes import TileShape

_PANEL = 2**31  # bytes of distances that are computed at a time, and of weights
_ALIGNED = 32  # numbers to which lines of a panel are filled up: a step of products
_BLOCK = 128  # rows of a panel are a multiple of this
_FEW_DIMENSIONS = 4  # of which differences are no dearer than a product
_SMALL = 32  # rows and keys, for which small tiles are enough
_GROUP = 8  # blocks of rows whose programs share keys in the cache
# Of a card's memory, and of what is free of it, what distances may take from pass to pass; and of
# what is free, a panel.
_OF_ALL, _OF_FREE, _OF_PANEL = 1 / 3, 1 / 2, 1 / 16


@dataclass(frozen=True)
class KeyBlock:
    """Keys that rows are compared with, sorted by kind and label."""

    keys: Tensor  # [G, K, D]
    squares: Tensor  # [G, K], of their norms
    tags: Tensor  # [K, 2] int64
    labels: Tensor  # [K] int32
    own: Tensor  # [R] int32: which key is the row itself, -1 for none
    order: Tensor | None  # [K] of the block's keys; None: as they are
    counts: Counts
    extras: tuple[Tensor, ...] = ()  # each [..., G, K]

    @property
    def num_negative(self) -> int:
        """Generated and fixed points, the first keys."""
        return sum(self.counts[:2])

    def __len__(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class Panel:
    """Distances of some rows, in some groups, to all keys."""

    g: slice
    r: slice
    d: Tensor  # [g, r, stride], K of the last are keys

    @property
    def num_rows(self) -> int:
        """Rows of a group."""
        return self.d.shape[1]

    def part(self, rows: slice) -> "Panel | None":
        """Those of its rows that are among some; None where none are."""
        first, last = max(self.r.start, rows.start), min(self.r.stop, rows.stop)
        if first >= last:
            return None
        d = self.d[:, first - self.r.start : last - self.r.start]
        return Panel(self.g, slice(first, last), d)

    @property
    def sizes(self) -> tuple[int, int]:
        """M and P of the kernels."""
        return self.num_rows, self.d.stride(0) // self.d.stride(1)

    @property
    def stride(self) -> int:
        """Numbers of a line."""
        return self.d.shape[2]

    def programs(self, tile: TileShape, parts: int) -> int:
        """Of a kernel that takes blocks of its rows and parts of its keys."""
        return len(self.d) * -(-self.num_rows // tile.rows) * parts


class Panels:
    """Rows of this rank and the keys of all that they interact with, in G independent groups.

    Args:
        pairs: rows [R, G, D] in fp32, which are this rank's keys too, near the origin; tags [R, 2]
            int64, kind and label, in the order of `sorting`.
        counts: points of each kind on every rank that is compared with, this one included.
        num_labels: ids of labels; 1 where they do not differ.
        chunk_size: rows of a panel; None chooses.
        cache_mb: MiB of distances that are kept from pass to pass; None: up to a third of the
            card's memory and half of what is free, nothing elsewhere. Nothing is kept of a ring.

    Collectives: see `open_keys`.
    """

    def __init__(
        self,
        pairs: Pairs,
        counts: tuple[Counts, ...],
        num_labels: int,
        chunk_size: int | None,
        cache_mb: float | None,
    ) -> None:
        assert pairs.tags is not None, "kinds and labels are tags"
        self._pairs, self._all_counts, self.num_labels = pairs, counts, num_labels
        self.rows = pairs.rows.transpose(0, 1).contiguous()  # [G, R, D]
        self.labels = pairs.tags[:, 1]  # [R]
        self.counts = counts[collectives.rank(pairs.group) if len(counts) > 1 else 0]
        self.segments = Segments(pairs.tags, self.counts, num_labels)
        self.norms = torch.linalg.vector_norm(self.rows, dim=-1)  # [G, R]
        self._squares = self.norms.square()
        self._row_labels = self.labels.int()
        self._source = open_keys(pairs)
        self._chunk_size = chunk_size
        self._panel_bytes, budget = _memory(self.rows.device, cache_mb)
        self._budget = 0 if pairs.keys_from == "ring" else budget
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._block: KeyBlock | None = None
        self._columns: tuple[Tensor, Tensor] | None = None  # of the keys that were asked for last
        self._buffers: dict[str, Tensor] = {}
        self._generation = generation_of(self.rows.device)

    @property
    def has_labels(self) -> bool:
        """Whether labels differ."""
        return self.num_labels > 1

    @property
    def num_generated(self) -> int:
        """The first rows."""
        return self.counts[0]

    @property
    def num_keys(self) -> int:
        """Of all blocks."""
        return sum(map(sum, self._all_counts))

    @property
    def _most_keys(self) -> int:
        """Of a block."""
        of_ranks = [sum(counts) for counts in self._all_counts]
        return max(of_ranks) if self._pairs.keys_from == "ring" else sum(of_ranks)

    def span_of(self, kind: int) -> slice:
        """The rows of a kind."""
        first = sum(self.counts[:kind])
        return slice(first, first + self.counts[kind])

    def tile(self, name: str) -> TileShape:
        """Of a kernel, on this card; not wider than keys are many, and whole lines are filled."""
        tile = tile_of(name, self._generation)
        most = max(_ALIGNED, _power_of_2(min(_BLOCK, self._most_keys)))
        return replace(tile, keys=min(tile.keys, most))

    def product_tile(self, rows: slice) -> TileShape:
        """Of the product of weights of some rows of all panels and keys, whose dimensions are its
        keys."""
        small = "small " if rows.stop - rows.start <= _BLOCK // 2 else ""
        return tile_of(f"{small}product", self._generation)

    def parts(self, rows: slice, tile: TileShape) -> int:
        """Into which the keys of a block are split for these rows."""
        return num_parts(rows.stop - rows.start, len(self.rows), self._most_keys, tile)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is used again and again, with whatever is in it: fp32."""
        size = torch.Size(shape).numel()
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            self._buffers[name] = held = self.rows.new_empty(size)
        return held[:size].view(shape)

    def columns(self, block: KeyBlock) -> Tensor:
        """The keys of a block transposed [G, D, stride], 0 beyond the last."""
        if self._columns is None or self._columns[0] is not block.keys:
            num_groups, num_keys, num_dims = block.keys.shape
            columns = block.keys.new_zeros(num_groups, num_dims, _aligned(num_keys))
            columns[..., :num_keys].copy_(block.keys.mT)
            self._columns = block.keys, columns
        return self._columns[1]

    def blocks(self, *extras: Tensor) -> Iterator[KeyBlock]:
        """Every key once, with further numbers that this rank has for its own points [R, ..., G].

        Collectives: those of one round over the keys, see `KeySource.blocks`.
        """
        for block in self._source.blocks(*extras):
            if len(block.keys):
                sorted_block = self._block or self._sorted(block)
                if self._pairs.keys_from != "ring":
                    self._block = sorted_block
                order = sorted_block.order
                numbers = (x if order is None else x[order] for x in block.extras)
                columns = tuple(x.movedim(0, -1).contiguous() for x in numbers)
                yield replace(sorted_block, extras=columns)

    def _sorted(self, block: Block) -> KeyBlock:
        assert block.tags is not None
        order, keys, tags, first = None, block.keys, block.tags, self._pairs.start - block.first
        own = slice(first, first + len(self.labels))
        if self._pairs.keys_from == "gather" and len(self._all_counts) > 1:  # each rank's are
            order = sorting(tags)
            places = torch.arange(len(order), device=order.device)
            number = torch.empty_like(order).scatter_(0, order, places)[own].int()
            keys, tags = keys.index_select(0, order), tags[order]
        elif 0 <= first < len(keys):
            number = torch.arange(own.start, own.stop, dtype=torch.int32, device=keys.device)
        else:
            number = self._not_among
        keys = keys.transpose(0, 1).contiguous()
        squares = torch.linalg.vector_norm(keys, dim=-1).square_()
        labels = tags[:, 1].int() if self.has_labels else number  # which are not looked at
        return KeyBlock(keys, squares, tags, labels, number, order, self._counts_of(block))

    @cached_property
    def _not_among(self) -> Tensor:
        """That no row is among the keys of a block: [R] int32."""
        return torch.full_like(self.labels, -1, dtype=torch.int32)

    def _counts_of(self, block: Block) -> Counts:
        """Of the block's keys."""
        generated, fixed, positive = map(sum, zip(*self._counts_in(block), strict=True))
        return generated, fixed, positive

    def _counts_in(self, block: Block) -> list[Counts]:
        """Of the ranks whose keys it has."""
        if self._pairs.keys_from != "ring":
            return list(self._all_counts)
        starts = (sum(self._pairs.sizes[:i]) for i in range(len(self._pairs.sizes)))
        pairs = zip(starts, self._all_counts, strict=True)
        return [counts for start, counts in pairs if start == block.first]

    def panels(self, block: KeyBlock, rows: slice) -> Iterator[Panel]:
        """Distances of these rows, in every group, to the keys of a block. A panel is overwritten
        by the next."""
        stride = _aligned(len(block))
        of_row = 4 * stride
        at_least = of_row * max(1, min(_BLOCK, len(self.labels)))
        num_groups = min(max(1, self._panel_bytes // at_least), len(self.rows))
        at_a_time = max(1, self._panel_bytes // (of_row * num_groups * _BLOCK)) * _BLOCK
        for g in chunks(slice(0, len(self.rows)), num_groups):
            for r in chunks(slice(0, len(self.labels)), self._chunk_size or at_a_time):
                wanted = slice(max(r.start, rows.start), min(r.stop, rows.stop))
                if wanted.start < wanted.stop:
                    yield self._panel(block, g, r, wanted, stride)

    def _panel(self, block: KeyBlock, g: slice, r: slice, wanted: slice, stride: int) -> Panel:
        kept = self._kept.get((g.start, r.start))
        if kept is None:
            shape = g.stop - g.start, r.stop - r.start, stride
            size = 4 * torch.Size(shape).numel()
            if size > self._budget:
                shape = shape[0], wanted.stop - wanted.start, stride
                panel = Panel(g, wanted, self.buffer("distances", *shape))
                self._fill(panel, block)
                return panel
            self._budget -= size
            kept = self.rows.new_empty(shape)
            self._kept[g.start, r.start] = kept
            self._fill(Panel(g, r, kept), block)
        return Panel(g, wanted, kept[:, wanted.start - r.start : wanted.stop - r.start])

    def _fill(self, panel: Panel, block: KeyBlock) -> None:
        """Compute the distances of a panel."""
        (num_rows, in_panel), num_dims, g = panel.sizes, self.rows.shape[2], panel.g
        are_few = num_dims <= _FEW_DIMENSIONS
        name = "distance" if not (self.has_labels or are_few) else "labelled distance"
        name = "small distance" if max(num_rows, len(block)) <= _SMALL else name
        tile = tile_of(name, self._generation)
        tiles = -(-num_rows // tile.rows) * -(-panel.stride // tile.keys) * len(panel.d)
        close = block.own.new_empty(tiles)
        tensors = [
            *(self.rows[g], block.keys[g], self._squares[g], block.squares[g]),
            *(self._row_labels, block.labels, block.own, panel.d, close),
        ]
        numbers = [num_rows, in_panel, len(block), len(self.labels), panel.r.start, panel.stride]
        constants = {"D": num_dims, "HAS_LABELS": self.has_labels, "GROUP": _GROUP}
        constants |= {"BM": tile.rows, "BN": tile.keys}
        if not are_few:
            how = {"PRECISION": PRECISION, "BK": tile.dims}
            launch("distance", tiles, tile, tensors, numbers, constants | how)
        constants["ALL"] = are_few
        launch("difference", 2 * tiles, tile, tensors, numbers, constants)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _memory(device: torch.device, cache_mb: float | None) -> tuple[int, int]:
    """Bytes of distances of a panel, and of those to keep."""
    if device.type != "cuda":
        return _PANEL, int((cache_mb or 0) * 2**20)
    free, total = torch.cuda.mem_get_info(device)
    # What this process has reserved and does not use is free, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    to_keep = int(min(_OF_ALL * total, _OF_FREE * free) if cache_mb is None else cache_mb * 2**20)
    return min(_PANEL, int(_OF_PANEL * free)), to_keep
