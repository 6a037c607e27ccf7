"""The forms of the contrastive force that are in use, as settings of one computation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import one_of
from dist_contrastive.losses.force_units import Scope
from dist_contrastive.pairwise.affinity import Affinity

Preset = Literal["seed", "drift", "paper"]


@dataclass(frozen=True)
class ForceRules:
    """What distinguishes the presets; `ContrastiveForce` tells what they mean."""

    temperatures: tuple[float, ...]
    affinity: Affinity
    unit: Literal["lengths", "force"]
    """What a force is divided by: sqrt(mean((d A)^2)), or its own root mean square."""
    scale_scope: Scope
    norm_scope: Scope
    scale_gradient: bool
    """Whether gradients flow through the mean distance."""
    per_dimension: bool
    """Whether coordinates, rather than distances, are brought to order 1: times sqrt(D)."""


_SEED_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)

PRESETS: dict[str, ForceRules] = {
    "seed": ForceRules(
        temperatures=_SEED_TEMPERATURES,
        affinity=Affinity(square=True, mask_self=False),
        unit="lengths",
        scale_scope="group",
        norm_scope="group",
        scale_gradient=True,
        per_dimension=False,
    ),
    "drift": ForceRules(
        temperatures=_SEED_TEMPERATURES,
        affinity=Affinity(square=True, mask_self=True),
        unit="lengths",
        scale_scope="group",
        norm_scope="group",
        scale_gradient=False,
        per_dimension=False,
    ),
    "paper": ForceRules(
        temperatures=(0.02, 0.05, 0.2),
        affinity=Affinity(square=False, mask_self=True),
        unit="force",
        scale_scope="global",
        norm_scope="global",
        scale_gradient=False,
        per_dimension=True,
    ),
}


def rules_of(
    preset: str,
    temperatures: Sequence[float] | None,
    scale_scope: Scope | None,
    norm_scope: Scope | None,
    affinity_floor: float,
) -> ForceRules:
    """Those of a preset, with what is given, rather than None, in the place of its own.

    Raises:
        ConfigError: unknown names, numbers out of range.
    """
    one_of("preset", preset, tuple(PRESETS))
    rules = PRESETS[preset]
    if temperatures is not None:
        if not _are_positive(temperatures):
            raise ConfigError(
                f"temperatures={temperatures!r} must be one or more positive numbers, "
                f"for instance (0.02, 0.05, 0.2)"
            )
        rules = replace(rules, temperatures=tuple(temperatures))
    if not 0 <= affinity_floor < 1:
        raise ConfigError(f"affinity_floor={affinity_floor} must be from 0 to below 1, as 1e-3")
    rules = replace(
        rules,
        affinity=replace(rules.affinity, floor=affinity_floor),
        scale_scope=scale_scope or rules.scale_scope,
        norm_scope=norm_scope or rules.norm_scope,
    )
    one_of("scale_scope", rules.scale_scope, get_args(Scope))
    one_of("norm_scope", rules.norm_scope, get_args(Scope))
    return rules


def _are_positive(numbers: Any) -> bool:
    if not isinstance(numbers, Sequence) or not numbers:
        return False
    return all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers)
