"""Losses over the global batch. Each file reads as its formula; `base` holds what they share.

Every loss takes ``keys_from``, ``impl``, ``chunk_size``, ``group`` and ``grad_reduction`` (see
`base.PairLoss`, which also states the gradient contract) and works without a process group.
"""

from dist_contrastive.losses.contrastive_force import ContrastiveForce, contrastive_force
from dist_contrastive.losses.infonce import InfoNCE
from dist_contrastive.losses.ntxent import NTXent

__all__ = ["ContrastiveForce", "InfoNCE", "NTXent", "contrastive_force"]
