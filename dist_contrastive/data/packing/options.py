"""What all sources of shards share: their order, the target folder, and keys of samples."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.shards.locations import INDEX_NAME
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.pack_options import PATTERN_SIGNS, PackOptions
from dist_contrastive.pack_options import ShardBounds as ShardBounds

_META = re.compile(r"__[^/]*__/")  # in front of members that webdataset skips


def order(count: int, options: PackOptions) -> Iterator[int]:
    """The numbers 0 ... count - 1 as they are written."""
    if options.seed is None:
        return iter(range(count))
    return map(int, keyed_permutation(count, options.seed))


def check_target(folder: Path | str, options: PackOptions) -> str:
    """Name of the shards that `pack_samples` would write to a folder.

    Raises:
        ConfigError: the folder's name cannot be that of shards.
        DataError: the folder holds something, unless it is to be overwritten.
    """
    folder = Path(folder).resolve()
    name = options.name or folder.name
    if not name or set(name) & set(PATTERN_SIGNS):
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
