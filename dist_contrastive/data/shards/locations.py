"""Locations of shards: a folder, a pattern `train-{00000..00099}.tar`, or a URL of either."""

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import braceexpand

from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.errors import DataError
from dist_contrastive.sentences import shown

INDEX_NAME = "index.npz"
_MOST_SHARDS = 1_000_000  # of a pattern
_MOST_KINDS = 20  # of files, in a message
_MAGIC = ("*", "?", "[")
_COMPRESSED = ("gz", "tgz", "bz2", "tbz", "tbz2", "xz", "txz", "zst", "tzst", "lz4", "zip", "7z")


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
    names = sorted(name for name in _names(location) if name.endswith(".tar"))
    return _checked([str(Path(location) / name) for name in names if name[0] != "."], location)


def other_files(location: str) -> Counter[str]:
    """Files that lie beside shards in a folder of this machine, or match their pattern, by kind."""
    if is_url(location) or location.endswith(".npz"):
        return Counter()
    if is_pattern(location):
        names = [name for name in _matches(location) if Path(name).is_file()]
    else:
        names = [f"{location}/{name}" for name in _names(location) if name != INDEX_NAME]
    others = (x for x in names if hidden_kind(x) or not (x.endswith(".tar") or Path(x).is_dir()))
    below = 0 if is_pattern(location) else len(_tars_below(location))
    return +Counter({**Counter(map(kind_of_file, others)), "tars in folders below": below})


def counted(kinds: Mapping[str, int]) -> str:
    """Counts by kind in words, as "4 files .heic, 2 links"; of many the largest."""
    shown = sorted(Counter(kinds).most_common(_MOST_KINDS))
    text = ", ".join(f"{count} {kind}" for kind, count in shown)
    more = sum(kinds.values()) - sum(count for _, count in shown)
    return text + (f" and {more} of {len(kinds) - len(shown)} other kinds" if more else "")


def kind_of_file(path: str) -> str:
    """Kind of a file by its name, in the plural."""
    if kind := hidden_kind(path):
        return kind
    stem, dot, extension = path.rpartition("/")[2].lower().rpartition(".")
    if extension in _COMPRESSED and (stem.endswith(".tar") or extension.startswith("t")):
        return f"compressed tars .{'tar.' * stem.endswith('.tar')}{extension}"
    return f"files .{extension}" if dot else "files without extension"


def hidden_kind(path: str) -> str | None:
    """Kind of a file that folders do not show; None of others."""
    name = path.rpartition("/")[2]
    if name.startswith("._") or name == ".DS_Store" or "__MACOSX" in path.split("/"):
        return "macOS companions"
    return "hidden files" if name.startswith(".") else None


def _names(folder: str) -> list[str]:
    """Names of what a folder holds, sorted."""
    if not _is_folder(folder):
        _refuse_compressed(folder)
        problem = "is a file" if os.path.isfile(folder) else "does not exist"
        raise DataError(f"the shard folder {folder} {problem}; give a folder that holds tars")
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(
            f"the shard folder {folder} cannot be read ({error.strerror}); allow it"
        ) from error


def _is_folder(location: str) -> bool:
    try:
        return Path(location).is_dir()
    except OSError as error:  # one on the way to it may not be entered
        raise DataError(
            f"{location} cannot be reached ({error.strerror}); allow it, or give another"
        ) from error


def _matches(pattern: str) -> list[str]:
    """Names that a pattern stands for: of braces all, of * those that are there."""
    if not is_url(pattern) and Path(pattern).is_file():
        return [pattern]
    names = expand_braces(pattern)
    found: list[str] = []
    for name in names:
        if not any(sign in name for sign in _MAGIC):
            found.append(name)
        elif is_url(name):
            found += sorted(remote.glob(name))
        else:
            found += sorted(glob.glob(name))
    return found


def _expand(pattern: str) -> list[str]:
    """Shards of a pattern; those listed by braces must exist."""
    names = _matches(pattern)
    shards = [name for name in names if name.endswith(".tar")]
    missing = [name for name in shards if not is_url(name) and not Path(name).is_file()]
    if missing:
        raise DataError(
            f"shard {missing[0]} of the pattern {pattern} does not exist ({len(missing)} of "
            f"{len(shards)} do not); correct the pattern, or restore it"
        )
    if not shards:
        for name in names:
            _refuse_compressed(name)
        raise DataError(f"no shard matches {pattern}; give a pattern of files that end in .tar")
    if len(set(shards)) < len(shards):
        repeated = next(name for name in shards if shards.count(name) > 1)
        raise DataError(f"the pattern {pattern} names {repeated} twice; name every shard once")
    return shards


def _refuse_compressed(name: str) -> None:
    if kind_of_file(name).startswith("compressed"):
        raise DataError(
            f"{name} is compressed; decompress it: samples are found by their places in the file"
        )


def expand_braces(pattern: str) -> list[str]:
    """Names that braces in a pattern stand for. Raises: DataError."""
    try:
        if _most_names(pattern) > _MOST_SHARDS:  # they would all be listed before they are counted
            raise ValueError(f"it names more than {_MOST_SHARDS} shards")
        return list(braceexpand.braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the pattern {shown(pattern)} cannot be read ({error}); close its braces, and name "
            f"the shards that there are"
        ) from error


def _most_names(pattern: str) -> int:
    """Number of names of a pattern, or more where braces are inside of others."""
    count, inside = 1, list[int]()
    for sign in pattern:
        if sign == "{":
            inside.append(1)
        elif inside and sign == ",":
            inside[-1] += 1
        elif inside and sign == "}":
            count *= inside.pop()
    for ends in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
        first, last = map(int, ends)
        count *= abs(last - first) + 1
    return count


def _tars_below(folder: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(folder)}/*/*.tar"))


def _checked(names: list[str], folder: str) -> list[str]:
    if names:
        return names
    for name in [] if is_url(folder) else _names(folder):
        _refuse_compressed(f"{folder}/{name}")
    below = [] if is_url(folder) else _tars_below(folder)
    fix = (
        "pack some with `dist-contrastive shards pack`, or let a folder of images be read as it "
        "is: {name: folder, path: FOLDER}"
    )
    if is_url(folder):
        fix = "its server may not list files: name them, as in train-{00000..00099}.tar"
    if below:
        fix = f"give a folder that does, as {folder_of(below[0])}"
    raise DataError(f"{folder} holds 0 files that end in .tar; {fix}")
