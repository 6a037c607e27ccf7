"""Statistics and gradients of a block by Triton kernels: scores never reach memory, nothing waits.

What the host would have to ask the device (whether sums have left the range of fp32) is decided
there: the kernel that repeats them ends at once where it is not needed. In backward the gradients
of the scores of some rows are written in the dtype of the operands, for two matrix products.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.pairwise.kernel_calls import Operands, launch, num_similar
from dist_contrastive.pairwise.keys import Block
from dist_contrastive.pairwise.pairs import Pairs, chunks
from dist_contrastive.pairwise.reductions import (
    LogSumExp,
    LogSumExpAndPositives,
    PairSum,
    Reduction,
    Statistics,
)
from dist_contrastive.pairwise.way import Grads, Results

_LOG2E = 1 / math.log(2)
# Powers of 2 around the shift: below which a sum of 2^20 exponentials may have lost digits to terms
# below the smallest normal number, and above which a weight of rows may.
_BELOW, _FAR_ABOVE = 82.0, 102.0
_KEY_SUMS = 2**26  # numbers that blocks of rows hold for keys at a time: 256 MiB
_GRADIENTS = 2**29  # bytes of gradients of scores that are kept at a time
_MOST_ROWS, _BLOCK = 4096, 128  # rows that they are of at the most, and multiples of what
_ALIGNED = 16  # numbers to which their lines are filled up, for the loads of products
_GROUP = 8  # blocks of rows whose programs share keys in the cache


class Kernels:
    """A block by kernels.

    Args:
        chunk_size: rows whose gradients of scores are kept at a time; None chooses.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self._chunk_size = chunk_size

    def add_statistics(
        self, reduction: Reduction, pairs: Pairs, block: Block, totals: Results
    ) -> None:
        """Those of the block as a whole."""
        if 0 in (len(pairs.rows), len(block.keys)):
            return
        operands = Operands.of(pairs, block)
        if isinstance(reduction, PairSum):
            parts: Results = (_pair_sums(reduction, operands),), ()
        else:
            assert isinstance(reduction, LogSumExp)
            parts = _lse_parts(reduction, operands)
        for of_kind in zip(reduction.joins, totals, parts, strict=True):
            for join, total, part in zip(*of_kind, strict=True):
                total.copy_(join.combine(total, part))

    def add_gradients(
        self,
        reduction: Reduction,
        pairs: Pairs,
        block: Block,
        statistics: Statistics,
        grads: Grads,
    ) -> None:
        """Gradients of the scores of some rows at a time, and two products of each."""
        if 0 in (len(pairs.rows), len(block.keys)):
            return
        operands = Operands.of(pairs, block)
        if isinstance(reduction, PairSum):
            scores = _pair_gradients(reduction, operands, statistics)
        else:
            assert isinstance(reduction, LogSumExp)
            scores = _lse_gradients(reduction, operands, statistics)
        _add_products(operands, scores, self._chunk_size or _rows_at_a_time(operands), grads)


def _pair_sums(reduction: PairSum, operands: Operands) -> Tensor:
    """Sums over the block's keys: [b] fp64."""
    assert reduction.expression is not None
    expression, parameter = reduction.expression
    r, tile, bias = slice(0, len(operands.rows)), operands.tile("pair_sum"), operands.bias
    grid = tile.row_grid(*operands.sizes(r)[:2])
    sums = operands.rows.new_empty(grid[1], r.stop, dtype=torch.float32)
    launch(
        *("pair_sum", grid, tile),
        [*operands.tensors(r), sums if bias is None else bias, sums],
        [*operands.sizes(r), parameter],
        EXPRESSION=expression,
        HAS_IDS=operands.ids is not None,
        HAS_BIAS=bias is not None,
        **operands.constants(),
    )
    return sums.sum(0, dtype=torch.float64)


def _lse_parts(reduction: LogSumExp, operands: Operands) -> Results:
    """Log-sum-exps of rows and keys in fp64, and what there is of positives."""
    shift = operands.shift()
    sums, positives = _shifted_sums(reduction, operands, shift)
    powers = shift + torch.cat(sums).log2()
    in_range = (powers >= shift - _BELOW).all()
    repeat = (~in_range).int()  # also where there is a NaN, or nothing to sum
    again = [
        _running_lse(reduction, way, repeat)
        for way, _ in zip((operands, operands.transposed()), sums, strict=False)
    ]
    lse = torch.where(in_range, powers, torch.cat(again)) / _LOG2E
    of_rows, *of_keys = lse.split([len(x) for x in sums])
    return (of_rows, *positives), tuple(of_keys)


def _shifted_sums(
    reduction: LogSumExp, operands: Operands, shift: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Sums of ``2^(z - shift)`` of rows [b] and keys [k]; sums and numbers of positives [b]."""
    has_positives, of_keys = isinstance(reduction, LogSumExpAndPositives), []
    tile = operands.tile("lse_positives" if has_positives else "lse")
    num_keys, at_a_time = len(operands.keys), len(operands.rows)
    if reduction.both:
        of_keys = [shift.new_zeros(num_keys, dtype=torch.float64)]
        at_a_time = max(1, _KEY_SUMS // num_keys) * tile.rows
    of_rows = []
    for r in chunks(slice(0, len(operands.rows)), at_a_time):
        grid = tile.row_grid(*operands.sizes(r)[:2])
        sums = shift.new_empty(2 if has_positives else 1, grid[1], r.stop - r.start)
        key_sums = shift.new_empty(grid[0], num_keys) if reduction.both else sums
        launch(
            *("lse", grid, tile),
            [*operands.tensors(r), shift, sums[0], key_sums, sums[-1]],
            operands.sizes(r),
            LEAVE_OUT=reduction.leave_out,
            BOTH=reduction.both,
            WITH_POSITIVES=has_positives,
            **operands.constants(),
        )
        of_rows.append(sums.sum(1, dtype=torch.float64))
        for total in of_keys:
            total += key_sums.sum(0, dtype=torch.float64)
    row_sums, *positives = torch.cat(of_rows, 1)
    if not has_positives:
        return [row_sums, *of_keys], ()
    count = num_similar(operands)
    return [row_sums, *of_keys], ((positives[0] + shift * count) / _LOG2E, count)


def _running_lse(reduction: LogSumExp, operands: Operands, repeat: Tensor) -> Tensor:
    """Log-sum-exps of rows at any range: [b] fp64, in powers of 2; anything unless `repeat`."""
    r, tile = slice(0, len(operands.rows)), operands.tile("lse")
    grid = tile.row_grid(*operands.sizes(r)[:2])
    sums, tops = operands.rows.new_empty(2, grid[1], r.stop, dtype=torch.float32)
    launch(
        *("running_lse", grid, tile),
        [*operands.tensors(r), repeat, sums, tops],
        operands.sizes(r),
        LEAVE_OUT=reduction.leave_out,
        **operands.constants(),
    )
    powers = tops.double() + sums.double().log2()
    return torch.logsumexp(powers / _LOG2E, 0) * _LOG2E


@dataclass(frozen=True)
class _GradScores:
    """Gradients of scores, as some rows at a time can be had.

    Divided by `unit` none is too small for the dtype of the operands. They hold both factors of
    their pair: one belongs to the row or key that they are multiplied with, and the other, one too
    many, is divided off their sum.
    """

    unit: Tensor
    fill: Callable[[slice, Tensor], None]
    """Writes those of rows r into G [r, k]."""
    own: Tensor | None = None
    """Those of own pairs [b] in fp32, which are 0 in G; None: all are 0."""
    bias: Tensor | None = None
    """Parts of their sum, without factors; None: there is no bias."""


def _unit(operands: Operands, grads: Tensor) -> Tensor:
    """The largest of the gradients by statistics, times the largest factors: fp64 scalar."""
    largest = grads.abs().amax().double()
    unit = torch.where(largest > 0, largest, 1.0)
    return unit * math.prod(x.amax() for x in operands.factors or ())


def _pair_gradients(reduction: PairSum, operands: Operands, statistics: Statistics) -> _GradScores:
    assert reduction.expression is not None
    expression, parameter = reduction.expression
    tile, (grads,) = operands.tile("pair_gradient"), statistics.grad_rows
    unit, bias = _unit(operands, grads), operands.bias
    weights = (grads / unit).float()
    num_parts = -(-len(operands.keys) // tile.keys)
    by_bias = None if bias is None else weights.new_empty(num_parts * len(weights))

    def fill(r: slice, g: Tensor) -> None:
        g_bias = g
        if by_bias is not None:
            g_bias = by_bias[num_parts * r.start : num_parts * r.stop]
        launch(
            *("pair_gradient", tile.tile_grid(*g.shape), tile),
            [*operands.tensors(r), g if bias is None else bias, weights[r], g, g_bias],
            [*operands.sizes(r), g.stride(0), parameter],
            EXPRESSION=expression,
            HAS_IDS=operands.ids is not None,
            HAS_BIAS=bias is not None,
            GROUP=_GROUP,
            **operands.constants(),
        )

    return _GradScores(unit, fill, bias=by_bias)


def _lse_gradients(reduction: LogSumExp, operands: Operands, statistics: Statistics) -> _GradScores:
    shift, num_keys = operands.shift(), len(operands.keys)
    lse = torch.cat([statistics.rows[0], *statistics.keys])  # of rows and keys, in one go
    grads = torch.cat([statistics.grad_rows[0], *statistics.grad_keys])
    by_positives = statistics.grad_rows[1:2]
    unit = _unit(operands, torch.cat([grads, *by_positives]))
    powers = torch.where(lse == -torch.inf, torch.inf, lse * _LOG2E)
    rounded, far = powers.float(), _far(powers, shift)
    each, shared = (_weights(powers, grads / unit, x) for x in (rounded, shift))
    positives = (by_positives[0] / unit).float() if by_positives else each
    own = each.new_zeros(len(operands.rows)) if reduction.leave_out == "nothing" else None
    constants = {
        "LEAVE_OUT": reduction.leave_out,
        "BOTH": reduction.both,
        "WITH_POSITIVES": bool(by_positives),
        "GROUP": _GROUP,
        **operands.constants(),
    }

    kernels = [(False, each, operands.tile("lse_gradient"))]
    if reduction.both:
        tile = operands.tile("lse_gradient_each")
        kernels = [(True, shared, kernels[0][2]), (False, each, tile)]

    def fill(r: slice, g: Tensor) -> None:
        outputs = g, g if own is None else own[r]
        for is_shared, weights, tile in kernels:
            of_pairs = rounded[r], weights[r], rounded[-num_keys:], weights[-num_keys:]
            launch(
                *("lse_gradient", tile.tile_grid(*g.shape), tile),
                [*operands.tensors(r), shift, far, *of_pairs, positives[r], *outputs],
                [*operands.sizes(r), g.stride(0)],
                SHARED=is_shared,
                **constants,
            )

    return _GradScores(unit, fill, own)


def _far(powers: Tensor, shift: Tensor) -> Tensor:
    """Whether a log-sum-exp is too far from the shift, or NaN: a number on the device."""
    above = powers - shift
    near = ((above < _FAR_ABOVE) & (above > -_BELOW)) | (powers == torch.inf)
    return (~near.all()).int()


def _weights(powers: Tensor, grads: Tensor, shift: Tensor) -> Tensor:
    """What ``2^(z - shift)`` is multiplied by, for log-sum-exps and the gradients by them."""
    differences = (shift - powers).nan_to_num(nan=-torch.inf)  # 0 where nothing is counted
    return (differences.exp2() * grads).float()


def _rows_at_a_time(operands: Operands) -> int:
    """Rows whose gradients of scores fit into `_GRADIENTS`: whole blocks of them."""
    of_row = len(operands.keys) * operands.rows.element_size()
    return min(_MOST_ROWS, max(1, _GRADIENTS // (of_row * _BLOCK)) * _BLOCK)


def _add_products(operands: Operands, scores: _GradScores, at_a_time: int, grads: Grads) -> None:
    """Add the gradients of rows, keys and bias, from those of the scores."""
    rows, keys, grad_keys = operands.rows, operands.keys, grads.keys
    of_rows, of_keys = (
        (scores.unit / factors).float()[:, None] for factors in operands.all_factors()
    )
    stride = -(-len(keys) // _ALIGNED) * _ALIGNED
    buffer = rows.new_empty(min(at_a_time, len(rows)), stride)
    for r in chunks(slice(0, len(rows)), at_a_time):
        grad_scores = buffer[: r.stop - r.start, : len(keys)]
        scores.fill(r, grad_scores)
        grads.rows[r].addcmul_(_product(grad_scores, keys), of_rows[r])
        if grad_keys is not None:
            grad_keys += _product(grad_scores.T, rows[r])
    if scores.own is not None:
        has_own, own = operands.own_pairs()
        by_own = scores.own[has_own, None]
        grads.rows[has_own].addcmul_(by_own * of_rows[has_own], keys[own])
        if grad_keys is not None:
            grad_keys[own].addcmul_(by_own, rows[has_own])
    if grad_keys is not None:
        grad_keys *= of_keys
    if grads.bias is not None and scores.bias is not None:
        grads.bias.add_(scores.bias.sum(dtype=torch.float64) * scores.unit)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32, of operands that may be in half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
