"""The force's rounds by Triton kernels, which wait for nothing.

Each round visits panels of distances (panels.py), of which a kernel reduces all temperatures at
once. Kernels add to what they find, so that a round joins its sums once, however many blocks of
keys it has. What is exchanged and joined is in fp64 and natural logarithms, what kernels take in
fp32 and powers of 2.

T temperatures, G groups, L labels, R points of this rank, of which m are generated. With labels L
is the number of points: how many labels there are is not asked for, and most have no points.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_contrastive.losses.force.affinity import ForceRules
from dist_contrastive.losses.force.kernel_calls import launch, product_precision
from dist_contrastive.losses.force.panels import KeyBlock, Panel, Panels
from dist_contrastive.losses.force.segments import Segments
from dist_contrastive.losses.force.softmaxes import (
    LOG2E,
    Terms,
    softmaxes_of,
    temperature_constants,
)
from dist_contrastive.losses.force.sums import ByLabel, LogSums


class PanelRounds:
    """`Rounds` of points, panel by panel.

    Args:
        weights: what the columns of A are multiplied by, of this rank's points [R, G]; None: 1.
        key_counts: points of each label on all ranks that are compared with [L]; None: of one.
    """

    def __init__(
        self,
        panels: Panels,
        rules: ForceRules,
        weights: Tensor | None,
        key_counts: Tensor | None,
    ) -> None:
        self._panels, self._rules, self._weights = panels, rules, weights
        self._key_counts = key_counts
        self.by_label: ByLabel = panels.segments
        # Rows that A has, of how many kinds of points.
        self._rows = slice(0, panels.rows.shape[1] if rules.square else panels.num_generated)
        self._num_kinds = 3 if rules.square else 1

    def _num_pairs(self) -> Tensor:
        """Pairs of each label in a group: [L] fp64."""
        of_rows = self._panels.segments.counts(self._num_kinds)
        keys = self._panels.num_keys if self._key_counts is None else self._key_counts
        return of_rows * keys

    def distance_sums(self, grad_kinds: frozenset[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over pairs of the distance and of 1, and the derivative of the first."""
        panels, rows, weights = self._panels, self._rows, self._weights
        tile = panels.tile("sums")
        parts = panels.parts(rows, tile)
        sums = _state(panels, parts)
        gradient = _Differences(panels, rows, 1) if grad_kinds else None
        key_weights = None
        for block in panels.blocks(*(() if weights is None else (weights,))):
            if block.extras:
                segments = Segments(block.tags, block.counts, panels.num_labels)
                of_block = segments.sums(block.extras[0].double())
                key_weights = of_block if key_weights is None else key_weights + of_block
            for panel in panels.panels(block, rows):
                g, sizes = panel.g, [*panel.sizes, len(block), *reversed(sums.shape[1:])]
                launch(
                    "distance_sum",
                    panel.programs(tile, parts),
                    tile,
                    [panel.d, block.extras[0][g] if block.extras else panel.d, sums[:, g]],
                    [*sizes, panel.r.start, panel.stride, parts],
                    {"HAS_WEIGHTS": bool(block.extras), "BM": tile.rows, "BN": tile.keys},
                )
                if gradient is not None:
                    of_kinds = (panel.part(panels.span_of(kind)) for kind in grad_kinds)
                    for part in filter(None, of_kinds):
                        gradient.add(0, block, part, _length_weights(block, weights))
        total = self.by_label.sums(sums[..., rows].sum(0, dtype=torch.float64))
        if key_weights is None:
            count = self._num_pairs().expand(total.shape)
        else:
            count = panels.segments.counts(self._num_kinds) * key_weights
        return total, count, None if gradient is None else gradient.total()[0]

    def terms(self, scale: Tensor) -> tuple[Terms, Tensor]:
        """Terms of log A, and log-sum-exps of rows."""
        panels, rules = self._panels, self._rules
        inverse = LOG2E / (scale if scale.shape[-1] == 1 else scale[:, panels.labels])
        rates = inverse.new_empty(len(rules.temperatures), *panels.rows.shape[:2])
        for rate, t in zip(rates, rules.temperatures, strict=True):
            torch.div(inverse.expand_as(rate), t, out=rate)
        lse, nearest = softmaxes_of(panels, rules, rates)
        return Terms.of(rules, rates, lse, nearest, self._weights), lse[0]

    def log_sums(self, terms: Terms, with_square: bool) -> LogSums:
        """Sums over keys for the rows of A, and over pairs."""
        panels, rows = self._panels, self._rows
        tile = panels.tile("affinities")
        parts = 2 * panels.parts(rows, tile)
        outputs = terms.rates.new_zeros(4, parts, *terms.rates.shape)
        outputs[0].fill_(-torch.inf)
        constants = temperature_constants(terms.rates) | {"HAS_FLOOR": terms.has_floor}
        constants |= {"BM": tile.rows, "BN": tile.keys}
        for block in panels.blocks(*terms.payload()):
            for panel in panels.panels(block, rows):
                g, sizes = panel.g, [*panel.sizes, len(block), *reversed(terms.rates.shape[1:])]
                launch(
                    "affinity_sum",
                    panel.programs(tile, parts),
                    tile,
                    [panel.d, *terms.of_pairs(g, block), *outputs[:, :, :, g]],
                    [
                        *(*sizes, panel.r.start, panel.stride, parts, 2, block.num_negative),
                        terms.log_floor or 0.0,
                    ],
                    constants,
                )
        # By side: over negatives, over positives.
        tops, sums, squares, coinciding = outputs[..., rows].double().unflatten(1, (2, -1))
        tops /= LOG2E
        if terms.log_floor is None:
            tops.add_(terms.rows[..., rows], alpha=1 / LOG2E)
        coincide = coinciding.sum(1)
        if terms.log_floor is not None:  # a point with itself has it, and adds nothing to a force
            own = 2.0**terms.log_floor
            if terms.log_weights is None:
                coincide[0] += own
            else:
                coincide[0] += own * terms.log_weights[:, rows].double().exp2()
        apart = sums.log_().add_(tops).logsumexp(1)
        negative, positive = torch.logaddexp(coincide.log_(), apart)
        square = num_pairs = apart.new_empty(0)
        if with_square:
            unit = terms.rates[0, :, rows].double()  # of lengths
            squares = squares.log_().add_(tops, alpha=2).flatten(0, 1).logsumexp(0)
            square = panels.segments.log_sums(squares.sub_(unit.log_(), alpha=2))
            num_pairs = self._num_pairs()
        return LogSums(negative, positive, (apart[0], apart[1]), square, num_pairs)

    def weighted_sum(
        self, terms: Terms, sums: LogSums, log_unit: Tensor, per_temperature: bool
    ) -> Tensor:
        """Force on every generated point: [T, G, m, D], or the sum over T [1, G, m, D]."""
        panels, rows = self._panels, slice(0, self._panels.num_generated)
        log_unit = torch.where(log_unit == -torch.inf, torch.inf, log_unit)
        if panels.has_labels:
            log_unit = log_unit[..., self.by_label.labels]
        # For negatives and positives, what the others' sums are over the unit.
        others = torch.stack([sums.positive, sums.negative])[..., rows] - log_unit
        others *= LOG2E
        factors = terms.rates.new_zeros(2, *terms.rates.shape)
        factors[..., rows] = others if terms.has_floor else others + terms.rows[..., rows]
        each = (
            [slice(t, t + 1) for t in range(len(terms.rates))] if per_temperature else [slice(None)]
        )
        force = _Differences(panels, rows, len(each))
        for block in panels.blocks(*terms.payload()):
            for panel in panels.panels(block, rows):
                for number, t in enumerate(each):
                    force.add(number, block, panel, _force_weights(block, terms, factors, t))
        return force.total()


def _state(panels: Panels, *shape: int) -> Tensor:
    """Sums for every row that kernels add to: [..., G, R]."""
    return panels.rows.new_zeros(*shape, *panels.rows.shape[:2])


class _Differences:
    """Sums ``sum_k weight[j, k] (x[j] - y[k])`` over keys, for some rows.

    Of products, to which the part of the rows is added at the end: x times the sum of weights.
    Pairs that are near, where this would lose digits, are summed by their differences.

    Args:
        rows: those for which there are sums; results have rows up to the last of them.
        number: of sums, each with weights of its own.
    """

    def __init__(self, panels: Panels, rows: slice, number: int) -> None:
        self._panels, self._tile = panels, panels.tile("weights")
        self._product, self._parts = panels.product_tile(rows), panels.parts(rows, self._tile)
        num_groups, _, num_dims = panels.rows.shape
        self._out = panels.rows.new_zeros(number, num_groups, rows.stop, num_dims)
        self._sums = _state(panels, number, self._parts)  # of weights

    def add(self, number: int, block: KeyBlock, panel: Panel, weigh: "_Weights") -> None:
        """Add those of a panel to one of the sums."""
        panels, tile, product = self._panels, self._tile, self._product
        g, m, num_dims = panel.g, panel.num_rows, panels.rows.shape[2]
        num_groups, num_rows = panels.rows.shape[:2]
        weights = panels.buffer("weights", len(panel.d), m, panel.stride)
        flags = block.own.new_empty(panel.programs(tile, -(-len(block) // tile.keys)))
        out, sums = self._out[number, g], self._sums[number, :, g]
        constants: dict[str, Any] = {"BM": tile.rows, "BN": tile.keys}
        launch(
            f"{weigh.name}_weight",
            panel.programs(tile, self._parts),
            tile,
            [panel.d, panels.norms[g], *weigh.tensors(panel), weights, flags, sums],
            [
                *(*panel.sizes, len(block), num_rows, num_groups, panel.r.start, panel.stride),
                *(self._parts, *weigh.numbers),
            ],
            constants | weigh.constants,
        )
        at = [panel.r.start, panel.stride, out.shape[1], weigh.num_negative]
        launch(
            "near",
            panel.programs(tile, -(-num_dims // tile.dims)),
            tile,
            [weights, flags, panels.rows[g], block.keys[g], out],
            [m, len(block), num_rows, *at],
            constants | {"D": num_dims, "BK": tile.dims},
        )
        constants = {"D": num_dims, "HAS_LABELS": panels.has_labels}
        constants |= {"PRECISION": product_precision()}
        constants |= {"FLAG_ROWS": tile.rows, "FLAG_KEYS": tile.keys}
        launch(
            "product",
            panel.programs(product, -(-num_dims // product.keys)),
            product,
            [weights, flags, panels.columns(block)[g], out],
            [m, len(block), *at],
            constants | {"BM": product.rows, "BN": product.keys, "BK": product.dims},
        )

    def total(self) -> Tensor:
        """The sums [number, G, rows, D]."""
        num_rows = self._out.shape[2]
        weights = self._sums[..., :num_rows].sum(1, dtype=torch.float64).to(self._out.dtype)
        rows = self._panels.rows[:, :num_rows].expand_as(self._out)
        return self._out.addcmul_(rows, weights[..., None])


class _Weights(NamedTuple):
    """Weights of a kernel: its name, what it takes beside panel and results, and how many keys
    push, the first of a block; others pull."""

    name: str
    tensors: Callable[[Panel], Sequence[Tensor]]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    num_negative: int


def _length_weights(block: KeyBlock, weights: Tensor | None) -> _Weights:
    """Weights of the derivative of the sum of all distances."""

    def tensors(panel: Panel) -> Sequence[Tensor]:
        if weights is None:
            return panel.d, panel.d
        return weights.T.contiguous()[panel.g], block.extras[0][panel.g]

    return _Weights("length", tensors, (), {"HAS_WEIGHTS": weights is not None}, len(block))


def _force_weights(block: KeyBlock, terms: Terms, factors: Tensor, t: slice) -> _Weights:
    """Weights of the force at some temperatures."""
    factors = factors[:, t]

    def tensors(panel: Panel) -> Sequence[Tensor]:
        return [*terms.of_pairs(panel.g, block, t), *factors[:, :, panel.g]]

    numbers = block.num_negative, terms.log_floor or 0.0
    constants = {"T": factors.shape[1], "HAS_FLOOR": terms.has_floor}
    return _Weights("force", tensors, numbers, constants, block.num_negative)
