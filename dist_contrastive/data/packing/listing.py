"""What is known of shards without reading them: sizes, and from their indexes samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.index_file import load_index
from dist_contrastive.data.shards.locations import find_shards, folder_of, is_url
from dist_contrastive.errors import DataError


class ShardSize(NamedTuple):
    """What is known of a shard."""

    shard: str
    size: int | None  # bytes; None where a server does not tell
    samples: int | None  # None without an index


def list_shards(locations: Sequence[Path | str]) -> tuple[list[ShardSize], list[str]]:
    """The shards of folders, patterns or URLs of these, and why samples of some are not known.

    Raises:
        DataError: no such folder, or no shard matches.
        UnreachableError: a server does not answer.
    """
    shards = [shard for location in locations for shard in find_shards(str(location))]
    counts: dict[str, dict[str, int]] = {}
    problems = []
    for folder in dict.fromkeys(map(folder_of, shards)):
        try:
            index = load_index(folder)
        except DataError as error:
            counts[folder] = {}
            problems.append(str(error))
        else:
            names = (shard.rpartition("/")[2] for shard in index.shards)
            counts[folder] = dict(zip(names, index.shard_samples.tolist(), strict=True))
    rows = [
        ShardSize(shard, _size(shard), counts[folder_of(shard)].get(shard.rpartition("/")[2]))
        for shard in shards
    ]
    return rows, problems


def _size(shard: str) -> int | None:
    return remote.size(shard) if is_url(shard) else Path(shard).stat().st_size
