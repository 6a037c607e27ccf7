"""The passes of the contrastive force over tiles: rows of this rank against the keys of all.

Weights A of pairs are kept as logarithms: they underflow for small temperatures where the force, a
quotient, does not. d is symmetric, so the column of a point in a softmax is the row that it has
itself: one or two vectors of log-sum-exps for each temperature are all that ranks exchange.
The force is a length divided by a length: in other units it is the same at temperatures in them.

Every pass is one round over the keys. T temperatures, G groups, L labels, R points of this rank.
"""

import math

import torch
from torch import Tensor

from dist_contrastive.losses.force.affinity import Affinity, Exponents, Powers
from dist_contrastive.losses.force.points import GENERATED, POSITIVE, Points, Tile
from dist_contrastive.losses.force.sums import LogSums, add_log, log_sum_exps

_TINY = torch.finfo(torch.float32).tiny


def distance_sums(
    points: Points,
    affinity: Affinity,
    weights: Tensor | None,
    num_labels: int,
    with_slopes: frozenset[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over pairs of the distance and of 1, both times the key's weight: [G, L] fp64 each.

    Args:
        weights: of this rank's points [R, G]; None: 1 each.
        with_slopes: kinds of points by which the first sum, over all ranks, is to be derived, for
            a square A: [G, R, D], 0 for rows of other kinds. None where no kind is named.
    """
    total, count = points.rows.new_zeros(2, len(points.rows), num_labels, dtype=torch.float64)
    slopes = torch.zeros_like(points.rows) if with_slopes else None
    extras = () if weights is None else (weights,)
    is_symmetric = weights is None
    # Then one block tells what the keys say of the rows and the rows of the keys.
    twice = affinity.square and is_symmetric and with_slopes <= {GENERATED}

    def wanted(row_kind: int, key_kind: int) -> bool:
        return affinity.has_row(row_kind, key_kind) and not (twice and row_kind > key_kind)

    def once(row_kind: int, key_kind: int) -> bool:
        return is_symmetric and row_kind == key_kind

    for tile, of_keys in points.tiles(wanted, *extras, once=once):
        place, per_key = (tile.g, tile.label), tile.lengths.sum(1)
        is_both = tile.is_mirrored and once(tile.row_kind, tile.kind)
        times = 2 if is_both or (twice and tile.row_kind != tile.kind) else 1
        if weights is None:
            total[place] += times * per_key.sum(-1).double()
            count[place] += times * tile.num_pairs
        else:
            weight = of_keys[0].T[tile.g]  # [g, k]
            total[place] += (per_key * weight).sum(-1).double()
            count[place] += tile.rows.shape[1] * weight.sum(-1).double()
        if slopes is not None and tile.row_kind in with_slopes:
            steep = tile.d.clamp(min=_TINY).reciprocal_()
            # A point is a row, and a key of the other rows.
            steep *= 2.0 if weights is None else weights.T[tile.g, tile.r, None] + weight[:, None]
            slopes[tile.g, tile.r] += _summed_ways(steep, tile.keys, tile.rows, tile.has_close)
            if is_both:
                by_keys = _summed_ways(steep.mT, tile.rows, tile.keys, tile.has_close)
                slopes[tile.g, tile.k] += by_keys
    return total, count, slopes


class StreamedForce:
    """The force of all points on this rank's generated points, tile by tile.

    Args:
        points: of this rank, and the keys of all.
        affinity: what A is.
        slope: [T, G, L], -1/t in units of the coordinates.
        weights: what the columns of A are multiplied by, of this rank's points [R, G]; None: 1.
        powers: for the temperatures.

    Collectives: one round over the keys in each: here, in `log_sums`, in `accumulate`.
    """

    def __init__(
        self,
        points: Points,
        affinity: Affinity,
        slope: Tensor,
        weights: Tensor | None,
        powers: Powers,
    ) -> None:
        self._points, self._affinity, self._powers = points, affinity, powers
        lse, near = log_sum_exps(points, affinity, slope, powers)
        self._lse = lse[0]
        self._e = Exponents.of(slope, lse, near, weights, affinity.floor)

    def row_logsumexp(self) -> Tensor:
        """Log-sum-exp of -d/t over the keys of this rank's rows: [T, G, R]."""
        return self._lse

    def log_sums(self, with_square: bool) -> LogSums:
        """The sums that the force needs: over keys for rows that move, over pairs for all rows."""
        e, affinity = self._e, self._affinity
        # By side: over negatives, over positives; of keys that coincide with the row, of others.
        coincide, others = (e.row.new_full((2, *e.row.shape), -torch.inf) for _ in range(2))
        square = torch.full_like(e.slope, -torch.inf, dtype=torch.float64)
        num_pairs = square.new_zeros(square.shape[-1])
        # Without weights a square A is symmetric: of two kinds of points, one block tells both.
        twice = affinity.square and e.log_weights is None

        def wanted(row_kind: int, key_kind: int) -> bool:
            with_row = with_square and affinity.has_row(row_kind, key_kind)
            return row_kind == GENERATED or (with_row and not (twice and row_kind > key_kind))

        def once(row_kind: int, key_kind: int) -> bool:
            return twice and row_kind == key_kind and row_kind != GENERATED

        for tile, of_keys in self._points.tiles(wanted, *e.travelling(), once=once):
            x, moves = e.of_tile(tile, of_keys), tile.row_kind == GENERATED
            is_both = tile.is_mirrored and once(tile.row_kind, tile.kind)
            times = 2 if is_both or (twice and tile.row_kind != tile.kind) else 1
            of_rows, of_tile = self._tile_sums(x, tile, moves, with_square)
            place, side = (slice(None), tile.g, tile.r), int(tile.kind == POSITIVE)
            add_log(others[side], place, of_rows)
            if moves and tile.coinciding is not None:
                add_log(coincide[side], place, x.of_coinciding(tile.coinciding))
            add_log(square, (slice(None), tile.g, tile.label), of_tile + math.log(times))
            if tile.g.start == 0:
                num_pairs[tile.label] += times * tile.num_pairs
        negative, positive = torch.logaddexp(coincide, others)
        moving = torch.logaddexp(positive + others[0], negative + others[1])
        return LogSums(negative, positive, moving, square, num_pairs)

    def _tile_sums(
        self, x: Exponents, tile: Tile, moves: bool, with_square: bool
    ) -> tuple[Tensor, Tensor]:
        """Logarithms of the sums of A over keys that do not coincide [T, g, r], and of the sums of
        (d A)**2 over rows too [T, g] fp64; -inf where rows do not move, and where none was asked
        for."""
        sums, norms, units = (torch.zeros_like(x.row) for _ in range(3))
        # Lengths in units of the temperature, so that their squares do not underflow.
        lengths = self._powers.scratch.like("lengths", tile.d)
        if with_square:
            torch.mul(tile.lengths, -x.slope[0, :, None, None], out=lengths)
        for t, weight, log_unit in x.weights(tile, self._powers):
            units[t] = log_unit
            if moves:
                torch.sum(weight, -1, out=sums[t])
            if with_square:
                torch.linalg.vector_norm(weight.mul_(lengths), dim=-1, out=norms[t])
        log_square = (2 * norms.log_().add_(units).double()).logsumexp(-1)
        return sums.log_().add_(units), log_square - 2 * (-x.slope[0].double()).log()

    def accumulate(self, sums: LogSums, log_unit: Tensor, apart: bool) -> Tensor:
        """Force on every generated point, in units: [1, G, m, D], or [T, G, m, D] if `apart`.

        ``F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j``, S the row sums of A.
        All temperatures are folded into one matrix product a tile, or kept apart. Seen from x_j,
        keys that coincide with it add nothing; left in, their weights (the largest there are, and
        nothing in the unit) would overflow before they cancel.

        Args:
            log_unit: [T, G, L], logarithms of the units; where it is -inf there is no force.
        """
        e, points = self._e, self._points
        log_unit = torch.where(log_unit == -torch.inf, torch.inf, log_unit).to(e.row.dtype)
        moving = points.rows[:, : points.num_generated]
        force = moving.new_zeros(len(e.slope) if apart else 1, *moving.shape)
        for tile, of_keys in points.tiles(_moves, *e.travelling()):
            place, pulls, total = (tile.g, tile.r), tile.kind == POSITIVE, None
            other = (sums.negative if pulls else sums.positive)[:, *place]
            log_factor = other - log_unit[:, tile.g, tile.label, None]
            x = e.of_tile(tile, of_keys)
            for t, weight, unit in x.weights(tile, self._powers, log_factor):
                factor = unit.exp()[..., None]
                if apart:
                    force[t][place] += _moved(tile, weight.mul_(factor), pulls)
                elif total is None:
                    total = self._powers.scratch.like("total", weight)
                    torch.mul(weight, factor, out=total)
                else:
                    total.addcmul_(weight, factor)
            if total is not None:
                force[0][place] += _moved(tile, total, pulls)
        return force


def _moved(tile: Tile, weight: Tensor, pulls: bool) -> Tensor:
    """Weighted sum of the ways from rows to keys, or back: [g, r, D]."""
    back = _summed_ways(weight, tile.keys, tile.rows, tile.has_close)
    return -back if pulls else back


def _summed_ways(weight: Tensor, keys: Tensor, rows: Tensor, has_close: bool) -> Tensor:
    """``sum_k weight[j, k] (rows[j] - keys[k])``: [g, r, D]; by way of fp64 where much cancels."""
    if has_close:
        return _summed_ways(weight.double(), keys.double(), rows.double(), False).to(rows.dtype)
    return weight.sum(-1, keepdim=True) * rows - weight @ keys


def _moves(row_kind: int, key_kind: int) -> bool:
    return row_kind == GENERATED


class DenseForce:
    """See `pairwise.force.StreamedForce`, which takes the same and gives the same.

    Memory: a few matrices of [T, G, K, K] for the K points of all ranks.
    """

    def __init__(
        self, points: Points, affinity: Affinity, slope: Tensor, weights: Tensor | None
    ) -> None:
        extras = () if weights is None else (weights,)
        (block,) = points.source.blocks(*extras)
        assert block.tags is not None
        self._points = block.keys.transpose(0, 1)  # [G, K, D]
        kinds, labels = block.tags.unbind(1)
        number = torch.arange(len(labels), device=labels.device)
        is_self = number[:, None] == number
        apart = labels[:, None] != labels
        has_row = torch.ones_like(kinds, dtype=torch.bool)
        if not affinity.square:
            has_row = kinds == GENERATED
        self._d = _distances(self._points)
        scores = slope[..., labels][..., None, :] * self._d
        scores = scores.masked_fill(apart | (is_self & affinity.mask_self), -torch.inf)
        scores = scores.masked_fill(~has_row[:, None], -torch.inf)
        log_a = (scores.log_softmax(-1) + scores.log_softmax(-2)) / 2
        self._row_lse = scores.logsumexp(-1)
        log_a = log_a.masked_fill((scores == -torch.inf) | is_self, -torch.inf)
        if affinity.floor > 0:
            reached = log_a.clamp(min=math.log(affinity.floor))
            log_a = torch.where(apart | ~has_row[:, None], -torch.inf, reached)
        if weights is not None:
            log_a = log_a + block.extras[0].T.log()[:, None]
        self._log_a = log_a  # [T, G, K, K]
        self._is_positive, self._labels = kinds == POSITIVE, labels
        first = points.pairs.start
        self._mine = slice(first, first + len(points.pairs.keys))
        self._moving = slice(first, first + points.num_generated)

    def row_logsumexp(self) -> Tensor:
        """Log-sum-exp of -d/t over the keys of this rank's rows: [T, G, R]."""
        return self._row_lse[..., self._mine]

    def log_sums(self, with_square: bool) -> LogSums:
        """See `LogSums`."""
        num_labels = 1 + int(self._labels.max())
        log_square = (2 * (self._log_a + self._d.log())).logsumexp(-1)[..., self._mine]
        of_label = [
            log_square.masked_fill(self._labels[self._mine] != label, -torch.inf).logsumexp(-1)
            for label in range(num_labels)
        ]
        square = torch.stack(of_label, -1).double()
        if not with_square:
            square = torch.full_like(square, -torch.inf)
        same = (self._labels[self._mine, None] == self._labels).sum(1)
        num_pairs = torch.zeros(num_labels, dtype=torch.float64, device=same.device)
        num_pairs.index_add_(0, self._labels[self._mine], same.double())
        negative, positive = self._row_sums(self._log_a)
        of_others = self._row_sums(self._log_a.masked_fill(self._d == 0, -torch.inf))
        moving = torch.logaddexp(positive + of_others[0], negative + of_others[1])
        return LogSums(negative, positive, moving, square, num_pairs)

    def _row_sums(self, log_a: Tensor) -> list[Tensor]:
        """Logarithms of the sums over negatives and over positives, for this rank's rows."""
        of_sides = (
            log_a.masked_fill(other, -torch.inf)
            for other in (self._is_positive, ~self._is_positive)
        )
        return [x.logsumexp(-1)[..., self._mine] for x in of_sides]

    def accumulate(self, sums: LogSums, log_unit: Tensor, apart: bool) -> Tensor:
        """``F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j`` over the unit, S
        the row sums of A: [T, G, m, D], or the sum over T [1, G, m, D] unless `apart`.

        Points that coincide with x_j add nothing to it; their weights could only overflow.
        """
        m, d = self._moving.stop - self._moving.start, self._d[:, self._moving]
        log_unit = torch.where(log_unit == -torch.inf, torch.inf, log_unit).to(d.dtype)
        log_a = self._log_a[..., self._moving, :].masked_fill(d == 0, -torch.inf)
        other = torch.where(
            self._is_positive, sums.negative[..., :m, None], sums.positive[..., :m, None]
        )
        weight = torch.exp(log_a + other - log_unit[..., self._labels[self._moving], None])
        weight = torch.where(self._is_positive, weight, -weight)
        moving = self._points[:, self._moving]
        force = weight @ self._points - weight.sum(-1, keepdim=True) * moving
        return force if apart else force.sum(0, keepdim=True)


def _distances(points: Tensor) -> Tensor:
    """Euclidean distances of all pairs, exactly 0 on the diagonal: [..., K, D] -> [..., K, K]."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
