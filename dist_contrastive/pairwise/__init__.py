"""The tile engine: reductions over the matrix of pair scores, without keeping the matrix.

    pairs.py       rows of this rank and keys of all ranks, and which pairs are similar
    keys.py        blocks of keys (gather, ring, local), reductions over ranks for keys
    reductions.py  statistics of a tile: log-sum-exp, sums over pairs; their derivatives
    dense.py       the specification: plain torch on whole matrices
    chunked.py     the same maths tile by tile, recomputed in backward: memory linear in the batch
    distances.py   Euclidean and cosine distance, rows of unit length
    triplets.py    which triplets of a row count, for every way of mining
    panels.py      losses that need all distances of a row at once
    nearest.py     the nearest and the farthest key of each row, tile by tile

Where keys come from and how a tile is computed are independent of each other, and a loss sees
neither: it names a reduction.
"""

from typing import Literal

import torch

from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise import chunked, dense
from dist_contrastive.pairwise.distances import DISTANCES, Distance, DistanceName
from dist_contrastive.pairwise.nearest import extremes, fetch
from dist_contrastive.pairwise.pairs import KEYS_FROM, KeysFrom, Pairs, Tile
from dist_contrastive.pairwise.panels import Mining, dense_triplet_sums, triplet_sums
from dist_contrastive.pairwise.reductions import (
    LogSumExp,
    LogSumExpAndPositives,
    PairSum,
    Parts,
    Reduction,
)
from dist_contrastive.pairwise.triplets import WEIGHTS

__all__ = [
    "DISTANCES",
    "IMPLS",
    "KEYS_FROM",
    "WEIGHTS",
    "Distance",
    "DistanceName",
    "Impl",
    "KeysFrom",
    "LogSumExp",
    "LogSumExpAndPositives",
    "Mining",
    "PairSum",
    "Pairs",
    "Reduction",
    "Tile",
    "choose",
    "dense_triplet_sums",
    "extremes",
    "fetch",
    "reduce",
    "triplet_sums",
]

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


def reduce(
    reduction: Reduction, pairs: Pairs, impl: Impl = "auto", chunk_size: int | None = None
) -> Parts:
    """Reduce the scores ``rows @ keys.T`` of all pairs, differentiably.

    Equals ``reduction.parts(Tile(rows @ all_keys.T, own, similar))`` with the keys of all ranks;
    what it keeps of each key is joined over the rows of all ranks.

    Args:
        pairs: rows and keys in fp32 or fp64, of one dtype (scores are kept in it).
        impl: ``dense`` keeps the matrix (with ``ring`` that of one block at a time), ``chunked``
            only a tile; ``auto`` chooses by size.
        chunk_size: rows and keys of a tile; None chooses. Used by ``chunked`` alone.

    Returns:
        What is kept of this rank's rows, each [b], and of its own keys, each [n].

    Collectives: gather: one all-gather of the keys (and one of tags), backward a reduce-scatter;
    ring: W - 1 shifts of them, backward another W - 1, and W of the gradients. Results of keys cost
    gather two all-reduces of [B] and in backward two all-gathers (chunked) or one more all-reduce
    (dense); they cost ring W shifts of [n], and in backward travel with the keys.
    """
    # Mixed precision would compute the scores in bf16: at scale 100 its spacing there is 0.5.
    with torch.autocast(pairs.rows.device.type, enabled=False):
        # By the largest rank's scores: the ways exchange different things, so all take the same.
        how = choose(impl, max(pairs.sizes) * pairs.num_keys)
        if how == "chunked":
            return chunked.reduce(reduction, pairs, chunk_size)
        if pairs.keys_from == "ring":  # whole blocks as tiles
            return chunked.reduce(reduction, pairs, max(1, *pairs.sizes))
        return dense.reduce(reduction, pairs)
