"""Triplet sums by kernels, from panels: the distances of some rows to all keys at a time.

A panel is written, mined and turned into the gradient of its distances, in the forward pass, by a
few kernels and two products. What the host does not know, how many positives a row has, it need not
know: the keys of a row's positives are a span of all keys sorted by their tags. Continuous labels
near its own are one too, since all keys of a sample have the same.

Of negatives gradients are products, of the same operands whose sums of weights a column of ones
makes; so what a weight is rounded to counts on both sides, and rows far from the origin cancel.
Positives, which may be close, have distances and gradients from differences.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise import fused, kernel_calls
from dist_contrastive.pairwise.by_kernels import unit_operands
from dist_contrastive.pairwise.chosen import squared_norms
from dist_contrastive.pairwise.ids import continuous_ids
from dist_contrastive.pairwise.kernel_calls import Operands, launch, launch_of_rows
from dist_contrastive.pairwise.keys import SUM, gathered, open_keys
from dist_contrastive.pairwise.pairs import Block, Pairs
from dist_contrastive.pairwise.saved import recall, remember

_PANEL = 928 * 2**20 // 6  # distances that are kept at a time, in fp32, and gradients
_ROWS = 128  # rows of a panel are a multiple of this
_ALIGNED = 16  # numbers to which lines are filled up, for the loads of products
_ONES = 8  # columns of ones after the dimensions: 16 bytes in half precision
_POSITIVES, _DIMS = 32, 128  # of a step of differences
_SPANS = 128  # rows of a program
# Powers of 2: positives that are sorted at a time, and negatives of a step; warps of a program.
MINING_STEPS = (8, 512, 8)


@dataclass(frozen=True)
class MinedTriplets:
    """Which triplets count, and how their distances are measured."""

    mining: Literal["all", "semihard"]
    distance: str  # see distances.DISTANCES
    margin: float

    @property
    def is_cosine(self) -> bool:
        """Cosine distances, of products; others are of differences."""
        return self.distance == "cosine"


def mined_sums(
    triplets: MinedTriplets, pairs: Pairs, panel_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`panels.triplet_sums` by kernels, of rows as the network computed them.

    Args:
        pairs: rows that are their rank's keys; tags of a sample are equal.
        panel_rows: rows of a panel; None chooses.

    Collectives: those of one gather of keys and tags, and one all-reduce of the sum of keys, [D];
    backward none, since the gradient is made in the forward pass. Ring: a gather of the tags, and
    two rounds over the keys for every panel of rows, of which all ranks have as many.
    """
    job = _Job(triplets, panel_rows, torch.is_grad_enabled() and pairs.rows.requires_grad)
    return _MinedSums.apply(pairs.rows, pairs, job)


@dataclass(frozen=True)
class _Job:
    triplets: MinedTriplets
    panel_rows: int | None
    with_gradient: bool


class _MinedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: Pairs, job: _Job) -> tuple[Tensor, Tensor, Tensor]:
        one = rows.new_ones((), dtype=torch.float32)
        pairs, _ = unit_operands(pairs, None, rows, None, one if job.triplets.is_cosine else None)
        panels = _Panels(pairs, job)
        panels.visit()
        remember(ctx, pairs, None, *(panels.gradients() if job.with_gradient else ()))
        total, (active, valid) = panels.sums.sum().float(), panels.counts.sum(0).unbind()
        ctx.mark_non_differentiable(active, valid)
        return total, active, valid

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        pairs, _held, sums = recall(ctx)
        rows, grad = pairs.rows, grad.float().contiguous()
        found, products = torch.empty_like(rows), grad.new_empty(len(rows))
        launch_of_rows(
            "unit_gradient",
            [rows, sums[0], sums[-1], grad, rows, products, found, products],
            [len(rows), len(rows), 0],
            IS_ROW=True,
            IS_KEY=len(sums) > 1,
            HAS_PARTNERS=False,
            UNIT=pairs.scale is not None,
        )
        return found, None, None


@dataclass(frozen=True)
class _Order:
    """Which keys are similar to which rows: spans of lists that are sorted by tag."""

    keys: Tensor  # [B] int32, sorted by tag
    places: Tensor  # [B] int32: of a key its place among these
    begins: Tensor  # [b] int32: of a row the first of its keys, its own among them
    ends: Tensor
    rows: Tensor  # [b] int32, sorted by tag
    key_begins: Tensor  # [B] int32: of a key the first of its rows
    key_ends: Tensor

    @classmethod
    def of(cls, tags: Tensor, max_delta: float, start: int, count: int) -> "_Order":
        """Of the tags of all keys, of which the rows' are those from `start` on."""
        tags = tags if tags.dim() == 1 else continuous_ids(tags, max_delta)
        of_rows, order = tags[start : start + count], _order(tags)
        numbers = torch.arange(len(tags), dtype=torch.int32, device=tags.device)
        keys, places = order.int(), torch.empty_like(numbers).scatter_(0, order, numbers)
        spans = _spans(of_rows, tags, keys)
        if count == len(tags):
            return cls(keys, places, *spans, keys, *spans)
        rows = _order(of_rows).int()
        return cls(keys, places, *spans, rows, *_spans(tags, of_rows, rows))


def _order(tags: Tensor) -> Tensor:
    """Numbers of tags in ascending order: by label, those without one last, and then by sample."""
    if tags.dim() == 1:
        return tags.sort(stable=True).indices
    by_sample = tags[:, 1].sort(stable=True).indices
    return by_sample[tags[by_sample, 0].nan_to_num(torch.inf).sort(stable=True).indices]


def _spans(wanted: Tensor, tags: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """From where to where in their order tags are similar to each of those wanted: int32."""
    if tags.dim() == 1:
        known = tags[order]
        begins = torch.searchsorted(known, wanted, out_int32=True)
        return begins, torch.searchsorted(known, wanted, out_int32=True, right=True)
    begins, ends = (order.new_empty(len(wanted)) for _ in range(2))
    if len(wanted):
        tensors, grid = [wanted, tags, order, begins, ends], (-(-len(wanted) // _SPANS),)
        sizes = len(wanted), len(tags), len(tags).bit_length()
        kernel_calls.start("spans", grid, tensors, sizes, {"BM": _SPANS})
    return begins, ends


@dataclass(frozen=True)
class _BlockOperands:
    """A block of keys as kernels and products take it."""

    span: slice
    exact: Tensor  # [k, D] as given
    moved: Tensor  # [k, D] where products round least
    squares: Tensor  # [k], norms of these; anything for cosine
    factors: Tensor  # [k], anything but for cosine
    places: Tensor  # [k], see _Order
    product: Tensor  # [k, D, and _ONES unless cosine]


class _Panels:
    """Panels of this rank's rows, and the sums that are made of them."""

    def __init__(self, pairs: Pairs, job: _Job) -> None:
        assert pairs.tags is not None, "triplets need tags"
        self._pairs, self._job, self._triplets = pairs, job, job.triplets
        self._source, rows = open_keys(pairs), pairs.rows
        tags = gathered(pairs, pairs.tags)
        self.order = _Order.of(tags, pairs.max_delta, pairs.start, len(rows))
        # fp16 has not the range of weights over distances.
        self._dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
        self._middle = None if self._triplets.is_cosine else _middle(pairs)
        self._is_alone = pairs.keys_from == "local" or len(pairs.sizes) == 1
        own = slice(pairs.start, pairs.start + len(rows))
        factors = None if pairs.factors is None else pairs.factors[0]
        self._rows = self._operands(Block(own.start, rows, factors=factors))
        self._known: _BlockOperands | None = None
        # Of all keys, wherever these are; anything but for cosine.
        self._key_factors = rows if factors is None else gathered(pairs, factors)
        self._constants = {"METRIC": self._triplets.distance}
        self._width = self._rows.product.shape[1]
        self.sums = rows.new_empty(len(rows), dtype=torch.float64)
        self.counts = rows.new_empty(len(rows), 2, dtype=torch.int64)  # active, valid
        self._stride = -(-pairs.num_keys // _ALIGNED) * _ALIGNED
        self._sums_of_rows = rows.new_zeros(len(rows), self._width, dtype=torch.float32)
        self._sums_of_keys: Tensor | None = None

    def _operands(self, block: Block) -> _BlockOperands:
        keys, factors = block.keys, block.factors
        moved = keys if self._middle is None else keys - self._middle
        squares = keys if self._middle is None else squared_norms(moved, None)
        product = keys if self._dtype == torch.bfloat16 else moved.to(self._dtype)
        if self._middle is not None and self._job.with_gradient:
            ones = product.new_ones(1, 1).expand(len(keys), _ONES)
            product = torch.cat([product, ones], 1)
        places = self.order.places[block.span]
        factors = keys if factors is None else factors
        return _BlockOperands(block.span, keys, moved, squares, factors, places, product)

    def _blocks(self) -> Iterator[_BlockOperands]:
        """Blocks of keys; those of a gather are made once. Collectives: those of a round."""
        for block in self._source.blocks():
            if self._pairs.keys_from == "ring":
                yield self._operands(block)
                continue
            if self._known is None:
                self._known = self._rows if self._is_alone else self._operands(block)
            yield self._known

    def visit(self) -> None:
        """Sums of all panels, and the sums that gradients are made of. Collectives: a round over
        the keys for each panel, with gradients another one."""
        num_rows, is_ring = len(self._pairs.rows), self._pairs.keys_from == "ring"
        size = self._job.panel_rows or max(1, _PANEL // (self._stride * _ROWS)) * _ROWS
        size = min(size, max(1, *self._pairs.sizes))
        panel = self._rows.exact.new_empty(size, self._stride, dtype=torch.float32)
        # Zeros, since products read what fills up lines of a block, in the last row beyond its end.
        g = self._rows.exact.new_zeros(size * self._stride + _ALIGNED, dtype=self._dtype)
        g = g[: size * self._stride].view(size, self._stride)
        over_ranks = self._source.reduction(SUM)
        held = self._sums_of_rows if self._is_alone else None  # one sum of both
        for begin in range(0, max(self._pairs.sizes), size):
            r = slice(min(begin, num_rows), min(begin + size, num_rows))
            for block in self._blocks():
                self._fill(r, block, panel)
            self._weigh(r, panel, g)
            if not self._job.with_gradient:
                continue
            over_ranks = self._source.reduction(SUM) if is_ring else over_ranks
            for block in self._blocks():
                if held is None or is_ring:
                    held = panel.new_zeros(len(block.exact), self._width)
                self._add_gradients(r, block, panel, g, held)
                if is_ring:
                    over_ranks.add((held,))
            if is_ring:
                self._add_of_keys(over_ranks.finish()[0])
        if held is not None and not (is_ring or self._is_alone):
            over_ranks.add((held,))
            self._add_of_keys(over_ranks.finish()[0])

    def _add_of_keys(self, found: Tensor) -> None:
        self._sums_of_keys = found if self._sums_of_keys is None else self._sums_of_keys + found

    def _fill(self, r: slice, block: _BlockOperands, panel: Tensor) -> None:
        """Distances of rows r to the keys of a block."""
        num_rows, num_keys = r.stop - r.start, len(block.exact)
        if 0 in (num_rows, num_keys):
            return
        rows, order, is_cosine = self._rows, self.order, self._triplets.is_cosine
        operands = Operands(rows.moved, block.moved, None, None, None, 0)
        tile = operands.tile("panel")
        tiles = -(-num_rows // tile.rows) * -(-num_keys // tile.keys)
        constants = operands.constants() | self._constants
        del constants["HAS_FACTORS"]
        launch(
            *("panel", (tiles if is_cosine else tiles + num_rows,), tile),
            [
                *(rows.moved[r], block.moved, rows.exact[r], block.exact),
                *(rows.factors[r], block.factors, rows.squares[r], block.squares),
                *(block.places, order.keys, order.begins[r], order.ends[r], panel),
            ],
            [num_rows, num_keys, block.span.start, self._stride],
            PARTS=tile.parts,
            BP=_POSITIVES,
            **constants,
        )

    def _weigh(self, r: slice, panel: Tensor, g: Tensor) -> None:
        """Sums of rows r, and weights of their distances, in G, and in the place of those of
        positives."""
        num_rows, (log, keys, warps), order = r.stop - r.start, MINING_STEPS, self.order
        if not num_rows:
            return
        scratch = panel.new_empty(num_rows, 1 << log)
        scratches = [scratch, scratch.new_empty(scratch.shape, dtype=torch.int32)]
        if self._triplets.mining == "semihard":
            scratches.append(panel.new_empty(num_rows, 2 << log, dtype=torch.int64))
        factors = [self._key_factors, self._rows.factors[r]]
        lists = [order.places, order.keys, order.begins[r], order.ends[r]]
        own, num_keys = self._rows.span.start + r.start, self._pairs.num_keys
        kernel_calls.start(
            *(self._triplets.mining, (num_rows,)),
            [*factors, *lists, panel, *scratches, g, self.sums[r], self.counts[r]],
            [num_keys, own, self._stride, self._triplets.margin],
            self._constants
            | {"WITH_GRADIENT": self._job.with_gradient, "LOG": log, "BN": keys}
            | {"num_warps": warps},
        )

    def _add_gradients(
        self, r: slice, block: _BlockOperands, panel: Tensor, g: Tensor, of_keys: Tensor
    ) -> None:
        """Add to the sums of rows r, and to those of a block's keys."""
        num_rows, num_keys, k = r.stop - r.start, len(block.exact), block.span
        if 0 in (num_rows, num_keys):
            return
        rows, of_rows, weights = self._rows, self._sums_of_rows[r], g[:num_rows, k]
        fused.add_product(of_rows, weights, block.product)
        fused.add_product(of_keys, weights.T, rows.product[r])
        if self._triplets.is_cosine:
            return
        order, dim = self.order, rows.exact.shape[1]
        step = min(_DIMS, 1 << (dim - 1).bit_length())
        kernel_calls.start(
            *("positive", (num_rows + num_keys, -(-dim // step))),
            [
                *(rows.exact[r], block.exact, panel, order.keys, order.begins[r], order.ends[r]),
                *(order.rows, order.key_begins[k], order.key_ends[k], of_rows, of_keys),
            ],
            [num_rows, num_keys, k.start, r.start, self._stride],
            {"D": dim, "WIDTH": self._width, "BP": _POSITIVES, "BK": step},
        )

    def gradients(self) -> tuple[Tensor, ...]:
        """Gradients of the sum by rows as rows, and as keys unless that is the same sum: of cosine
        by their multiples of unit length, times the factor."""
        found = [x for x in (self._sums_of_rows, self._sums_of_keys) if x is not None]
        if self._triplets.is_cosine:
            return tuple(found)
        dim, x = self._rows.exact.shape[1], self._rows.product
        return tuple(x[:, :dim] * s[:, dim : dim + 1] - s[:, :dim] for s in found)


def _middle(pairs: Pairs) -> Tensor:
    """Mean of the keys that rows are compared with: [D] fp32."""
    total = pairs.keys.sum(0, dtype=torch.float32)
    if pairs.keys_from != "local":
        total = collectives.all_reduce_sum(total, pairs.group)
    return total / max(1, pairs.num_keys)
