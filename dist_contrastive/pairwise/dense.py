"""Reductions on the whole score matrix, in plain torch: the specification."""

from dist_contrastive.pairwise.keys import open_keys
from dist_contrastive.pairwise.pairs import Pairs
from dist_contrastive.pairwise.reductions import Parts, Reduction


def reduce(reduction: Reduction, pairs: Pairs) -> Parts:
    """`pairwise.reduce` of gathered keys. Memory: a few matrices of [b, B]."""
    (block,) = open_keys(pairs).blocks()
    row_parts, key_parts = reduction.parts(pairs.tile(slice(0, len(pairs.rows)), block))
    if pairs.keys_from != "local":
        joined = zip(reduction.joins[1], key_parts, strict=True)
        key_parts = tuple(join.over_ranks(part, pairs.group) for join, part in joined)
    local = slice(pairs.start, pairs.start + len(pairs.keys))
    return row_parts, tuple(part[local] for part in key_parts)
