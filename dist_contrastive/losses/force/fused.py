"""The force on this rank's generated points by Triton kernels: what passes.py has, with no waits.

Each pass visits panels of distances (panels.py), of which a kernel reduces all temperatures at
once. What is exchanged and joined is in fp64 and natural logarithms, what kernels take in fp32 and
powers of 2.

T temperatures, G groups, L labels, R points of this rank, of which m are generated. With labels L
is the number of points: how many labels there are is not asked for, and most have no points.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_contrastive.losses.force.affinity import ForceRules
from dist_contrastive.losses.force.kernel_calls import launch, product_precision
from dist_contrastive.losses.force.panels import KeyBlock, Panel, Panels
from dist_contrastive.losses.force.passes import RankForce
from dist_contrastive.losses.force.segments import label_counts, label_log_sums, label_sums
from dist_contrastive.losses.force.softmaxes import (
    LOG2E,
    Terms,
    softmaxes_of,
    temperature_constants,
)
from dist_contrastive.losses.force.sums import LogSums, Pool, log_largest_force, log_mean_length
from dist_contrastive.pairwise.tile_shapes import TileShape


def distance_sums(
    panels: Panels,
    rules: ForceRules,
    weights: Tensor | None,
    num_labels: int,
    grad_kinds: frozenset[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`passes.distance_sums`, by kernels."""
    rows = _rows_of_matrix(panels, rules)
    labels = panels.labels[rows]
    sums = panels.rows.new_zeros(len(panels.rows), rows.stop, dtype=torch.float64)
    count = sums.new_zeros(len(sums), num_labels)
    row_counts = label_counts(labels, num_labels)
    out = torch.zeros_like(panels.rows) if grad_kinds else None
    factors = torch.zeros_like(sums)
    for block in panels.blocks(*(() if weights is None else (weights,))):
        sums += _sums_of_distances(panels, block, rows)
        of_keys = label_counts(block.labels, num_labels)
        if weights is not None:
            of_keys = label_sums(block.extras[0].double(), block.labels, num_labels)
        count += row_counts * of_keys
        if out is not None:
            for kind in grad_kinds:
                _add_length_gradients(panels, block, weights, panels.span_of(kind), out, factors)
    if out is not None:
        out.addcmul_(panels.rows, factors[..., None].to(out.dtype))
    return label_sums(sums, labels, num_labels), count, out


def _rows_of_matrix(panels: Panels, rules: ForceRules) -> slice:
    """Rows that A has."""
    return slice(0, panels.rows.shape[1] if rules.square else panels.num_generated)


def _sums_of_distances(panels: Panels, block: KeyBlock, rows: slice) -> Tensor:
    """Over keys, times their weights: [G, rows] fp64."""
    tile = panels.tile("sums", len(block))
    parts = panels.parts(rows, len(block), tile)
    num_groups, num_rows = panels.rows.shape[:2]
    sums = panels.rows.new_empty(parts, num_groups, num_rows)
    for panel in panels.panels(block, rows):
        g = panel.g
        launch(
            "distance_sum",
            panel.programs(tile, parts),
            tile,
            [panel.d, block.extras[0][g] if block.extras else panel.d, sums[:, g]],
            [*panel.sizes, len(block), num_rows, num_groups, panel.r.start, panel.stride, parts],
            {"HAS_WEIGHTS": bool(block.extras), "BM": tile.rows, "BN": tile.keys},
        )
    return sums[..., rows].sum(0, dtype=torch.float64)


def _add_length_gradients(
    panels: Panels,
    block: KeyBlock,
    weights: Tensor | None,
    rows: slice,
    out: Tensor,
    factors: Tensor,
) -> None:
    """Add the derivative of the sum of all distances by some rows, see `_add_differences`."""
    row_weights = None if weights is None else weights.T.contiguous()

    def launch_weights(panel: Panel, outputs: list[Tensor], numbers: list[int], how: _How) -> None:
        g, of_pairs = panel.g, (panel.d, panel.d)
        if row_weights is not None:
            of_pairs = row_weights[g], block.extras[0][g]
        launch(
            "length_weight",
            how.programs,
            how.tile,
            [panel.d, panels.norms[g], *of_pairs, *outputs],
            numbers,
            how.constants | {"HAS_WEIGHTS": row_weights is not None},
        )

    _add_differences(panels, block, rows, launch_weights, out, factors)


class _How(NamedTuple):
    """How a kernel is started."""

    programs: int
    tile: TileShape
    constants: dict[str, Any]


_Launch = Callable[[Panel, list[Tensor], list[int], _How], None]
"""Start of a kernel of weights: panel, WEIGHTS to FLAGS, numbers M to parts."""


def _add_differences(
    panels: Panels, block: KeyBlock, rows: slice, weigh: _Launch, out: Tensor, factors: Tensor
) -> None:
    """Add ``sum_k weight[j, k] (x[j] - y[k])`` over the keys of a block to some rows.

    A product, of which the caller adds the part of the rows: `factors` [G, R] fp64 times x. Pairs
    that are near, where this would lose digits, are summed by their differences.

    Args:
        out: [G, n, D] of the first n rows.
    """
    tile = panels.tile("weights", len(block))
    parts = panels.parts(rows, len(block), tile)
    num_groups, num_rows, num_dims = panels.rows.shape
    constants: dict[str, Any] = {"BM": tile.rows, "BN": tile.keys}
    sums = panels.rows.new_empty(parts, num_groups, num_rows)
    for panel in panels.panels(block, rows):
        g, (m, p) = panel.g, panel.sizes
        weights, near_weights = panels.buffer("weights", 2, len(panel.d), m, panel.stride)
        num_blocks = -(-len(block) // tile.keys)
        flags = block.own.new_empty(panel.programs(tile, num_blocks))
        weigh(
            panel,
            [weights, near_weights, sums[:, g], flags],
            [m, p, len(block), num_rows, num_groups, panel.r.start, panel.stride, parts],
            _How(panel.programs(tile, parts), tile, constants),
        )
        launch(
            "near",
            panel.programs(tile, -(-num_dims // tile.dims)),
            tile,
            [near_weights, flags, panels.rows[g], block.keys[g], out[g]],
            [m, len(block), num_rows, panel.r.start, panel.stride, out.shape[1]],
            constants | {"D": num_dims, "BK": tile.dims},
        )
        product = panels.product_tile(m)
        launch(
            "product",
            panel.programs(product, -(-num_dims // product.keys)),
            product,
            [weights, flags, block.columns[g], out[g]],
            [m, len(block), panel.r.start, panel.stride, out.shape[1]],
            {
                **{
                    "D": num_dims,
                    "HAS_LABELS": panels.has_labels,
                    "PRECISION": product_precision(),
                },
                **{"FLAG_ROWS": tile.rows, "FLAG_KEYS": tile.keys},
                **{"BM": product.rows, "BN": product.keys, "BK": product.dims},
            },
        )
    factors[:, rows] += sums[..., rows].sum(0, dtype=torch.float64)


def force(
    panels: Panels,
    rules: ForceRules,
    pool: Pool,
    scale: Tensor,
    weights: Tensor | None,
    diagnostics: bool,
) -> RankForce:
    """`passes.streamed_force`, by kernels."""
    labels, num_labels = panels.labels[: panels.num_generated], scale.shape[-1]
    by_force = rules.divide_by == "force"
    inverse = LOG2E / (scale if num_labels == 1 else scale[:, panels.labels])
    inverse = inverse.expand(panels.rows.shape[:2])
    rates = torch.stack([inverse / t for t in rules.temperatures])
    softmaxes = softmaxes_of(panels, rules, rates)
    terms = Terms.of(rules, rates, softmaxes, weights)
    sums = _log_sums(panels, rules, terms, num_labels)
    # In units of each scale, since a unit may be a mean over several of these.
    log_scale = scale.double().log()
    sums = replace(sums, square=sums.square - 2 * log_scale)
    log_unit = log_largest_force(sums, labels, pool) if by_force else log_mean_length(sums, pool)
    per_temperature = by_force or diagnostics
    found = _weighted_sum(panels, terms, sums, log_unit + log_scale, per_temperature)
    rms = neighbours = None
    if diagnostics:
        rms = _root_mean_square(found, labels, num_labels, pool)
        rms = rms * log_unit.exp() if by_force else rms
        half = softmaxes_of(panels, rules, 2 * rates)  # at half the temperatures
        neighbours = (2 * softmaxes.lse[0] - half.lse[0])[..., : len(labels)].exp()
        neighbours = neighbours.nan_to_num(0.0).to(scale.dtype)
    if by_force:
        found = _with_unit_rms(found, labels, num_labels, pool)
    found = found.sum(0, keepdim=True)
    if rules.normalise_total:
        found = _with_unit_rms(found, labels, num_labels, pool)
    return RankForce(found[0], rms, neighbours)


def _log_sums(panels: Panels, rules: ForceRules, terms: Terms, num_labels: int) -> LogSums:
    """`passes._log_sums`. Collectives: one round over the keys."""
    rows = _rows_of_matrix(panels, rules)
    # By side: over negatives, over positives; of keys that coincide with the row, of others.
    shape = 2, *terms.rates.shape[:2], rows.stop
    coincide, others = terms.rates.new_full((2, *shape), -torch.inf, dtype=torch.float64)
    square, num_pairs = others[0], others.new_zeros(num_labels)
    row_counts = label_counts(panels.labels[rows], num_labels)
    for block in panels.blocks(*terms.payload()):
        num_pairs += row_counts * label_counts(block.labels, num_labels)
        coinciding, apart, squares = _sums_of_affinities(panels, block, terms, rows)
        coincide = torch.logaddexp(coincide, coinciding)
        others = torch.logaddexp(others, apart)
        square = torch.logaddexp(square, squares)
    if terms.log_floor is not None:  # a point with itself has it, and adds nothing to a force
        own = others.new_full((), terms.log_floor / LOG2E)
        if terms.log_weights is not None:
            own = own + terms.log_weights[:, : rows.stop].double() / LOG2E
        coincide[0] = torch.logaddexp(coincide[0], own.expand_as(coincide[0]))
    negative, positive = torch.logaddexp(coincide, others)
    of_force = torch.logaddexp(positive + others[0], negative + others[1])
    log_squares = label_log_sums(square, panels.labels[rows], num_labels)
    return LogSums(negative, positive, of_force, log_squares, num_pairs)


def _sums_of_affinities(
    panels: Panels, block: KeyBlock, terms: Terms, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of sums of A over negatives, over positives: over keys that coincide and over
    others, [2, T, G, rows] fp64 each; and of sums of ``(d A)^2`` over all [T, G, rows]."""
    split, num_keys = block.num_negative, len(block)
    tile = panels.tile("affinities", num_keys)
    parts = 2 * panels.parts(rows, num_keys, tile)
    num_groups, num_rows = terms.rates.shape[1:]
    outputs = terms.rates.new_empty(4, parts, *terms.rates.shape)
    for panel in panels.panels(block, rows):
        g = panel.g
        launch(
            "affinity_sum",
            panel.programs(tile, parts),
            tile,
            [panel.d, *terms.of_pairs(g, block), *outputs[:, :, :, g]],
            [
                *(*panel.sizes, num_keys, num_rows, num_groups, panel.r.start, panel.stride),
                *(parts, 2, split, terms.log_floor or 0.0),
            ],
            temperature_constants(terms.rates)
            | {"HAS_FLOOR": terms.has_floor, "BM": tile.rows, "BN": tile.keys},
        )
    tops, sums, squares, coinciding = outputs[..., rows].double()
    tops = tops / LOG2E
    if terms.log_floor is None:
        tops += terms.rows[..., rows].double() / LOG2E
    others = (sums.log() + tops).unflatten(0, (2, -1)).logsumexp(1)
    unit = terms.rates[0, :, rows].double()  # of lengths
    log_squares = (squares.log() + 2 * tops).logsumexp(0) - 2 * unit.log()
    return coinciding.unflatten(0, (2, -1)).sum(1).log(), others, log_squares


def _weighted_sum(
    panels: Panels, terms: Terms, sums: LogSums, log_unit: Tensor, per_temperature: bool
) -> Tensor:
    """`passes._weighted_sum`. Collectives: one round over the keys."""
    rows, labels = slice(0, panels.num_generated), panels.labels[: panels.num_generated]
    log_unit = torch.where(log_unit == -torch.inf, torch.inf, log_unit)
    of_rows = log_unit if log_unit.shape[-1] == 1 else log_unit[..., labels]
    # For negatives and positives, what the others' sums are over the unit.
    factors = torch.zeros_like(terms.rates).expand(2, *terms.rates.shape).clone()
    for factor, other in zip(factors, (sums.positive, sums.negative), strict=True):
        factor[..., rows] = (other[..., rows] - of_rows) * LOG2E
        if terms.log_floor is None:
            factor += terms.rows
    numbers = range(len(terms.rates)) if per_temperature else range(1)
    found = panels.rows.new_zeros(len(numbers), *panels.rows[:, rows].shape)
    of_differences = found.new_zeros(*found.shape[:2], panels.rows.shape[1], dtype=torch.float64)
    for block in panels.blocks(*terms.payload()):
        for number in numbers:
            t = slice(number, number + 1) if per_temperature else slice(None)
            weigh = _force_weights(panels, block, terms, factors[:, t], t)
            _add_differences(panels, block, rows, weigh, found[number], of_differences[number])
    weight = of_differences[..., rows, None].to(found.dtype)
    return found.addcmul_(panels.rows[:, rows].expand_as(found), weight)


def _force_weights(
    panels: Panels, block: KeyBlock, terms: Terms, factors: Tensor, t: slice
) -> _Launch:
    """Start of the kernel at some temperatures."""

    def launch_weights(panel: Panel, outputs: list[Tensor], numbers: list[int], how: _How) -> None:
        g = panel.g
        launch(
            "force_weight",
            how.programs,
            how.tile,
            [panel.d, panels.norms[g], *terms.of_pairs(g, block, t), *factors[:, :, g], *outputs],
            [*numbers, block.num_negative, terms.log_floor or 0.0],
            how.constants | {"T": factors.shape[1], "HAS_FLOOR": terms.has_floor},
        )

    return launch_weights


def _root_mean_square(force: Tensor, labels: Tensor, num_labels: int, pool: Pool) -> Tensor:
    """`sums.root_mean_square`, with sums in one order."""
    squares = torch.linalg.vector_norm(force, dim=-1, dtype=torch.float64).square()
    counts = label_counts(labels, num_labels).expand(force.shape[1], -1) * force.shape[-1]
    total = pool.sum(label_sums(squares, labels, num_labels))
    return (total / pool.sum(counts).clamp(min=1)).sqrt()


def _with_unit_rms(force: Tensor, labels: Tensor, num_labels: int, pool: Pool) -> Tensor:
    """`sums.with_unit_rms`."""
    rms = _root_mean_square(force, labels, num_labels, pool)
    factor = torch.where(rms >= torch.finfo(force.dtype).tiny, 1 / rms, 0.0).to(force.dtype)
    return force * (factor if num_labels == 1 else factor[..., labels])[..., None]
