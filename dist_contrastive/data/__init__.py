"""Shards, their index, and the stream that reads them in an order fixed by the config."""

from dist_contrastive.data.balanced import Balance
from dist_contrastive.data.digits import pack_digits
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.glyphs import pack_glyphs
from dist_contrastive.data.index import ShardIndex
from dist_contrastive.data.shards import index_folder
from dist_contrastive.data.stream import ShardStream
from dist_contrastive.data.toys import pack_toy, toy_points

__all__ = [
    "Balance",
    "Fields",
    "Samples",
    "ShardIndex",
    "ShardStream",
    "index_folder",
    "pack_digits",
    "pack_glyphs",
    "pack_toy",
    "toy_points",
]
