"""The force's rounds by tiles of torch, and the force on whole matrices.

d is symmetric, so the column of a point in a softmax is the row that it has itself: one or two
vectors of log-sum-exps for each temperature are all that ranks exchange. The force is a length
divided by a length: in other units it is the same at temperatures in them.

T temperatures, G groups, L labels, R points of this rank, of which m are generated.
"""

import math

import torch
from torch import Tensor

from dist_contrastive.losses.force import spec
from dist_contrastive.losses.force.affinity import ForceRules, LogAffinity, Powers
from dist_contrastive.losses.force.points import (
    GENERATED,
    POSITIVE,
    Points,
    PointTile,
    generated_rows,
)
from dist_contrastive.losses.force.rounds import RankForce
from dist_contrastive.losses.force.sums import (
    ByLabel,
    LogSums,
    PlainByLabel,
    Pool,
    add_log,
    log_sum_exps,
)

_TINY = torch.finfo(torch.float32).tiny


class TileRounds:
    """`Rounds` of points, tile by tile.

    Args:
        weights: what the columns of A are multiplied by, of this rank's points [R, G]; None: 1.
    """

    def __init__(
        self, points: Points, rules: ForceRules, weights: Tensor | None, num_labels: int
    ) -> None:
        self.points, self.weights = points, weights
        self._rules, self._powers = rules, Powers(rules.temperatures)
        labels = points.labels[: points.num_generated]
        self.by_label: ByLabel = PlainByLabel(labels, num_labels)

    def distance_sums(self, grad_kinds: frozenset[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over pairs of the distance and of 1, and the derivative of the first."""
        points, rules, weights = self.points, self._rules, self.weights
        total, count = points.rows.new_zeros(
            2, len(points.rows), self.by_label.num_labels, dtype=torch.float64
        )
        grad_points = torch.zeros_like(points.rows) if grad_kinds else None
        extras = () if weights is None else (weights,)
        is_symmetric = weights is None
        # Of two kinds of points, one block has what keys add to rows and what rows add to keys.
        one_block = rules.square and is_symmetric and grad_kinds <= {GENERATED}

        def wanted(row_kind: int, key_kind: int) -> bool:
            return rules.has_row(row_kind, key_kind) and not (one_block and row_kind > key_kind)

        def halved(row_kind: int, key_kind: int) -> bool:
            return is_symmetric and row_kind == key_kind

        for tile, key_extras in points.tiles(wanted, *extras, halved=halved):
            place, per_key = (tile.g, tile.label), tile.finite_distances.sum(1)
            is_halved = tile.is_off_diagonal and halved(tile.row_kind, tile.key_kind)
            times = 2 if is_halved or (one_block and tile.row_kind != tile.key_kind) else 1
            if weights is None:
                total[place] += times * per_key.sum(-1).double()
                count[place] += times * tile.num_pairs
            else:
                weight = key_extras[0].T[tile.g]  # [g, k]
                total[place] += (per_key * weight).sum(-1).double()
                count[place] += tile.rows.shape[1] * weight.sum(-1).double()
            if grad_points is not None and tile.row_kind in grad_kinds:
                pair_weight = tile.d.clamp(min=_TINY).reciprocal_()
                # A point is a row, and a key of the other rows.
                both = 2.0 if weights is None else weights.T[tile.g, tile.r, None] + weight[:, None]
                pair_weight *= both
                grad_points[tile.g, tile.r] += tile.weighted_differences(pair_weight)
                if is_halved:
                    of_keys = tile.weighted_differences_of_keys(pair_weight)
                    grad_points[tile.g, tile.k] += of_keys
        return total, count, grad_points

    def terms(self, scale: Tensor) -> tuple[LogAffinity, Tensor]:
        """Terms of log A, and log-sum-exps of rows."""
        factor = -1 / (scale.new_tensor(self._rules.temperatures)[:, None, None] * scale)
        lse, nearest = log_sum_exps(self.points, self._rules, factor, self._powers)
        floor = self._rules.floor
        terms = LogAffinity.from_log_sum_exps(factor, lse, nearest, self.weights, floor)
        return terms, lse[0]

    def log_sums(self, terms: LogAffinity, with_square: bool) -> LogSums:
        """Sums over keys for generated rows, and over pairs for all rows."""
        # By side: over negatives, over positives; of keys that coincide with the row, of others.
        coincide, others = (terms.row.new_full((2, *terms.row.shape), -torch.inf) for _ in range(2))
        square = torch.full_like(terms.neg_inv_temperature, -torch.inf, dtype=torch.float64)
        num_pairs = square.new_zeros(square.shape[-1])
        # Without weights a square A is symmetric: of two kinds of points, one block has both sums.
        one_block = self._rules.square and terms.log_weights is None

        def wanted(row_kind: int, key_kind: int) -> bool:
            with_row = with_square and self._rules.has_row(row_kind, key_kind)
            return row_kind == GENERATED or (with_row and not (one_block and row_kind > key_kind))

        def halved(row_kind: int, key_kind: int) -> bool:
            return one_block and row_kind == key_kind and row_kind != GENERATED

        for tile, payload in self.points.tiles(wanted, *terms.key_payload(), halved=halved):
            tile_terms, is_generated = terms.of_tile(tile, payload), tile.row_kind == GENERATED
            is_halved = tile.is_off_diagonal and halved(tile.row_kind, tile.key_kind)
            times = 2 if is_halved or (one_block and tile.row_kind != tile.key_kind) else 1
            row_sums, squares = _tile_sums(
                tile_terms, tile, self._powers, is_generated, with_square
            )
            place, side = (slice(None), tile.g, tile.r), int(tile.key_kind == POSITIVE)
            add_log(others[side], place, row_sums)
            if is_generated and tile.coinciding is not None:
                add_log(coincide[side], place, tile_terms.coinciding_log_sums(tile.coinciding))
            add_log(square, (slice(None), tile.g, tile.label), squares + math.log(times))
            if tile.g.start == 0:
                num_pairs[tile.label] += times * tile.num_pairs
        negative, positive = torch.logaddexp(coincide, others)
        return LogSums(negative, positive, (others[0], others[1]), square, num_pairs)

    def weighted_sum(
        self, terms: LogAffinity, sums: LogSums, log_unit: Tensor, per_temperature: bool
    ) -> Tensor:
        """Force on every generated point: [T, G, m, D], or the sum over T [1, G, m, D], which is
        one matrix product a tile."""
        points, powers = self.points, self._powers
        log_unit = torch.where(log_unit == -torch.inf, torch.inf, log_unit).to(terms.row.dtype)
        generated = points.rows[:, : points.num_generated]
        num_forces = len(terms.neg_inv_temperature) if per_temperature else 1
        force = generated.new_zeros(num_forces, *generated.shape)
        for tile, payload in points.tiles(generated_rows, *terms.key_payload()):
            place, is_positive, total = (tile.g, tile.r), tile.key_kind == POSITIVE, None
            sign = -1 if is_positive else 1
            other = (sums.negative if is_positive else sums.positive)[:, *place]
            log_factor = other - log_unit[:, tile.g, tile.label, None]
            tile_terms = terms.of_tile(tile, payload)
            for t, weight, log_shift in tile_terms.weights(tile, powers, log_factor):
                factor = log_shift.exp()[..., None]
                if per_temperature:
                    force[t][place] += sign * tile.weighted_differences(weight.mul_(factor))
                elif total is None:
                    total = powers.scratch.like("total", weight)
                    torch.mul(weight, factor, out=total)
                else:
                    total.addcmul_(weight, factor)
            if total is not None:
                force[0][place] += sign * tile.weighted_differences(total)
        return force

    def dense(self, pool: Pool, scale: Tensor, diagnostics: bool) -> RankForce:
        """The specification on the points of all ranks, of which every rank takes its own.

        Args: those of `force_in_rounds`. Memory: a few matrices of [G, K, K] for K points of all
        ranks.
        """
        (block,) = self.points.source.blocks(*(() if self.weights is None else (self.weights,)))
        assert block.tags is not None
        kinds, labels = block.tags.unbind(1)
        result = spec.force(
            block.keys.transpose(0, 1) / scale[:, labels, None],
            kinds == GENERATED,
            kinds == POSITIVE,
            labels,
            block.extras[0].T if block.extras else None,
            temperatures=self._rules.temperatures,
            square=self._rules.square,
            mask_self=self._rules.mask_self,
            divide_by=self._rules.divide_by,
            norm_scope=self._rules.norm_scope,
            floor=self._rules.floor,
            normalise_total=self._rules.normalise_total,
            of_processes=pool.of_processes,
        )
        own = slice(self.points.pairs.start, self.points.pairs.start + len(self.by_label.labels))
        if not diagnostics:
            return RankForce(result.force[:, own], None, None)
        numbers = torch.arange(scale.shape[-1], device=labels.device)
        first = (labels == numbers[:, None]).int().argmax(-1)  # point of each label
        return RankForce(result.force[:, own], result.rms[..., first], result.neighbours[..., own])


def _tile_sums(
    terms: LogAffinity, tile: PointTile, powers: Powers, with_rows: bool, with_square: bool
) -> tuple[Tensor, Tensor]:
    """Logarithms of the sums of A over keys that do not coincide [T, g, r], and of the sums of
    (d A)**2 over rows too [T, g] fp64; -inf for what was not asked for."""
    sums, norms, shifts = (torch.zeros_like(terms.row) for _ in range(3))
    # Lengths in units of the temperature, so that their squares do not underflow.
    factor = terms.neg_inv_temperature[0]
    lengths = powers.scratch.like("lengths", tile.d)
    if with_square:
        torch.mul(tile.finite_distances, -factor[:, None, None], out=lengths)
    for t, weight, log_shift in terms.weights(tile, powers):
        shifts[t] = log_shift
        if with_rows:
            torch.sum(weight, -1, out=sums[t])
        if with_square:
            torch.linalg.vector_norm(weight.mul_(lengths), dim=-1, out=norms[t])
    log_square = (2 * norms.log_().add_(shifts).double()).logsumexp(-1)
    return sums.log_().add_(shifts), log_square - 2 * (-factor.double()).log()
