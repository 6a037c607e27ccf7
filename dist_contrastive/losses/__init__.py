"""Losses over the global batch. Each file reads as its formula; `base` holds what they share.

Every loss has the settings ``keys_from``, ``impl`` and ``chunk_size``, takes ``group`` and
``grad_reduction`` (see `base.PairLoss`, which also states the gradient contract) and works without
a process group. A config names a loss of `LOSSES`, or one of the user's own by its import path.
"""

from typing import Annotated, Any

from pydantic import AfterValidator

from dist_contrastive.losses.barlow_twins import BarlowTwins
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.cosine_embedding import CosineEmbedding
from dist_contrastive.losses.dcl import DCL
from dist_contrastive.losses.force import ContrastiveForce, contrastive_force
from dist_contrastive.losses.infonce import InfoNCE
from dist_contrastive.losses.koleo import KoLeo
from dist_contrastive.losses.ntxent import NTXent
from dist_contrastive.losses.scale import clamp_scales
from dist_contrastive.losses.self_diagonal import SelfDiagonal
from dist_contrastive.losses.siglip import SigLIP
from dist_contrastive.losses.supcon import LabelledLoss, SupCon
from dist_contrastive.losses.triplet import Triplet
from dist_contrastive.losses.vicreg import VICReg
from dist_contrastive.losses.views import compare_views
from dist_contrastive.settings import Choice

__all__ = [
    "DCL",
    "LOSSES",
    "AnyLoss",
    "BarlowTwins",
    "ContrastiveForce",
    "CosineEmbedding",
    "InfoNCE",
    "KoLeo",
    "LabelLoss",
    "NTXent",
    "PairLoss",
    "SelfDiagonal",
    "SigLIP",
    "SupCon",
    "Triplet",
    "VICReg",
    "ViewLoss",
    "build_loss",
    "clamp_scales",
    "compare_views",
    "contrastive_force",
]

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


def _choice(base: type[PairLoss], *takes: str) -> Choice:
    """Losses whose inputs are of one of these kinds."""

    def unfit(cls: type[PairLoss]) -> str | None:
        kind = getattr(cls, "takes", None)
        if kind in takes:
            return None
        return f"its takes={kind!r} must be {' or '.join(map(repr, takes))}"

    known = {name: cls for name, cls in LOSSES.items() if cls.takes in takes}
    return Choice("loss", base, known, unfit)


def _checked_for_run(settings: Any) -> Any:
    settings.check_run()
    return settings


FOR_RUNS = AfterValidator(_checked_for_run)
"""Annotation of a loss's settings in the config of a run."""

ViewLoss = Annotated[PairLoss.Config, _choice(PairLoss, "views", "features"), FOR_RUNS]
"""Settings of a loss of views of samples, which needs no labels; `compare_views` feeds them all."""

LabelLoss = Annotated[LabelledLoss.Config, _choice(LabelledLoss, "labels"), FOR_RUNS]
"""Settings of a loss of features and labels."""

AnyLoss = Annotated[PairLoss.Config, _choice(PairLoss, "views", "features", "labels"), FOR_RUNS]
"""Settings of either."""

PairedLoss = Annotated[
    PairLoss.Config, Choice("loss", PairLoss, {"infonce": InfoNCE, "siglip": SigLIP}), FOR_RUNS
]

_ALL = Choice("loss", PairLoss, LOSSES)


def build_loss(settings: PairLoss.Config) -> PairLoss:
    """Loss that the settings name."""
    loss: PairLoss = _ALL.build(settings)
    return loss
