"""Losses over the global batch. Each file reads as its formula; `base` holds what they share.

Every loss takes ``keys_from``, ``impl``, ``chunk_size``, ``group`` and ``grad_reduction`` (see
`base.PairLoss`, which also states the gradient contract) and works without a process group.
"""

from dist_contrastive.losses.barlow_twins import BarlowTwins
from dist_contrastive.losses.cosine_embedding import CosineEmbedding
from dist_contrastive.losses.dcl import DCL
from dist_contrastive.losses.force import ContrastiveForce, contrastive_force
from dist_contrastive.losses.infonce import InfoNCE
from dist_contrastive.losses.koleo import KoLeo
from dist_contrastive.losses.ntxent import NTXent
from dist_contrastive.losses.self_diagonal import SelfDiagonal
from dist_contrastive.losses.siglip import SigLIP
from dist_contrastive.losses.supcon import SupCon
from dist_contrastive.losses.triplet import Triplet
from dist_contrastive.losses.vicreg import VICReg
from dist_contrastive.losses.views import compare_views

__all__ = [
    "DCL",
    "BarlowTwins",
    "ContrastiveForce",
    "CosineEmbedding",
    "InfoNCE",
    "KoLeo",
    "NTXent",
    "SelfDiagonal",
    "SigLIP",
    "SupCon",
    "Triplet",
    "VICReg",
    "compare_views",
    "contrastive_force",
]
