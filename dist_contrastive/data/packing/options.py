"""What all sources of shards have in common: options, and the folder that is written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.packing.aside import refuse_foreign_files
from dist_contrastive.data.shards.locations import INDEX_NAME
from dist_contrastive.errors import ConfigError, DataError

_PATTERN_SIGNS = "/{}*?[]"  # would not be taken literally in the name of a shard


@dataclass(frozen=True)
class ShardBounds:
    """Where a shard ends: at so many samples, or before its tar is larger than so many MiB,
    whichever comes first; None is no bound. A sample that is larger has a shard of its own."""

    samples: int | None = 10_000
    mib: float | None = 256.0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples_per_shard={self.samples} is below 1; set 1 or more")
        if self.mib is not None and not self.mib > 0:
            raise ConfigError(f"shard_mb={self.mib:g} is not above 0; set the MiB of a shard")


@dataclass(frozen=True)
class PackOptions:
    """How samples are chosen, ordered and written, whatever their source.

    Raises:
        ConfigError: a value that is impossible.
    """

    name: str | None = None
    """Of shards, as in NAME-00000.tar; None is the name of their folder."""
    bounds: ShardBounds = ShardBounds()
    workers: int | None = None
    """Threads that read and encode; None is one for each CPU. The bytes do not depend on it."""
    seed: int | None = 0
    """Of the order in which samples are written; None keeps that of the source. A source sorted by
    class gives shards of one class each, from which no batch is well mixed."""
    verify: Literal["open", "decode"] = "open"
    """Of every image its headers, and of a PNG its checksums; or all of its pixels, which finds
    truncated JPEGs too and takes longer."""
    skip_unreadable: bool = False
    """Leave out samples that cannot be read, instead of stopping."""
    overwrite: bool = False
    """Replace shards of this name that the folder holds, and their index."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers={self.workers} is below 1; set 1 or more threads")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed={self.seed} is below 0; set 0 or more")
        if self.name is not None and (not self.name or set(self.name) & set(_PATTERN_SIGNS)):
            raise ConfigError(
                f"name={self.name!r} is empty or holds one of {_PATTERN_SIGNS}, which patterns of "
                f"shards read otherwise; name shards by letters and digits"
            )

    def order(self, count: int) -> Iterator[int]:
        """The numbers 0 ... count - 1 as they are written."""
        if self.seed is None:
            return iter(range(count))
        return map(int, keyed_permutation(count, self.seed))


def check_target(folder: Path | str, options: PackOptions) -> str:
    """The name of the shards that `pack_samples` would write there; for sources whose own work
    takes a while.

    Raises:
        ConfigError: the folder's name cannot be that of shards.
        DataError: the folder holds something, unless it is to be overwritten.
    """
    folder = Path(folder).resolve()
    name = options.name or folder.name
    if not name or set(name) & set(_PATTERN_SIGNS):
        raise ConfigError(f"shards cannot be named after the folder {folder}; give --name NAME")
    own = rf"{re.escape(name)}-\d{{5}}\.tar|{re.escape(INDEX_NAME)}"
    refuse_foreign_files(folder, own, f"packing {name}")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if held and not options.overwrite:
        raise DataError(
            f"{folder} already holds {held[0]!r} ({len(held)} files); give a new or empty folder, "
            f"or --overwrite to replace what an earlier packing of {name} wrote"
        )
    return name
