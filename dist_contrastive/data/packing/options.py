"""Options of all sources of shards, the target folder, and keys of samples."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.shards.locations import INDEX_NAME
from dist_contrastive.errors import ConfigError, DataError

_PATTERN_SIGNS = "/{}*?[]"  # would not be taken literally in the name of a shard
_META = re.compile(r"__[^/]*__/")  # in front of members that webdataset skips


@dataclass(frozen=True)
class ShardBounds:
    """Largest number of samples of a shard and MiB of its tar; None is no bound. A sample that is
    larger has a shard of its own."""

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
    """Name of the shards that `pack_samples` would write to a folder.

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


def refuse_foreign_files(folder: Path, own: str, writer: str) -> None:
    """Refuse a folder that holds files of another origin.

    Args:
        own: regular expression of allowed paths in the folder; those of folders end in a slash.
        writer: who writes such, for the message, as "packing the digits".

    Raises:
        DataError: the folder is a file, or holds something else.
    """
    if re.match(r"[a-z0-9]+:/", _shown(folder)):
        raise DataError(
            f"{_shown(folder)} is a URL; pack into a folder, and copy that to the server"
        )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new or empty folder to pack into")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
        if not re.fullmatch(own, name):
            raise DataError(
                f"{folder} already holds {name!r}, which {writer} did not write; "
                "give a new or empty folder"
            )


def _shown(folder: Path) -> str:
    """Path as it was given, if it lies below the working directory."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def numbered_key(number: int) -> str:
    """Key of a sample that has only its place in a table, counted from 0."""
    return f"{number:09d}"


def key_of_path(path: str) -> str:
    """Key of a file: its path in the data set without the extension.

    Dots of the file's name become underscores: what follows the first of them would be read as the
    name of a field. A first folder named __...__, which webdataset skips, loses the underscores in
    front.
    """
    whole = PurePosixPath(path)
    key = str(whole.parent / whole.stem.replace(".", "_"))
    return key.lstrip("_") if _META.match(key) else key


def check_key(key: str) -> None:
    """Refuse a key whose fields could not be told apart in a tar.

    Raises:
        DataError: its last part is empty or holds a dot, or webdataset skips it.
    """
    last = key.rpartition("/")[2]
    if not last or "." in last:
        raise DataError(
            f"the key {key!r} {'holds a dot in' if last else 'lacks'} its last part, and a field's "
            f"name begins at the first dot there; give KEY or FOLDER/KEY without dots in KEY"
        )
    if _META.match(key):
        raise DataError(
            f"the key {key!r} begins with a folder named __...__, which webdataset skips; rename it"
        )
