"""Locations of shards: a folder, a pattern `train-{00000..00099}.tar`, or a URL of either."""

import glob
import os
from pathlib import Path

import braceexpand

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.errors import DataError

INDEX_NAME = "index.npz"
_MAGIC = ("*", "?", "[")


def is_pattern(location: str) -> bool:
    """Whether a location is a pattern or a shard rather than a folder."""
    return location.endswith((".tar", "}", "*")) and (is_url(location) or not _is_folder(location))


def folder_of(location: str) -> str:
    """Part of a path or URL before the last slash."""
    head, slash, _ = location.rpartition("/")
    return head if slash else "."


def join(folder: str, name: str) -> str:
    """Path or URL of a shard of a folder; names that are whole already stay."""
    if is_url(name) or name.startswith("/") or folder == ".":
        return name
    return f"{folder.rstrip('/')}/{name}"


def find_shards(location: str) -> list[str]:
    """Shards of a folder (sorted by name) or of a pattern (in the order of its braces).

    Raises:
        DataError: no such folder; no shard matches.
    """
    if is_pattern(location):
        return _expand(location)
    if location.endswith(".npz"):
        raise DataError(f"{location} is an index; give the folder or the pattern of its shards")
    if is_url(location):
        return _checked(remote.glob(f"{location.rstrip('/')}/*.tar"), location)
    folder = Path(location)
    if not _is_folder(location):
        raise DataError(f"the shard folder {folder} does not exist; give a folder that holds tars")
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    except OSError as error:
        raise DataError(
            f"the shard folder {folder} cannot be read ({error.strerror}); allow it"
        ) from error
    return _checked([str(folder / name) for name in names if name[0] != "."], location)


def _is_folder(location: str) -> bool:
    try:
        return Path(location).is_dir()
    except OSError as error:  # one on the way to it may not be entered
        raise DataError(
            f"{location} cannot be reached ({error.strerror}); allow it, or give another"
        ) from error


def _expand(pattern: str) -> list[str]:
    """Shards of a pattern: those listed by braces must exist, * matches those that do."""
    if not is_url(pattern) and Path(pattern).is_file():
        return [pattern]
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"the pattern {pattern} cannot be read ({error}); close its braces"
        ) from error
    shards: list[str] = []
    for name in names:
        if not any(sign in name for sign in _MAGIC):
            shards.append(name)
        elif is_url(name):
            shards += sorted(remote.glob(name))
        else:
            shards += sorted(glob.glob(name))
    shards = [name for name in shards if name.endswith(".tar")]
    missing = [name for name in shards if not is_url(name) and not Path(name).is_file()]
    if missing:
        raise DataError(
            f"shard {missing[0]} of the pattern {pattern} does not exist ({len(missing)} of "
            f"{len(shards)} do not); correct the pattern, or restore it"
        )
    if not shards:
        raise DataError(f"no shard matches {pattern}; give a pattern of files that end in .tar")
    if len(set(shards)) < len(shards):
        repeated = next(name for name in shards if shards.count(name) > 1)
        raise DataError(f"the pattern {pattern} names {repeated} twice; name every shard once")
    return shards


def _checked(names: list[str], folder: str) -> list[str]:
    if names:
        return names
    below = [] if is_url(folder) else sorted(glob.glob(f"{glob.escape(folder)}/*/*.tar"))
    fix = "pack some with `dist-contrastive shards pack`"
    if is_url(folder):
        fix = "its server may not list files: name them, as in train-{00000..00099}.tar"
    if below:
        fix = f"give a folder that does, as {folder_of(below[0])}"
    raise DataError(f"{folder} holds 0 files that end in .tar; {fix}")
