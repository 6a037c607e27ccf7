"""Softmaxes over panels of distances by kernels, and the terms of log A that come of them.

T temperatures, G groups, R points of this rank. What is joined and exchanged is in fp64 and natural
logarithms, what kernels take in fp32 and powers of 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.losses.force.affinity import ForceRules
from dist_contrastive.losses.force.kernel_calls import launch
from dist_contrastive.losses.force.panels import KeyBlock, Panels

LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class Softmaxes:
    """Log-sum-exps of rows and columns, and distances of the nearest points in them."""

    lse: tuple[Tensor, Tensor]  # [T, G, R] fp64; of square A both are one
    nearest: tuple[Tensor, Tensor]  # [G, R], infinite where there is none


def softmaxes_of(panels: Panels, rules: ForceRules, rates: Tensor) -> Softmaxes:
    """Of ``-d / t``; `rates` [T, G, R] are log2(e) / t in units of the coordinates.

    Collectives: one round over the keys.
    """
    start = -torch.inf if rules.mask_self else 0.0  # a point in its own softmax adds exp(0)
    num_sides = 1 if rules.square else 2
    lse = [torch.full_like(rates, start, dtype=torch.float64) for _ in range(num_sides)]
    nearest = [torch.full_like(rates[0], torch.inf) for _ in range(num_sides)]
    for block in panels.blocks():
        # Columns are over generated points alone, where A has rows for no others.
        split = len(block) if rules.square else block.counts[0]
        of_keys, nearest_keys = _sums_of_exponentials(panels, block, split, rates)
        for keys in range(len(of_keys)):
            for side in [0, 1] if keys == 0 and not rules.square else [0]:
                lse[side] = torch.logaddexp(lse[side], of_keys[keys])
                nearest[side] = torch.minimum(nearest[side], nearest_keys[keys])
    return Softmaxes((lse[0], lse[-1]), (nearest[0], nearest[-1]))


def _sums_of_exponentials(
    panels: Panels, block: KeyBlock, split: int, rates: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps over the keys before and from `split` [2, T, G, R] fp64, and distances of the
    nearest ones that do not coincide [2, G, R]; of one side if there are none from there on."""
    rows, sides = slice(0, rates.shape[2]), 1 if split == len(block) else 2
    tile = panels.tile("sums", len(block))
    parts = sides * panels.parts(rows, len(block), tile)
    sums = rates.new_empty(parts, *rates.shape)
    nearest, counts = rates.new_empty(2, parts, *rates.shape[1:])
    for panel in panels.panels(block, rows):
        g = panel.g
        launch(
            "exponential_sum",
            panel.programs(tile, parts),
            tile,
            [panel.d, rates[:, g], nearest[:, g], counts[:, g], sums[:, :, g]],
            [
                *(*panel.sizes, len(block), *reversed(rates.shape[1:])),
                *(panel.r.start, panel.stride, parts, sides, split),
            ],
            temperature_constants(rates) | {"BM": tile.rows, "BN": tile.keys},
        )
    seen_from = nearest.masked_fill(nearest == torch.inf, 0.0).double()
    lse = sums.double().log() - rates.double() * seen_from[:, None] / LOG2E
    lse = lse.unflatten(0, (sides, -1)).logsumexp(1)
    coinciding = counts.unflatten(0, (sides, -1)).sum(1, dtype=torch.float64).log()
    return torch.logaddexp(lse, coinciding[:, None]), nearest.unflatten(0, (sides, -1)).amin(1)


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
        cls, rules: ForceRules, rates: Tensor, softmaxes: Softmaxes, weights: Tensor | None
    ) -> "Terms":
        """From log-sum-exps of rows and columns; weights [R, G]."""
        halves = [x.masked_fill(x == torch.inf, 0.0) / 2 for x in softmaxes.nearest]
        rows, keys = (
            torch.where(lse == -torch.inf, lse, -lse / 2 * LOG2E) - rates.double() * half.double()
            for lse, half in zip(softmaxes.lse, halves, strict=True)
        )
        log_weights = None if weights is None else weights.T.double().log2()
        log_floor = math.log2(rules.floor) if rules.floor > 0 else None
        if log_floor is None and log_weights is not None:
            keys, log_weights = keys + log_weights, None
        return cls(
            rates,
            halves[0],
            rows.float(),
            halves[1],
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
