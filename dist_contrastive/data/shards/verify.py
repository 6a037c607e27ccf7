"""All that is wrong with shards: each read whole and compared with its index, and with the others.

A stream reads by the index, trusts it, and finds damage only where it comes upon it. This finds it
before.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.block_cache import BlockCache, CacheSettings
from dist_contrastive.data.shards.files import ShardFiles
from dist_contrastive.data.shards.index import ShardIndex, index_command
from dist_contrastive.data.shards.index_file import parse_index
from dist_contrastive.data.shards.indexing import Progress
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    find_shards,
    folder_of,
    is_pattern,
    is_url,
)
from dist_contrastive.data.shards.shard_check import (
    CheckedShard,
    check_shard,
    key_at,
    limited,
)
from dist_contrastive.data.shards.temporary_cache import temporary_cache
from dist_contrastive.errors import DataError, UnreachableError, UnreadableSample


@dataclass(frozen=True)
class Verification:
    """What was read, and what was found.

    Attributes:
        problems: one sentence each; data without any are sound.
        notes: what is legal, but may not be meant: keys that several shards hold, empty shards,
            and what could not be compared.
        shards: how many were read. samples: how many they hold.
        index_files: with which they were compared.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    shards: int
    samples: int
    index_files: tuple[str, ...]


def verify_shards(
    location: Path | str,
    decode: bool = False,
    *,
    cache: CacheSettings | None = None,
    progress: Progress = lambda items, _: items,
) -> Verification:
    """Read all shards whole and find what is wrong with them.

    Compared with the index: which tars there are, their sizes, checksums, and where every field
    lies. Without it too: whether each is a tar from one end to the other, keys that a shard holds
    twice, fields that some samples or shards lack.

    Args:
        location: a folder, an index file, a pattern of shards, or a URL of one.
        decode: decode every field.
        cache: of remote shards; None: a temporary one, so that nothing kept from earlier is taken
            for what the server holds.
        progress: told of each shard.

    Raises:
        DataError: no such folder or index file; no shards.
        UnreachableError: a server does not answer.
    """
    location = str(location) if is_url(str(location)) else str(Path(location))
    with temporary_cache() if cache is None else nullcontext(cache) as settings:
        blocks = BlockCache(settings)
        found = _Found(ShardFiles(blocks))
        found.look(location)
        checks = _check_all(found, decode, blocks)
        checked = list(progress(checks, len(found.shards)))
        samples = sum(len(one.offsets) for one in checked)
        problems = [*found.problems, *(x for one in checked for x in one.problems)]
        problems += _other_fields(checked)
        if not samples and not problems:
            problems.append(f"the {len(checked)} shards of {location} hold 0 samples")
        notes = [*found.notes, *_empty(checked), *_shared_keys(checked, found.files)]
    return Verification(
        tuple(problems), tuple(notes), len(checked), samples, tuple(found.index_files)
    )
