"""Reductions by kernels, of rows as the network computed them.

Rows and keys are not brought to unit length in memory: that is a factor of each, and what it adds
to their gradient is made in the pass that writes the gradient. What the score of a row and its
partner adds is in fp32 there, too, where in a trained model it nearly cancels. Sums of a function
of the pair make their gradient in the forward pass, for a gradient by their total.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise import chunked
from dist_contrastive.pairwise.choice import Impl
from dist_contrastive.pairwise.distances import unit_rows
from dist_contrastive.pairwise.fused import Kernels
from dist_contrastive.pairwise.ids import ids_of
from dist_contrastive.pairwise.kernel_calls import LOG2E, launch_of_rows, unfit_rows
from dist_contrastive.pairwise.keys import SUM, KeySource, WholeKeys, open_keys
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.reductions import (
    LogSumExp,
    PairSum,
    Parts,
    Reduction,
    Statistics,
)
from dist_contrastive.pairwise.saved import recall, remember
from dist_contrastive.pairwise.way import Grads


@dataclass(frozen=True)
class _Job:
    """What is reduced, and how."""

    reduction: Reduction
    way: Kernels
    partners: int | None
    by_total: bool
    """Whether gradients are made in the forward pass."""


def reduce(
    reduction: Reduction, pairs: Pairs, chunk_size: int | None, partners: int | None
) -> Parts:
    """`pairwise.reduce` by kernels, in memory linear in rows and keys."""
    rows, keys = pairs.rows, pairs.keys
    if rows.dtype != keys.dtype:
        rows, keys = rows.float(), keys.float()
    keys_or_none = None if pairs.keys is pairs.rows else keys
    scale = None
    if isinstance(pairs.scale, Tensor) and pairs.scale.device == rows.device:
        scale = pairs.scale.float()
    elif pairs.scale is not None:  # times a number of the device, since a copy to it would wait
        scale = (rows.new_ones((), dtype=torch.float32) * pairs.scale).float()
    given = [x for x in (rows, keys, scale, pairs.bias) if x is not None]
    by_total = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    by_total &= isinstance(reduction, PairSum)
    way = Kernels(chunk_size, partners if _are_counted(reduction, pairs, partners) else None)
    job = _Job(reduction, way, partners, by_total)
    results = _Reduce.apply(rows, keys_or_none, scale, pairs.bias, pairs, job)
    num_rows = len(reduction.joins[0])
    of_rows, of_partners, of_keys = results[:num_rows], results[-1:], results[num_rows:-1]
    return (*of_rows, *(() if partners is None else of_partners)), of_keys


def cosines(x: Tensor, y: Tensor, impl: Impl = "auto") -> Tensor:
    """Cosine similarity of each row with its partner, 0 without direction, in fp32 or fp64:
    [n, D] twice to [n]. It has no gradient.

    Args:
        impl: as of `pairwise.reduce`; what is neither triton nor auto is plain torch.
    """
    x, y = x.detach(), y.detach()
    by_kernels = impl == "triton" or (impl == "auto" and x.is_cuda)
    if by_kernels and unfit_rows(x, y) is None:
        if x.dtype != y.dtype:
            x, y = x.float(), y.float()
        inverses, found = x.new_empty(2, len(x), dtype=torch.float32).unbind()
        constants = {"HAS_PARTNERS": True, "UNIT": True}
        tensors = [x.contiguous(), y.contiguous(), inverses, found]
        launch_of_rows("cosine", tensors, [len(x), 0], **constants)
        return found
    dtype = collectives.accumulation_dtype(torch.promote_types(x.dtype, y.dtype))
    return (unit_rows(x.to(dtype)) * unit_rows(y.to(dtype))).sum(1)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        keys: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        pairs: Pairs,
        job: _Job,
    ) -> tuple[Tensor, ...]:
        ctx.job, ctx.is_same = job, keys is None
        pairs, of_partners = unit_operands(pairs, job.partners, rows, keys, scale)
        source = open_keys(pairs)
        if isinstance(source, WholeKeys) and pairs.tags is not None and not job.by_total:
            row_tags, tags = ids_of(pairs, source.block)  # once, for backward, too
            pairs = replace(pairs, row_tags=row_tags)
            source = WholeKeys(pairs, replace(source.block, tags=tags))
        if job.by_total:
            wants_keys = ctx.is_same or ctx.needs_input_grad[1]
            sums, made = _sums_and_gradients(job, pairs, source, wants_keys)
            remember(ctx, pairs, None, *made)
            return sums.float(), of_partners
        of_rows, of_keys = chunked.statistics(job.reduction, pairs, source, job.way)
        remember(ctx, pairs, source, of_partners, *of_rows, *of_keys)
        return (*(x.float() for x in (*of_rows, *of_keys)), of_partners)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        collectives.refuse_graph()
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_gradients(ctx, grads), None, None


def unit_operands(
    pairs: Pairs, partners: int | None, rows: Tensor, keys: Tensor | None, scale: Tensor | None
) -> tuple[Pairs, Tensor]:
    """The pairs as kernels take them, thresholds in powers of 2, and scores of partners [b],
    nothing if not asked for."""
    rows = rows.contiguous()
    keys = rows if keys is None else keys.contiguous()
    has_partners, is_unit = partners is not None, scale is not None
    most = max(len(rows), len(keys))
    inverses, key_inverses, cosines = rows.new_empty(3, most, dtype=torch.float32).unbind()
    constants = {"HAS_PARTNERS": has_partners, "UNIT": is_unit}
    numbers = [len(rows), partners or 0]
    if has_partners or is_unit:
        launch_of_rows("cosine", [rows, keys, inverses, cosines], numbers, **constants)
    factors, of_partners = None, cosines[: len(rows) if has_partners else 0]
    if scale is not None:
        if keys is rows:
            key_inverses = inverses
        else:
            constants["HAS_PARTNERS"] = False
            tensors = [keys, keys, key_inverses, cosines]
            launch_of_rows("cosine", tensors, [len(keys), 0], **constants)
        factors = inverses[: len(rows)] * scale, key_inverses[: len(keys)]
        of_partners = of_partners * scale
    thresholds = pairs.thresholds
    if thresholds is not None:  # those of rows and keys may be the same
        powers = {id(x): (x * LOG2E).float().contiguous() for x in thresholds if x is not None}
        thresholds = powers[id(thresholds[0])], powers.get(id(thresholds[1]))
    made: Any = {"rows": rows, "keys": keys, "scale": scale, "factors": factors}
    return replace(pairs, **made, thresholds=thresholds), of_partners


def _sums_and_gradients(
    job: _Job, pairs: Pairs, source: KeySource, wants_keys: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sums [b] of rows, and gradients of their total by rows, by the bias and by keys."""
    assert isinstance(job.reduction, PairSum)
    rows = torch.zeros_like(pairs.rows, dtype=torch.float32)
    sums = rows.new_zeros(len(rows), dtype=torch.float64)
    made = Grads(rows, None, rows.new_zeros((), dtype=torch.float64))
    over_ranks = source.reduction(SUM) if wants_keys else None
    for block in source.blocks():
        keys = torch.zeros_like(block.keys, dtype=torch.float32) if over_ranks else None
        made = made._replace(keys=keys)
        job.way.add_sums_and_gradients(job.reduction, pairs, block, sums, made)
        if over_ranks and keys is not None:
            over_ranks.add((keys,))
    of_keys = over_ranks.finish() if over_ranks else ()
    assert made.bias is not None
    return sums, (rows, made.bias, *of_keys)


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients by rows, keys, scale and bias."""
    job, (pairs, held, saved), wants = ctx.job, recall(ctx), ctx.needs_input_grad
    *of_results, by_partners = grads
    num_rows = len(job.reduction.joins[0])
    grad_rows, grad_keys = tuple(of_results[:num_rows]), tuple(of_results[num_rows:])
    known = Statistics((), grad_rows, (), grad_keys)
    weight = pairs.rows.new_ones((), dtype=torch.float32)
    # Of a total all gradients are one number, expanded; others than the total's are made again.
    if job.by_total and grad_rows[0].stride() == (0,):
        weight = grad_rows[0][:1].sum()
        sums = Grads(saved[0], saved[2] if len(saved) > 2 else None, saved[1] * weight)
    else:
        if not job.by_total:
            known = replace(known, rows=saved[1 : 1 + num_rows], keys=saved[1 + num_rows :])
            if job.way.partners is not None:
                by_partners = by_partners + _partner_gradients(job.way.partners, saved[0], known)
        source = held or open_keys(pairs)
        by_keys = ctx.is_same or wants[1]
        sums = chunked.gradients(job.reduction, pairs, source, job.way, known, by_keys, wants[3])
    coefficients = None if job.partners is None else _times_factors(job, pairs, by_partners)
    rows, keys, scale = _input_gradients(ctx, pairs, sums, weight, coefficients)
    bias = None
    if pairs.bias is not None and sums.bias is not None and wants[3]:
        bias = sums.bias.to(pairs.bias.dtype).view_as(pairs.bias)
    return rows, keys, scale, bias


def _are_counted(reduction: Reduction, pairs: Pairs, partners: int | None) -> bool:
    """Whether partners count in log-sum-exps, as is known without their scores."""
    if not isinstance(reduction, LogSumExp) or pairs.thresholds is not None:
        return False
    return {"nothing": True, "own": partners != 0, "similar": False}[reduction.leave_out]


def _partner_gradients(shift: int, scores: Tensor, known: Statistics) -> Tensor:
    """What pairs of partners add to the gradients of their scores by log-sum-exps: [b] fp64."""
    total = (scores - known.rows[0]).exp() * known.grad_rows[0]
    for lse, grad in zip(known.keys, known.grad_keys, strict=True):
        own_lse, own_grad = (x[: len(scores)].roll(-shift) for x in (lse, grad))
        total = total + (scores - own_lse).exp() * own_grad
    return total


def _times_factors(job: _Job, pairs: Pairs, by_partners: Tensor) -> Tensor:
    """Gradients of scores of partners, times the factors of the pair: [b] fp32."""
    if pairs.factors is None:
        return by_partners.float()
    of_rows, of_keys = pairs.factors
    of_keys = of_keys[: len(of_rows)]
    of_keys = of_keys.roll(-job.partners) if job.partners else of_keys
    return (by_partners * of_rows * of_keys).float()


def _input_gradients(
    ctx: Any, pairs: Pairs, sums: Grads, weight: Tensor, coefficients: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows and keys as they were given, from sums for what factors multiply, and that
    of the scale."""
    rows, keys, wants = pairs.rows, pairs.keys, ctx.needs_input_grad
    constants = {"HAS_PARTNERS": coefficients is not None, "UNIT": pairs.scale is not None}
    at_rows = torch.empty_like(rows)
    products = rows.new_empty(len(rows), dtype=torch.float32)
    others = products if coefficients is None else coefficients
    numbers = [len(rows), len(rows), ctx.job.partners or 0]
    of_keys = sums.rows if sums.keys is None else sums.keys
    tensors = [rows, sums.rows, of_keys, weight, keys, others, at_rows, products]
    constants |= {"IS_ROW": True, "IS_KEY": ctx.is_same}
    launch_of_rows("unit_gradient", tensors, numbers, **constants)
    at_keys = None
    if sums.keys is not None and not ctx.is_same:
        at_keys = torch.empty_like(keys)
        tensors = [keys, sums.keys, sums.keys, weight, rows, others, at_keys, products]
        constants |= {"IS_ROW": False, "IS_KEY": True}
        numbers[0] = len(keys)
        launch_of_rows("unit_gradient", tensors, numbers, **constants)
    scale = None
    if pairs.scale is not None and wants[2]:
        scale = (products.sum(dtype=torch.float64) / pairs.scale).float()
    return at_rows if wants[0] else None, at_keys, scale
