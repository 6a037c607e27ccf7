"""The tile engine: reductions over the matrix of pair scores, without keeping the matrix.

    dense.py      the specification: plain torch on whole matrices
    chunked.py    the same maths tile by tile, recomputed in backward; memory linear in rows + keys
    distances.py  Euclidean distances of a tile, with an exact zero where points coincide
    force.py      the passes of the contrastive force over tiles

A loss names a reduction and never sees which of the implementations computes it.
"""

from typing import Literal

import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise import chunked, dense

Impl = Literal["auto", "dense", "chunked"]
IMPLS = ("auto", "dense", "chunked")

# Below this many scores one matrix product beats a loop over tiles, and 4 MiB are no matter.
_DENSE_UP_TO = 2**20


def choose(impl: Impl, num_scores: int) -> Literal["dense", "chunked"]:
    """Resolve ``auto``: dense for up to 2**20 scores, else chunked."""
    if impl not in IMPLS:
        raise ConfigError(f"impl={impl!r} is not known; use one of {', '.join(IMPLS)}")
    if impl == "auto":
        return "dense" if num_scores <= _DENSE_UP_TO else "chunked"
    return impl


def logsumexp(
    rows: Tensor,
    keys: Tensor,
    exclude: Tensor | None = None,
    impl: Impl = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the scores ``rows @ keys.T`` along both directions.

    Equals ``S = rows @ keys.T; S[arange(b), exclude] = -inf; S.logsumexp(1), S.logsumexp(0)``.
    A direction that the caller does not use costs nothing in backward.

    Args:
        rows: [b, D]. keys: [B, D], the same dtype, fp32 or fp64 (scores are kept in it).
        exclude: [b] int64, for every row one key that does not count (itself, say); or None.
        chunk_size: rows and keys of a tile; None chooses. Used by ``chunked`` alone.

    Returns:
        row_lse [b] and key_lse [B]; -inf where nothing counts. Both differentiable.
    """
    # Mixed precision would compute the scores in bf16: at scale 100 its spacing there is 0.5.
    with torch.autocast(rows.device.type, enabled=False):
        if choose(impl, rows.shape[0] * keys.shape[0]) == "dense":
            return dense.logsumexp(rows, keys, exclude)
        return chunked.logsumexp(rows, keys, exclude, chunk_size)
