"""Shards, their index, and the stream that reads them in an order fixed by the config."""

from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.filters import Filter
from dist_contrastive.data.packing.arrays import pack_arrays
from dist_contrastive.data.packing.demos import pack_digits, pack_glyphs
from dist_contrastive.data.packing.hub import pack_dataset
from dist_contrastive.data.packing.images import pack_images
from dist_contrastive.data.packing.merge import merge_shards
from dist_contrastive.data.packing.options import PackOptions
from dist_contrastive.data.packing.pairs import pack_pairs
from dist_contrastive.data.packing.toys import pack_toy, toy_points
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import index_folder, load_index
from dist_contrastive.data.shards.storage import BlockCache
from dist_contrastive.data.source import Source
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.data.subset import Subset, open_subset
from dist_contrastive.errors import retired
from dist_contrastive.pack_options import TextFormat

__all__ = [
    "Balance",
    "BlockCache",
    "DataConfig",
    "Fields",
    "Filter",
    "PackOptions",
    "Samples",
    "ShardIndex",
    "ShardStream",
    "Source",
    "Subset",
    "TextFormat",
    "index_folder",
    "load_index",
    "merge_shards",
    "open_subset",
    "pack_arrays",
    "pack_dataset",
    "pack_digits",
    "pack_glyphs",
    "pack_images",
    "pack_pairs",
    "pack_toy",
    "toy_points",
]

__getattr__ = retired(__name__, {"CacheSettings": "dist_contrastive.data.BlockCache.Config"})
