"""Distances of each row to its nearest negative and its farthest positive, by kernels.

The search makes no matrix, and its numbers only choose: distances are computed again from rows and
their keys, as they were given, and so are gradients. A key that many rows have chosen gets the sum
over these in the order of their numbers. Nothing waits for the device.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise import kernel_calls
from dist_contrastive.pairwise.by_kernels import unit_operands
from dist_contrastive.pairwise.kernel_calls import Operands, launch, launch_of_rows
from dist_contrastive.pairwise.keys import SUM, open_keys
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.saved import recall, remember

_ENTRIES, _DIMS = 16, 128  # choices of a key, and dimensions, of a step


@dataclass(frozen=True)
class Search:
    """What is looked for, and how distances are measured.

    Attributes:
        distance: euclidean, squared_euclidean or cosine, see `distances.DISTANCES`.
        farthest: whether the farthest positive is wanted too.
        unit: whether rows are brought to unit length, as they always are for cosine.
        eps: added to each difference.
    """

    distance: str
    farthest: bool
    unit: bool = False
    eps: float = 0.0

    @property
    def is_cosine(self) -> bool:
        """Cosine distances, of products; others are of differences."""
        return self.distance == "cosine"

    def from_squares(self, values: Tensor) -> Tensor:
        """Distances, from squares of differences or cosine distances."""
        return values.sqrt() if self.distance == "euclidean" else values

    def coefficients(self, d: Tensor, grads: Tensor) -> Tensor:
        """What differences, or the other's row, count in the gradient: 0 where rows coincide, and
        where there is no key."""
        if self.distance == "squared_euclidean":
            grads = 2 * grads
        elif self.distance == "euclidean":
            grads = torch.where(d > 0, grads / d, 0.0)
        return torch.where(d.isfinite(), grads, 0.0).float()


def extreme_distances(pairs: Pairs, search: Search) -> Tensor:
    """Distances of rows to their nearest negative, and with ``search.farthest`` to their farthest
    positive: [1 or 2, b] fp32, inf where there is none. Differentiable; of equally distant keys the
    first counts.

    Args:
        pairs: rows that are their rank's keys, as the network computed them; tags tell what is
            similar.

    Collectives: those of one round over the keys, and of another one in backward.
    """
    return _ExtremeDistances.apply(pairs.rows, pairs, search)


class _ExtremeDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: Pairs, search: Search) -> Tensor:
        one = rows.new_ones((), dtype=torch.float32)
        scale = one if search.unit or search.is_cosine else None
        pairs, _ = unit_operands(pairs, None, rows, None, scale)
        source, count = open_keys(pairs), len(rows)
        best = rows.new_full((1 + search.farthest, count), torch.inf, dtype=torch.float32)
        number = torch.full_like(best, -1, dtype=torch.int64)
        for block in source.blocks():
            if count and len(block.keys):
                operands = Operands.of(pairs, block)
                found = _search(operands, search)
                values = _values(operands, found, search)
                sign = 1.0 - 2.0 * torch.arange(len(values), device=values.device)[:, None]
                found = torch.where(found < 0, found, found + block.first)
                # Of the farthest the lowest value times -1; inf where there is none.
                lower = torch.where(values.isfinite(), values * sign, torch.inf)
                better = (lower < best) | ((lower == best) & (found < number) & (found >= 0))
                best, number = torch.where(better, lower, best), torch.where(better, found, number)
        d = search.from_squares(best.abs())
        ctx.search = search
        remember(ctx, pairs, source, d, number)
        return d

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        (pairs, held, (d, number)), search = recall(ctx), ctx.search
        source, rows = held or open_keys(pairs), pairs.rows
        weights = search.coefficients(d, grads)
        # Choices in the order of the keys' numbers, those of a key in the order of rows.
        known, entries = number.flatten().sort(stable=True)
        by_rows, over_ranks = torch.zeros_like(rows, dtype=torch.float32), source.reduction(SUM)
        for block in source.blocks():
            by_keys = torch.zeros_like(block.keys, dtype=torch.float32)
            if len(rows) and len(block.keys):
                operands = Operands.of(replace(pairs, tags=None), block)
                _add_by_rows(operands, number - block.first, weights, search, by_rows)
                ends = block.first + torch.arange(len(by_keys) + 1, device=known.device)
                ends = torch.searchsorted(known, ends)
                _add_by_keys(operands, entries, ends, weights, search, by_keys)
            over_ranks.add((by_keys,))
        return _as_given(pairs, by_rows, over_ranks.finish()[0]), None, None


def _search(operands: Operands, search: Search) -> Tensor:
    """Numbers in a block of the nearest and the farthest key of each row: [1 or 2, b] int64."""
    assert operands.ids is not None, "similar keys need tags"
    tile, sizes = operands.tile("extreme"), operands.sizes(*operands.whole)
    grid = tile.row_grid(*sizes[:2])
    exact = operands.rows, operands.keys
    moved = centred(operands) if not search.is_cosine else operands
    rows, keys, *others = moved.tensors(*operands.whole)
    factors = operands.factors or (None, None)
    pairs = zip((rows, keys), factors, strict=True)
    squares = [rows, rows] if search.is_cosine else [squared_norms(x, f) for x, f in pairs]
    shape = 1 + search.farthest, grid[1], len(rows)
    values = rows.new_empty(shape, dtype=torch.float32)
    numbers = rows.new_empty(shape, dtype=torch.int32)
    launch(
        *("extreme", grid, tile),
        [rows, keys, *exact, *others[:2], *squares, *others[2:], values, numbers],
        sizes,
        COSINE=search.is_cosine,
        FARTHEST=search.farthest,
        PARTS=tile.parts,
        **operands.constants(),
    )
    if grid[1] == 1:
        return numbers[:, 0].long()
    is_lowest = values == values.amin(1, keepdim=True)
    numbers = torch.where(is_lowest & (numbers >= 0), numbers, torch.iinfo(torch.int32).max)
    number = numbers.amin(1)
    return torch.where(number < len(keys), number, -1).long()


def centred(operands: Operands) -> Operands:
    """Operands in fp32 whose rows are their own keys, moved to the middle of the block, where
    products round least. Those in half precision stay, lest they be rounded again."""
    if operands.rows.dtype != torch.float32 or operands.factors is not None:
        return operands
    middle = operands.keys.mean(0)
    keys = operands.keys - middle
    first, last = operands.own, operands.own + len(operands.rows)
    is_own = first >= 0 and last <= len(keys)
    rows = keys[first:last] if is_own else operands.rows - middle
    return replace(operands, rows=rows, keys=keys)


def squared_norms(x: Tensor, factors: Tensor | None) -> Tensor:
    """Squared norms of rows times factors: [n] fp32."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    return (norms if factors is None else norms * factors[: len(x)]).square_()


def _factors(operands: Operands) -> tuple[Tensor, Tensor]:
    return operands.factors or (operands.rows, operands.keys)


def _constants(operands: Operands, search: Search) -> dict[str, Any]:
    return {"COSINE": search.is_cosine, "HAS_FACTORS": operands.factors is not None}


def _values(operands: Operands, numbers: Tensor, search: Search) -> Tensor:
    """Squares or cosine distances of rows and keys by their numbers in a block: [k, b]."""
    values = torch.empty_like(numbers, dtype=torch.float32)
    tensors = [operands.rows, operands.keys, *_factors(operands), numbers, values]
    sizes = [len(operands.rows), len(operands.keys), len(numbers), search.eps]
    constants = _constants(operands, search)
    launch_of_rows("chosen", tensors, sizes, num_rows=numbers.numel(), **constants)
    return values


def _add_by_rows(
    operands: Operands, numbers: Tensor, weights: Tensor, search: Search, sums: Tensor
) -> None:
    tensors = [operands.rows, operands.keys, *_factors(operands), numbers, weights, sums]
    sizes = [len(operands.rows), len(operands.keys), len(numbers), search.eps]
    launch_of_rows("chosen_rows", tensors, sizes, **_constants(operands, search))


def _add_by_keys(
    operands: Operands,
    entries: Tensor,
    ends: Tensor,
    weights: Tensor,
    search: Search,
    sums: Tensor,
) -> None:
    """Gradients by keys, of which the choices are entries ends[j] to ends[j + 1]."""
    num_keys, dim = operands.keys.shape
    row_factors, key_factors = _factors(operands)
    tensors = [operands.keys, operands.rows, key_factors, row_factors, entries]
    tensors += [ends[:-1], ends[1:], weights, sums]
    step = min(_DIMS, 1 << (dim - 1).bit_length())
    constants = {"D": dim, "BM": _ENTRIES, "BK": step, **_constants(operands, search)}
    numbers = [len(operands.rows), search.eps]
    kernel_calls.start("chosen_keys", (num_keys, -(-dim // step)), tensors, numbers, constants)


def _as_given(pairs: Pairs, by_rows: Tensor, by_keys: Tensor) -> Tensor:
    """Gradient of rows as they were given, from that of their multiples times the factor."""
    rows = pairs.rows
    grad, products = torch.empty_like(rows), rows.new_empty(len(rows), dtype=torch.float32)
    one = products.new_ones(())
    launch_of_rows(
        "unit_gradient",
        [rows, by_rows, by_keys, one, rows, products, grad, products],
        [len(rows), len(rows), 0],
        IS_ROW=True,
        IS_KEY=True,
        HAS_PARTNERS=False,
        UNIT=pairs.scale is not None,
    )
    return grad
