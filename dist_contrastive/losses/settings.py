"""Settings of the losses that tasks train with, and the table from names to classes."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dist_contrastive.losses.barlow_twins import BarlowTwins
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.contrastive_force import ContrastiveForce, Preset
from dist_contrastive.losses.dcl import DCL
from dist_contrastive.losses.infonce import InfoNCE
from dist_contrastive.losses.ntxent import NTXent
from dist_contrastive.losses.siglip import SigLIP
from dist_contrastive.losses.vicreg import VICReg
from dist_contrastive.pairwise import Impl
from dist_contrastive.settings import Settings

LOSSES: dict[str, type[PairLoss]] = {
    "barlow_twins": BarlowTwins,
    "contrastive_force": ContrastiveForce,
    "dcl": DCL,
    "infonce": InfoNCE,
    "ntxent": NTXent,
    "siglip": SigLIP,
    "vicreg": VICReg,
}


class _LossSettings(Settings):
    impl: Impl = "auto"
    """dense keeps the score matrix, chunked computes it in tiles, auto chooses by size."""
    chunk_size: PositiveInt | None = None
    """Rows and keys of a tile; null chooses."""
    keys_from: Literal["gather", "ring"] = "gather"
    """gather brings all keys to every rank at once, ring hands them from rank to rank."""


class InfoNCESettings(_LossSettings):
    """InfoNCE between the two views, the batch as negatives."""

    name: Literal["infonce"]
    temperature: PositiveFloat = 0.07
    symmetric: bool = False
    learnable: bool = False


class NTXentSettings(_LossSettings):
    """SimCLR's loss."""

    name: Literal["ntxent"]
    temperature: PositiveFloat = 0.5
    learnable: bool = False


class DCLSettings(_LossSettings):
    """Decoupled contrastive loss: the positive is left out of the denominator."""

    name: Literal["dcl"]
    temperature: PositiveFloat = 0.1
    learnable: bool = False


class SigLIPSettings(_LossSettings):
    """Every pair of views is a binary classification of its own."""

    name: Literal["siglip"]
    scale: PositiveFloat = 10.0
    bias: float = -10.0
    learnable: bool = True


class VICRegSettings(_LossSettings):
    """Views agree, dimensions vary, and not together."""

    name: Literal["vicreg"]
    invariance_weight: NonNegativeFloat = 25.0
    variance_weight: NonNegativeFloat = 25.0
    covariance_weight: NonNegativeFloat = 1.0
    eps: PositiveFloat = 1e-4


class BarlowTwinsSettings(_LossSettings):
    """The correlations between the dimensions of two views approach the identity."""

    name: Literal["barlow_twins"]
    redundancy_weight: NonNegativeFloat = 5e-3
    eps: PositiveFloat = 1e-5


class ContrastiveForceSettings(_LossSettings):
    """The force of data and of other generated points on generated points."""

    name: Literal["contrastive_force"] = "contrastive_force"
    temperatures: tuple[PositiveFloat, ...] = Field(
        default=(0.01, 0.02, 0.05, 0.1, 0.2), min_length=1
    )
    """In units of the mean distance."""
    preset: Preset = "drift"


ViewLossSettings = Annotated[
    InfoNCESettings
    | NTXentSettings
    | DCLSettings
    | SigLIPSettings
    | VICRegSettings
    | BarlowTwinsSettings,
    Field(discriminator="name"),
]
"""Losses that compare two views."""


def build_loss(settings: _LossSettings) -> PairLoss:
    """The loss that the settings describe."""
    options = settings.model_dump()
    return LOSSES[options.pop("name")](**options)
