"""Settings of the losses, and the table from names to classes."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.contrastive_force import ContrastiveForce, Preset
from dist_contrastive.losses.infonce import InfoNCE
from dist_contrastive.losses.ntxent import NTXent
from dist_contrastive.pairwise import Impl
from dist_contrastive.settings import Settings

LOSSES: dict[str, type[PairLoss]] = {
    "infonce": InfoNCE,
    "ntxent": NTXent,
    "contrastive_force": ContrastiveForce,
}


class _LossSettings(Settings):
    impl: Impl = "auto"
    """dense keeps the score matrix, chunked computes it in tiles, auto chooses by size."""
    chunk_size: PositiveInt | None = None
    """Rows and keys of a tile; null chooses."""


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


class ContrastiveForceSettings(_LossSettings):
    """The force of data and of other generated points on generated points."""

    name: Literal["contrastive_force"] = "contrastive_force"
    temperatures: tuple[PositiveFloat, ...] = Field(
        default=(0.01, 0.02, 0.05, 0.1, 0.2), min_length=1
    )
    """In units of the mean distance."""
    preset: Preset = "drift"


ViewLossSettings = Annotated[InfoNCESettings | NTXentSettings, Field(discriminator="name")]
"""Losses that compare two views."""


def build_loss(settings: _LossSettings) -> PairLoss:
    """The loss that the settings describe."""
    options = settings.model_dump()
    return LOSSES[options.pop("name")](**options)
