"""Softmaxes over panels of distances by kernels, and the terms of log A that come of them.

T temperatures, G groups, R points of this rank; S = 1 where A is square, whose rows and columns
have the same softmaxes, else 2: of rows, of columns. What is joined and exchanged is in fp64 and
natural logarithms, what kernels take in fp32 and powers of 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.losses.force.affinity import ForceRules
from dist_contrastive.losses.force.kernel_calls import launch
from dist_contrastive.losses.force.panels import KeyBlock, Panels

LOG2E = 1 / math.log(2)


def softmaxes_of(panels: Panels, rules: ForceRules, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of ``-d / t`` [S, T, G, R] fp64, and distances of the nearest points in them
    [S, G, R], infinite where there is none; `rates` [T, G, R] are log2(e) / t in units of the
    coordinates.

    Collectives: one round over the keys.
    """
    rows, sides = slice(0, rates.shape[2]), 1 if rules.square else 2
    tile = panels.tile("sums")
    parts = sides * panels.parts(rows, tile)
    nearest, counts = state = rates.new_zeros(2, parts, *rates.shape[1:])
    nearest.fill_(torch.inf)
    if not rules.mask_self:  # a point in its own softmax adds exp(0)
        counts[0].fill_(1.0)
    sums = rates.new_zeros(parts, *rates.shape)
    constants = temperature_constants(rates) | {"BM": tile.rows, "BN": tile.keys}
    for block in panels.blocks():
        # Columns are over generated points alone, where A has rows for no others.
        split = len(block) if rules.square else block.counts[0]
        for panel in panels.panels(block, rows):
            g, sizes = panel.g, (*panel.sizes, len(block), *reversed(rates.shape[1:]))
            launch(
                "exponential_sum",
                panel.programs(tile, parts),
                tile,
                [panel.d, rates[:, g], nearest[:, g], counts[:, g], sums[:, :, g]],
                [*sizes, panel.r.start, panel.stride, parts, sides, split],
                constants,
            )
    nearest, counts = state.double().unflatten(1, (sides, -1))
    seen_from = nearest.masked_fill(nearest == torch.inf, 0.0)[:, :, None]
    lse = sums.double().log_().unflatten(0, (sides, -1))
    lse = lse.addcmul_(rates.double(), seen_from, value=-1 / LOG2E).logsumexp(1)
    lse, nearest = torch.logaddexp(lse, counts.sum(1).log_()[:, None]), nearest.amin(1)
    if sides == 2:  # rows have both, columns generated points alone
        lse = torch.stack([torch.logaddexp(*lse), lse[0]])
        nearest = torch.stack([torch.minimum(*nearest), nearest[0]])
    return lse, nearest


def temperature_constants(rates: Tensor) -> dict[str, int]:
    """Constants of kernels."""
    return {"T": len(rates), "TP": 1 << max(0, len(rates) - 1).bit_length()}


@dataclass(frozen=True)
class Terms:
    """Terms of log A as kernels take them: seen from half of both nearest distances, without which
    they would be large numbers that cancel."""

    rates: Tensor  # [T, G, R]
    half_rows: Tensor  # [G, R], half of the distance of the nearest key
    rows: Tensor  # [T, G, R]
    half_keys: Tensor  # [G, R], of this rank's points as keys; and so on
    keys: Tensor  # [T, G, R]
    log_weights: Tensor | None  # [G, R]; None: they are in `keys`, or 0
    log_floor: float | None

    @classmethod
    def of(
        cls,
        rules: ForceRules,
        rates: Tensor,
        lse: Tensor,
        nearest: Tensor,
        weights: Tensor | None,
    ) -> "Terms":
        """From `softmaxes_of`; weights [R, G]."""
        halves = nearest.masked_fill(nearest == torch.inf, 0.0) / 2
        terms = torch.where(lse == -torch.inf, lse, lse * (-LOG2E / 2))
        terms = terms.addcmul_(rates.double(), halves[:, None], value=-1)
        rows, keys = terms[0], terms[-1]
        log_weights = None if weights is None else weights.T.double().log2()
        log_floor = math.log2(rules.floor) if rules.floor > 0 else None
        if log_floor is None and log_weights is not None:
            keys, log_weights = keys + log_weights, None
        halves = halves.float()
        return cls(
            rates,
            halves[0],
            rows.float(),
            halves[-1],
            keys.float(),
            None if log_weights is None else log_weights.float(),
            log_floor,
        )

    def payload(self) -> list[Tensor]:
        """What other ranks must know of this rank's points as keys, each [R, ..., G]."""
        payload = [self.half_keys.T, self.keys.permute(2, 0, 1)]
        if self.log_floor is None:
            return payload
        none = torch.zeros_like(self.half_keys)
        return [*payload, (none if self.log_weights is None else self.log_weights).T]

    def of_pairs(self, g: slice, block: KeyBlock, t: slice = slice(None)) -> list[Tensor]:
        """RATES to LOG_WEIGHTS of the kernels, for some groups and temperatures."""
        half_keys, keys, *log_weights = block.extras
        return [
            *(self.rates[t, g], self.half_rows[g], half_keys[g]),
            *(self.rows[t, g], keys[t, g], (log_weights or [half_keys])[0][g]),
        ]

    @property
    def has_floor(self) -> bool:
        """Whether A has one."""
        return self.log_floor is not None
