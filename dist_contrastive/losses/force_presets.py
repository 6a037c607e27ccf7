"""The forms of the contrastive force that are in use, as settings of one computation."""

from dataclasses import dataclass
from typing import Literal

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
