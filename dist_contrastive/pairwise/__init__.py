"""The tile engine: reductions over the matrix of pair scores, without keeping the matrix.

    pairs.py       rows of this rank and keys of all ranks, and which pairs are similar
    keys.py        blocks of keys (gather, ring, local), reductions over ranks for keys
    reductions.py  statistics of a tile: log-sum-exp, sums over pairs; their derivatives
    exponentials.py  sums of exponentials, and softmax weights, of a tile
    choice.py      which of these ways is taken: dense, chunked, triton
    dense.py       the specification: plain torch on whole matrices
    chunked.py     block by block of keys, computed again in backward: memory linear in the batch
    way.py         what a way to compute a block has to do; saved.py what its backward needs
    tiles.py       a block in tiles of plain torch
    by_kernels.py  by Triton kernels, whose scores never reach memory; fused.py: a block of it
    *kernels.py    the kernels; kernel_calls.py: their operands, and where they can run
    tile_shapes.py  their tiles; ids.py: what they know as similar
    distances.py   Euclidean and cosine distance, rows of unit length
    triplets.py    which triplets of a row count, for every way of mining
    panels.py      losses that need all distances of a row at once; mined.py: by kernels
    nearest.py     the nearest and the farthest key of each row; chosen.py: by kernels

Where keys come from and how a tile is computed are independent of each other, and a loss sees
neither: it names a reduction.
"""

import torch

from dist_contrastive.pairwise import by_kernels, chunked, dense, kernel_calls
from dist_contrastive.pairwise.choice import IMPLS, Impl, choose
from dist_contrastive.pairwise.distances import DISTANCES, Distance, DistanceName
from dist_contrastive.pairwise.nearest import extremes, fetch
from dist_contrastive.pairwise.pairs import KEYS_FROM, KeysFrom, Pairs, Tile
from dist_contrastive.pairwise.panels import Mining, dense_triplet_sums, triplet_sums
from dist_contrastive.pairwise.reductions import (
    LeaveOut,
    LogSumExp,
    LogSumExpAndPositives,
    PairSum,
    Parts,
    Reduction,
)
from dist_contrastive.pairwise.tiles import Tiles
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
    "LeaveOut",
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


def reduce(
    reduction: Reduction,
    pairs: Pairs,
    impl: Impl = "auto",
    chunk_size: int | None = None,
    partners: int | None = None,
) -> Parts:
    """Reduce the scores of all pairs, ``rows @ keys.T`` unless `pairs` has a scale, differentiably.

    Equals ``reduction.parts(Tile(rows @ all_keys.T, own, similar))`` with the keys of all ranks;
    what it keeps of each key is joined over the rows of all ranks.

    Args:
        pairs: floating rows and keys; scores are kept in fp32, of fp64 rows in fp64.
        impl: ``dense`` keeps the matrix (with ``ring`` that of one block at a time), ``chunked``
            only a tile, ``triton`` none of it (on CUDA); ``auto`` chooses.
        chunk_size: rows and keys of a tile of ``chunked``; rows whose gradients of scores
            ``triton`` keeps at a time. None chooses.
        partners: also the scores of row i of b with key (i + partners) % b of the same rank.

    Returns:
        What is kept of this rank's rows, each [b], and last their scores with partners if those are
        asked for; what is kept of its own keys, each [n].

    Collectives: gather: one all-gather of the keys (and one of tags, of factors), backward a
    reduce-scatter; ring: W - 1 shifts of them, backward another W - 1, and W of the gradients.
    Kernels of a `PairSum` make its gradient, and these exchanges, in the forward pass.
    Results of keys cost gather two all-reduces of [B] and in backward two all-gathers (one more
    all-reduce of dense); they cost ring W shifts of [n], and in backward travel with the keys.
    """
    # Mixed precision would compute the scores in bf16: at scale 100 its spacing there is 0.5.
    with torch.autocast(pairs.rows.device.type, enabled=False):
        # By the largest rank's scores: the ways exchange different things, so all take the same.
        most_rows = len(pairs.rows) if pairs.keys_from == "local" else max(pairs.sizes)
        num_scores = most_rows * pairs.num_keys
        how = choose(impl, num_scores, kernel_calls.unfit(reduction, pairs), pairs.rows.is_cuda)
        if how == "triton":
            return by_kernels.reduce(reduction, pairs, chunk_size, partners)
        pairs = pairs.multiplied()
        if how == "chunked":
            of_rows, of_keys = chunked.reduce(reduction, pairs, Tiles(chunk_size))
        elif pairs.keys_from == "ring":  # whole blocks as tiles
            of_rows, of_keys = chunked.reduce(reduction, pairs, Tiles(max(1, *pairs.sizes)))
        else:
            of_rows, of_keys = dense.reduce(reduction, pairs)
        return (*of_rows, *(() if partners is None else (pairs.partners(partners),))), of_keys
