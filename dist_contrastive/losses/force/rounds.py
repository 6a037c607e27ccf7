"""The force on this rank's generated points in rounds over the keys, whoever computes a round.

A round visits every pair of a row and a key once. The mean distance takes one, softmaxes the next,
sums of the weights A the third, and the force the last; what passes.py does tile by tile, fused.py
does by kernels. Weights A are kept as logarithms: they underflow for small temperatures where the
force, a quotient, does not.

T temperatures, G groups, L labels, R points of this rank, of which m are generated.
"""

from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from dist_contrastive.losses.force.affinity import ForceRules
from dist_contrastive.losses.force.sums import (
    ByLabel,
    LogSums,
    Pool,
    log_largest_force,
    log_mean_length,
    root_mean_square,
    with_unit_rms,
)

Terms = TypeVar("Terms")


class RankForce(NamedTuple):
    """Force on this rank's generated points, in units of the scale."""

    force: Tensor  # [G, m, D]
    rms: Tensor | None  # [T, G, L], diagnostics: root mean square, for paper before division by it
    neighbours: Tensor | None  # [T, G, m], diagnostics: 1 / sum(softmax^2) of each row


class Rounds(Protocol[Terms]):
    """Points of this rank, and what is computed of them and the keys in each round.

    `Terms` are what log A of a pair is made of, beside its distance.
    """

    by_label: ByLabel

    def distance_sums(self, grad_kinds: frozenset[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over pairs of the distance and of 1, both times the key's weight: [G, L] fp64 each;
        and grad_points [G, R, D], the derivative of the first, over all ranks, by the points.

        Args:
            grad_kinds: kinds of points to derive by, for a square A; grad_points is 0 for rows of
                other kinds, and None without any kind.

        Collectives: one round over the keys.
        """

    def terms(self, scale: Tensor) -> tuple[Terms, Tensor]:
        """Terms at temperatures in units of scale [G, L], and log-sum-exps of rows [T, G, R], at
        least of generated ones. Collectives: one round over the keys."""

    def log_sums(self, terms: Terms, with_square: bool) -> LogSums:
        """Sums over keys for generated rows, and over pairs for all rows. Collectives: one round
        over the keys."""

    def weighted_sum(
        self, terms: Terms, sums: LogSums, log_unit: Tensor, per_temperature: bool
    ) -> Tensor:
        """Force on every generated point, over the unit: [T, G, m, D], or the sum over T
        [1, G, m, D].

        ``F_j = S_neg[j] (A_pos (p - x_j))_j - S_pos[j] (A_neg (n - x_j))_j``, S the row sums of A.
        Seen from x_j, keys that coincide with it add nothing; left in, their weights (the largest
        there are, and nothing in the unit) would overflow before they cancel.

        Args:
            log_unit: [T, G, L], logarithms of the units; where it is -inf there is no force.

        Collectives: one round over the keys.
        """


def force_in_rounds(
    points: Rounds[Terms], rules: ForceRules, pool: Pool, scale: Tensor, diagnostics: bool
) -> RankForce:
    """The force.

    Args:
        pool: of the scope over which the unit is a mean.
        scale: unit of the coordinates, in which temperatures and the force are [G, L].
        diagnostics: whether to compute rms and neighbours, for one or two more rounds; the force is
            bitwise the same.

    Collectives: three rounds over the keys, and those of the pool.
    """
    by_label, by_force = points.by_label, rules.divide_by == "force"
    terms, lse = points.terms(scale)
    sums = points.log_sums(terms, with_square=not by_force)
    # In units of each scale, since a unit may be a mean over several of these.
    log_scale = scale.double().log()
    if by_force:
        log_unit = log_largest_force(sums, by_label, pool)
    else:
        log_unit = log_mean_length(sums, log_scale, pool)
    weighted_sum = partial(points.weighted_sum, terms, sums, log_unit + log_scale)
    force = weighted_sum(per_temperature=by_force)
    rms = neighbours = None
    if diagnostics:
        # Made again, or the steps that a run logs would round otherwise than the rest.
        each = force if by_force else weighted_sum(per_temperature=True)
        rms = root_mean_square(each, by_label, pool)
        rms = rms * log_unit.exp() if by_force else rms
        _, half_lse = points.terms(scale / 2)  # at half the temperatures
        # sum(softmax^2) is exp(lse at t/2) / exp(lse)^2; a row without any has 0 neighbours.
        neighbours = (2 * lse - half_lse)[..., : len(by_label.labels)].exp().nan_to_num(0.0)
        neighbours = neighbours.to(scale.dtype)
    if by_force:
        force = with_unit_rms(force, by_label, pool)
    force = force.sum(0, keepdim=True)
    if rules.normalise_total:
        force = with_unit_rms(force, by_label, pool)
    return RankForce(force[0], rms, neighbours)
