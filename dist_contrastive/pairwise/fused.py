"""Statistics and gradients of a block by Triton kernels: scores never reach memory, nothing waits.

What the host would have to ask the device (whether sums have left the range of fp32) is decided
there: the kernel that repeats them ends at once where it is not needed. Gradients of the scores of
some rows and keys at a time are written in the dtype of the operands, for two matrix products,
which add to sums in fp32: of half precision by cuBLAS, of fp32 by a kernel on the tensor cores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.pairwise.kernel_calls import (
    LOG2E,
    Operands,
    add_fp32_product,
    filled,
    is_interpreted,
    launch,
    num_similar,
)
from dist_contrastive.pairwise.pairs import Block, Pairs, chunks
from dist_contrastive.pairwise.reductions import (
    LogSumExp,
    LogSumExpAndPositives,
    PairSum,
    Reduction,
    Statistics,
)
from dist_contrastive.pairwise.way import Grads, Results

# Powers of 2 around the shift: below which a sum of 2^20 exponentials may have lost digits to terms
# below the smallest normal number, and above which a weight may, times a gradient of 2^-30.
_BELOW, _FAR_ABOVE = 82.0, 90.0
_KEY_SUMS = 2**26  # numbers that blocks of rows hold for keys at a time: 256 MiB
_GRADIENTS = 2**28  # gradients of scores that are kept at a time
_ROWS = {2: 4096, 4: 8192}  # that they are of at the most, by bytes of a number
_BLOCK = 256  # multiples of what they are of in keys
_ALIGNED = 16  # numbers to which their lines are filled up, for the loads of products
_UNITS = {"softplus": -LOG2E}  # in which a function takes scores, where these are not natural


class Kernels:
    """A block by kernels.

    Args:
        chunk_size: rows whose gradients of scores are kept at a time; None chooses.
        partners: see `by_kernels.reduce`; gradients leave out what these pairs add by their part
            in log-sum-exps: it nearly cancels with that of the positive, and is added in fp32.
    """

    def __init__(self, chunk_size: int | None, partners: int | None = None) -> None:
        self._chunk_size, self.partners = chunk_size, partners

    def add_statistics(
        self, reduction: Reduction, pairs: Pairs, block: Block, totals: Results
    ) -> None:
        """Those of the block as a whole."""
        if 0 in (len(pairs.rows), len(block.keys)):
            return
        operands = Operands.of(pairs, block)
        if isinstance(reduction, PairSum):
            sums = _pair_kernel(reduction, operands, *operands.whole, None, None, True)
            parts: Results = (sums[0],), ()
        else:
            assert isinstance(reduction, LogSumExp)
            parts = _lse_parts(reduction, operands)
        for of_kind in zip(reduction.joins, totals, parts, strict=True):
            for join, total, part in zip(*of_kind, strict=True):
                join.combine(total, part, out=total)

    def add_gradients(
        self,
        reduction: Reduction,
        pairs: Pairs,
        block: Block,
        statistics: Statistics,
        grads: Grads,
    ) -> None:
        """Gradients of the scores of some rows and keys at a time, and two products of each."""
        if 0 in (len(pairs.rows), len(block.keys)):
            return
        operands = Operands.of(pairs, block)
        if isinstance(reduction, PairSum):
            scores = _pair_gradients(reduction, operands, statistics.grad_rows[0], None)
        else:
            assert isinstance(reduction, LogSumExp)
            scores = _lse_gradients(reduction, operands, statistics, self.partners)
        _add_products(operands, scores, self._chunk_size, grads)

    def add_sums_and_gradients(
        self, reduction: PairSum, pairs: Pairs, block: Block, sums: Tensor, grads: Grads
    ) -> None:
        """Both at once, which computes the scores once: sums [b] in fp64, and gradients by the sum
        of these."""
        if 0 in (len(pairs.rows), len(block.keys)):
            return
        operands, ones = Operands.of(pairs, block), torch.ones_like(sums)
        scores = _pair_gradients(reduction, operands, ones, sums)
        _add_products(operands, scores, self._chunk_size, grads)


def _pair_kernel(
    reduction: PairSum,
    operands: Operands,
    r: slice,
    k: slice,
    weights: Tensor | None,
    g: Tensor | None,
    with_values: bool,
) -> Tensor:
    """Sums over keys k of the function and of its derivative [2, r] in fp64, of which those are
    anything that are not asked for; gradients of scores are written into G [r, k]."""
    assert reduction.expression is not None
    expression, parameter = reduction.expression
    tile, bias, sizes = operands.tile("pair"), operands.bias, operands.sizes(r, k)
    grid = tile.row_grid(*sizes[:2])
    sums = operands.rows.new_empty(2, grid[1], r.stop - r.start, dtype=torch.float32)
    optional = [sums if x is None else x for x in (bias, weights, g)]
    launch(
        *("pair", grid, tile),
        [*operands.tensors(r, k), *optional, sums],
        [*sizes, 0 if g is None else g.stride(0), parameter],
        EXPRESSION=expression,
        LEAVE_OUT=reduction.leave_out,
        UNIT=_UNITS.get(expression, 1.0),
        HAS_IDS=operands.ids is not None,
        HAS_BIAS=bias is not None,
        WITH_VALUES=with_values,
        WITH_GRADIENT=g is not None,
        PARTS=tile.parts,
        **operands.constants(),
    )
    return sums.sum(1, dtype=torch.float64)


def _lse_parts(reduction: LogSumExp, operands: Operands) -> Results:
    """Log-sum-exps of rows and keys in fp64, and what there is of positives."""
    shift = operands.shift()
    sums, positives = _shifted_sums(reduction, operands, shift)
    powers = shift + torch.cat(sums).log2()
    in_range = (powers >= shift - _BELOW).all()
    repeat = (~in_range).int()  # also where there is a NaN, or nothing to sum
    ways = (operands, operands.transposed())[: len(sums)]
    num_parts = min(_running_grid(way)[1] for way in ways)
    again = torch.cat([_running_sums(reduction, way, num_parts, repeat) for way in ways], 2)
    tops, scaled = again.double().unbind()
    lse = torch.logsumexp((tops + scaled.log2()) / LOG2E, 0)
    lse = torch.where(in_range, powers / LOG2E, lse)
    of_rows, *of_keys = lse.split([len(x) for x in sums])
    return (of_rows, *positives), tuple(of_keys)


def _shifted_sums(
    reduction: LogSumExp, operands: Operands, shift: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Sums of ``2^(z - shift)`` of rows [b] and keys [k]; sums and numbers of positives [b]."""
    has_positives, of_keys = isinstance(reduction, LogSumExpAndPositives), []
    tile = operands.tile("lse_positives" if has_positives else "lse")
    (all_rows, k), num_keys = operands.whole, len(operands.keys)
    at_a_time = len(operands.rows)
    if reduction.both:
        of_keys = [shift.new_zeros(num_keys, dtype=torch.float64)]
        at_a_time = max(1, _KEY_SUMS // num_keys) * tile.rows
    of_rows = []
    for r in chunks(all_rows, at_a_time):
        grid = tile.row_grid(*operands.sizes(r, k)[:2])
        sums = shift.new_empty(2 if has_positives else 1, grid[1], r.stop - r.start)
        key_sums = shift.new_empty(grid[0], num_keys) if reduction.both else sums
        launch(
            *("lse", grid, tile),
            [
                *operands.tensors(r, k),
                *operands.limits_of(r, k),
                shift,
                sums[0],
                key_sums,
                sums[-1],
            ],
            operands.sizes(r, k),
            LEAVE_OUT=reduction.leave_out,
            BOTH=reduction.both,
            WITH_POSITIVES=has_positives,
            HAS_LIMITS=operands.limits is not None,
            **operands.constants(),
        )
        of_rows.append(sums.sum(1, dtype=torch.float64))
        for total in of_keys:
            total += key_sums.sum(0, dtype=torch.float64)
    row_sums, *positives = torch.cat(of_rows, 1)
    if not has_positives:
        return [row_sums, *of_keys], ()
    count = num_similar(operands)
    return [row_sums, *of_keys], ((positives[0] + shift * count) / LOG2E, count)


def _running_grid(operands: Operands) -> tuple[int, int]:
    return operands.tile("lse").row_grid(*operands.sizes(*operands.whole)[:2])


def _running_sums(
    reduction: LogSumExp, operands: Operands, num_parts: int, repeat: Tensor
) -> Tensor:
    """Maxima, in powers of 2, and sums of exponentials relative to these, of rows and parts of the
    keys at any range: [2, parts, b]; anything unless `repeat`."""
    whole, grid = operands.whole, (_running_grid(operands)[0], num_parts)
    found = operands.rows.new_empty(2, num_parts, len(operands.rows), dtype=torch.float32)
    launch(
        *("running_lse", grid, operands.tile("lse")),
        [*operands.tensors(*whole), *operands.limits_of(*whole), repeat, found[1], found[0]],
        operands.sizes(*whole),
        LEAVE_OUT=reduction.leave_out,
        HAS_LIMITS=operands.limits is not None,
        **operands.constants(),
    )
    return found


@dataclass(frozen=True)
class _GradScores:
    """Gradients of scores times the factors of their pair, as some at a time can be had."""

    unit: Tensor | None
    """They are divided by it, a power of 2, so that none is too small for their dtype."""
    fill: Callable[[slice, slice, Tensor], None]
    """Writes those of rows r and keys k into G [r, k]."""
    bias: Tensor | None = None
    """Their sums without factors [b]; None: there is no bias."""


def _unit(operands: Operands, grads: Sequence[Tensor]) -> Tensor | None:
    """The power of 2 above the largest gradient by statistics, times the largest factors; None
    where the dtype has the range of fp32."""
    if operands.rows.dtype != torch.float16:
        return None
    largest = torch.cat([*grads]).abs().amax().double()
    for factors in operands.factors or ():
        largest = largest * factors.amax()
    return torch.frexp(largest).exponent.double().exp2()


def _pair_gradients(
    reduction: PairSum, operands: Operands, grads: Tensor, values: Tensor | None
) -> _GradScores:
    """Those by sums whose gradients are given [b]; the sums are added to values [b]."""
    unit = _unit(operands, [grads])
    weights = (grads if unit is None else grads / unit).float()
    by_bias = None if operands.bias is None else torch.zeros_like(grads, dtype=torch.float64)

    def fill(r: slice, k: slice, g: Tensor) -> None:
        sums = _pair_kernel(reduction, operands, r, k, weights[r], g, values is not None)
        for total, part in zip((values, by_bias), sums.unbind(), strict=True):
            if total is not None:
                total[r].add_(part)

    return _GradScores(unit, fill, by_bias)


def _lse_gradients(
    reduction: LogSumExp, operands: Operands, statistics: Statistics, partners: int | None
) -> _GradScores:
    num_rows, num_keys = len(operands.rows), len(operands.keys)
    lse = torch.cat([statistics.rows[0], *statistics.keys])  # of rows and keys, in one go
    grads = torch.cat([statistics.grad_rows[0], *statistics.grad_keys])
    by_positives = statistics.grad_rows[1:2]
    unit = _unit(operands, [grads, *by_positives])
    if unit is not None:
        grads, by_positives = grads / unit, tuple(x / unit for x in by_positives)
    powers = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E)
    rounded, near, kernels = powers.float(), lse, []
    if operands.factors is not None:  # the weights of a pair have the factors of both
        row_factors = operands.factors[0][:num_rows]
        grads[:num_rows].mul_(row_factors)
        by_positives = tuple(x * row_factors for x in by_positives)
    if reduction.both:
        shift = operands.shift()
        key_shift = shift.expand(num_keys)
        if operands.factors is not None:
            key_shift = shift - operands.factors[1][:num_keys].log2()
        near = _near(powers, shift, key_shift)
        weights, tile = _weights(shift - powers, grads), operands.tile("lse_gradient")
        kernels = [(True, tile, weights[:num_rows], filled(key_shift), filled(weights[num_rows:]))]
        if operands.factors is not None:
            grads[num_rows:].mul_(operands.factors[1][:num_keys])
    # inf - inf where nothing is counted
    weights = _weights((rounded - powers).nan_to_num(nan=-torch.inf), grads)
    tile = operands.tile("lse_gradient_each" if reduction.both else "lse_gradient")
    key_lse, key_weights = filled(rounded[num_rows:]), filled(weights[num_rows:])
    kernels.append((False, tile, weights[:num_rows], key_lse, key_weights))
    positives = by_positives[0].float() if by_positives else weights
    constants = {
        "LEAVE_OUT": reduction.leave_out,
        "BOTH": reduction.both,
        "WITH_POSITIVES": bool(by_positives),
        "HAS_PARTNERS": partners is not None,
        "HAS_LIMITS": operands.limits is not None,
        **operands.constants(),
    }

    def fill(r: slice, k: slice, g: Tensor) -> None:
        for is_shared, tile, row_weights, key_lse, key_weights in kernels:
            of_rows, of_keys = (rounded[r], row_weights[r]), (key_lse[k], key_weights[k])
            given = *operands.tensors(r, k), *operands.limits_of(r, k)
            launch(
                *("lse_gradient", tile.row_grid(*g.shape), tile),
                [*given, near, *of_rows, *of_keys, positives[r], g],
                [*operands.sizes(r, k), partners or 0, len(operands.rows), r.start, g.stride(0)],
                SHARED=is_shared,
                PARTS=tile.parts,
                **constants,
            )

    return _GradScores(unit, fill)


def _near(powers: Tensor, shift: Tensor, key_shift: Tensor) -> Tensor:
    """Whether all log-sum-exps are near enough to the shift, and none is NaN: a number on the
    device. A key's own shift, by so much more as its factor is small, takes digits as well."""
    lowest = torch.maximum(key_shift.amax(), shift) - _BELOW
    near = ((powers - shift < _FAR_ABOVE) & (powers > lowest)) | (powers == torch.inf)
    return near.all().int()


def _weights(differences: Tensor, grads: Tensor) -> Tensor:
    """What exponentials are multiplied by, of these differences of their exponents from powers of
    log-sum-exps, and of the gradients by them."""
    return (differences.exp2() * grads).float()


def _add_products(
    operands: Operands, scores: _GradScores, chunk_size: int | None, grads: Grads
) -> None:
    """Add the gradients of rows, keys and bias, from those of the scores.

    Those of rows and keys are of what the factors multiply, the factors held.
    """
    rows, keys, (all_rows, all_keys) = operands.rows, operands.keys, operands.whole
    num_rows = min(len(rows), chunk_size or _ROWS[rows.element_size()])
    at_a_time = max(1, _GRADIENTS // (num_rows * _BLOCK)) * _BLOCK
    width = -(-min(len(keys), at_a_time) // _ALIGNED) * _ALIGNED
    buffer = rows.new_empty(num_rows, width)
    if scores.unit is not None:
        grads.rows.div_(scores.unit)
    for r in chunks(all_rows, num_rows):
        for k in chunks(all_keys, at_a_time):
            g = buffer[: r.stop - r.start, : k.stop - k.start]
            scores.fill(r, k, g)
            add_product(grads.rows[r], g, keys[k])
            if grads.keys is not None:
                add_product(grads.keys[k], g.T, rows[r])
    by_bias = None if scores.bias is None else scores.bias.sum()
    if scores.unit is not None:
        for total in (grads.rows, grads.keys, by_bias):
            if total is not None:
                total.mul_(scores.unit)
    if grads.bias is not None and by_bias is not None:
        grads.bias.add_(by_bias)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to the total in fp32, of operands that may be in half precision."""
    if a.dtype == torch.float32:
        add_fp32_product(total, a, b)
    elif is_interpreted():
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
