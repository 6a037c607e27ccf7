"""Settings of the losses that tasks train with, and the table from names to classes."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dist_contrastive.losses.barlow_twins import BarlowTwins
from dist_contrastive.losses.base import LARGEST_SCALE, SMALLEST_SCALE, PairLoss
from dist_contrastive.losses.cosine_embedding import CosineEmbedding
from dist_contrastive.losses.dcl import DCL
from dist_contrastive.losses.force import ContrastiveForce, Preset, Scope
from dist_contrastive.losses.infonce import InfoNCE
from dist_contrastive.losses.koleo import KoLeo
from dist_contrastive.losses.ntxent import NTXent
from dist_contrastive.losses.self_diagonal import SelfDiagonal
from dist_contrastive.losses.siglip import SigLIP
from dist_contrastive.losses.supcon import SupCon
from dist_contrastive.losses.triplet import MiningName, Triplet
from dist_contrastive.losses.vicreg import VICReg
from dist_contrastive.pairwise import DistanceName, Impl
from dist_contrastive.settings import Settings

LOSSES: dict[str, type[PairLoss]] = {
    "barlow_twins": BarlowTwins,
    "contrastive_force": ContrastiveForce,
    "cosine_embedding": CosineEmbedding,
    "dcl": DCL,
    "infonce": InfoNCE,
    "koleo": KoLeo,
    "ntxent": NTXent,
    "self_diagonal": SelfDiagonal,
    "siglip": SigLIP,
    "supcon": SupCon,
    "triplet": Triplet,
    "vicreg": VICReg,
}


class _LossSettings(Settings):
    impl: Impl = "auto"
    """dense keeps the score matrix, chunked computes it in tiles, auto chooses by size."""
    chunk_size: PositiveInt | None = None
    """Rows and keys of a tile; null chooses."""
    keys_from: Literal["gather", "ring"] = "gather"
    """gather brings all keys to every rank at once, ring hands them from rank to rank."""


class _TemperatureSettings(_LossSettings):
    temperature: PositiveFloat
    """Divides the similarities."""
    learnable: bool = False
    """Whether it is trained, within the limits of `losses.base.Scale`."""

    @model_validator(mode="after")
    def _starts_where_it_may_go(self) -> Self:
        if self.learnable:
            _check_start("temperature", self.temperature, 1 / LARGEST_SCALE, 1 / SMALLEST_SCALE)
        return self


def _check_start(name: str, value: float, lowest: float, highest: float) -> None:
    """Refuse a learnable number that the first clamp would move."""
    if not lowest <= value <= highest:
        raise ValueError(
            f"{name}={value:g} is learnable, hence kept from {lowest:g} to {highest:g}; "
            f"start it there, or set learnable to false"
        )


class InfoNCESettings(_TemperatureSettings):
    """InfoNCE between the two views, the batch as negatives."""

    name: Literal["infonce"]
    temperature: PositiveFloat = 0.07
    symmetric: bool = False


class NTXentSettings(_TemperatureSettings):
    """SimCLR's loss."""

    name: Literal["ntxent"]
    temperature: PositiveFloat = 0.5


class DCLSettings(_TemperatureSettings):
    """Decoupled contrastive loss: the positive is left out of the denominator."""

    name: Literal["dcl"]
    temperature: PositiveFloat = 0.1


class SigLIPSettings(_LossSettings):
    """Every pair of views is a binary classification of its own."""

    name: Literal["siglip"]
    scale: PositiveFloat = 10.0
    bias: float = -10.0
    learnable: bool = True
    """Whether scale and bias are trained, the scale within the limits of `losses.base.Scale`."""

    @model_validator(mode="after")
    def _starts_where_it_may_go(self) -> Self:
        if self.learnable:
            _check_start("scale", self.scale, SMALLEST_SCALE, LARGEST_SCALE)
        return self


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


class SelfDiagonalSettings(_TemperatureSettings):
    """Every embedding finds itself: pure repulsion."""

    name: Literal["self_diagonal"]
    temperature: PositiveFloat = 0.1


class KoLeoSettings(_LossSettings):
    """Every embedding moves away from its nearest neighbour."""

    name: Literal["koleo"]
    eps: PositiveFloat = 1e-8


class _LabelledSettings(_LossSettings):
    max_delta: NonNegativeFloat | None = None
    """Largest difference of similar continuous labels; null for integer labels."""


class SupConSettings(_TemperatureSettings, _LabelledSettings):
    """Each embedding finds all that are similar to it."""

    name: Literal["supcon"]
    temperature: PositiveFloat = 0.1


class TripletSettings(_LabelledSettings):
    """An embedding is nearer to similar ones than to others, by a margin."""

    name: Literal["triplet"]
    margin: NonNegativeFloat = 0.2
    """In units of the distance."""
    distance: DistanceName = "euclidean"
    mining: MiningName = "all"
    """Which triplets count; see `Triplet`."""


class CosineEmbeddingSettings(_LabelledSettings):
    """Similar pairs become parallel, others are pushed apart until a margin."""

    name: Literal["cosine_embedding"]
    margin: float = Field(default=0.5, ge=-1, le=1)
    """Cosine similarity up to which dissimilar pairs cost nothing."""


class ContrastiveForceSettings(_LossSettings):
    """The force of data and of other generated points on generated points."""

    name: Literal["contrastive_force"] = "contrastive_force"
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """In units of the mean distance; null: those of the preset."""
    preset: Preset = "drift"
    scale_scope: Scope | None = None
    """Over what the mean distance is a mean: label, group or global; null: the preset's."""
    norm_scope: Scope | None = None
    """The same for what a force is divided by."""
    affinity_floor: float = Field(default=0.0, ge=0, lt=1)
    """Smallest weight of a pair."""
    normalise_total: bool = False
    """Divide the sum over temperatures by its root mean square."""
    cache_mb: NonNegativeFloat = 24.0
    """Distances that are kept from pass to pass, in MiB."""


_ViewLosses = (
    InfoNCESettings
    | NTXentSettings
    | DCLSettings
    | SigLIPSettings
    | VICRegSettings
    | BarlowTwinsSettings
    | SelfDiagonalSettings
    | KoLeoSettings
)
_LabelLosses = SupConSettings | TripletSettings | CosineEmbeddingSettings

ViewLossSettings = Annotated[_ViewLosses, Field(discriminator="name")]
"""Losses of views of samples, which need no labels; `views.compare_views` feeds them all."""

LabelLossSettings = Annotated[_LabelLosses, Field(discriminator="name")]
"""Losses of features and labels."""

AnyLossSettings = Annotated[_ViewLosses | _LabelLosses, Field(discriminator="name")]
"""Both."""


def build_loss(settings: _LossSettings) -> PairLoss:
    """The loss that the settings describe."""
    options = settings.model_dump()
    return LOSSES[options.pop("name")](**options)
