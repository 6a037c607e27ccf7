"""Verification of shards: each read whole, and compared with its index and with the others.

A stream reads by the index, trusts it, and meets damage only where it reads.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dist_contrastive.data.progress import map_in_threads
from dist_contrastive.data.shards import remote
from dist_contrastive.data.shards.index import ShardIndex, index_command
from dist_contrastive.data.shards.index_file import parse_index
from dist_contrastive.data.shards.indexing import Progress
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    counted,
    expand_braces,
    find_shards,
    folder_of,
    is_pattern,
    other_files,
)
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.shards.shard_check import (
    CheckedShard,
    check_shard,
    key_at,
    limited,
)
from dist_contrastive.data.shards.storage import BlockCache, ShardFiles, temporary_cache
from dist_contrastive.errors import DataError, UnreachableError, UnreadableSample


@dataclass(frozen=True)
class Verification:
    """Result of `verify_shards`.

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
    cache: BlockCache.Config | None = None,
    progress: Progress = lambda items, _: items,
) -> Verification:
    """All problems of shards, which are read whole.

    Compared with the index: which tars there are, their sizes, checksums, and where every field
    lies. Without it too: whether each is a tar from one end to the other, keys that a shard holds
    twice, fields that some samples or shards lack.

    Args:
        location: a folder, an index file, a pattern of shards, or a URL of one.
        decode: decode every field.
        cache: of remote shards; None: a temporary one, so that nothing kept from earlier is taken
            for what the server holds.
        progress: wraps the iterator over shards.

    Raises:
        DataError: no such folder or index file; no shards.
        UnreachableError: a server does not answer.
    """
    location = str(location) if is_url(str(location)) else str(Path(location))
    with temporary_cache() if cache is None else nullcontext(cache) as settings:
        blocks = BlockCache(settings)
        files = ShardFiles(blocks)
        plan = _plan(location, files)
        checked = list(progress(_check_all(plan, decode, blocks), len(plan.shards)))
        problems = [*plan.problems, *(problem for check in checked for problem in check.problems)]
        problems += _other_fields(checked)
        samples = sum(len(check.offsets) for check in checked)
        if not samples and not problems:
            problems.append(
                f"the {len(checked)} shards of {location} hold 0 samples; write tars whose members "
                f"are named KEY.EXTENSION"
            )
        left_out = sum((check.left_out for check in checked), other_files(location))
        notes = [*plan.notes, *_empty(checked), *_shared_keys(checked, files)]
        notes += [f"{counted(left_out)} belong to no sample"] if left_out else []
    return Verification(
        tuple(problems), tuple(notes), len(checked), samples, tuple(plan.index_files)
    )


# ---------------------------------------------------------------------------- what there is


@dataclass
class _Plan:
    """Shards to be checked, their indexes, and problems of the indexes."""

    shards: list[str] = field(default_factory=list)
    indexed: dict[str, tuple[ShardIndex, int]] = field(default_factory=dict)
    index_files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def part(self, shard: str) -> ShardIndex | None:
        """Index of one shard, if there is one."""
        if shard not in self.indexed:
            return None
        index, number = self.indexed[shard]
        return index.select([number])


def _plan(location: str, files: ShardFiles) -> _Plan:
    plan, is_file = _Plan(), location.endswith(".npz")
    if is_pattern(location):
        plan.shards = _named(location)
        for folder in dict.fromkeys(folder_of(shard) for shard in plan.shards):
            _add_index(plan, f"{folder}/{INDEX_NAME}", files)
        _find_new(plan, plan.shards)
        return plan
    folder = folder_of(location) if is_file else location.rstrip("/")
    file = location if is_file else f"{folder}/{INDEX_NAME}"
    has_index = _add_index(plan, file, files)
    if is_file and not has_index and not plan.problems:
        raise DataError(f"the index {file} does not exist; give a folder, or an index that does")
    listed = _listed(folder, plan) if file.rpartition("/")[2] == INDEX_NAME else []
    if all(_plain(folder_of(shard)) == folder for shard in plan.indexed):
        _find_new(plan, listed)
    plan.shards = sorted({*listed, *plan.indexed})
    return plan


def _named(pattern: str) -> list[str]:
    """Shards that a pattern names, also if some of them are not there."""
    if not is_url(pattern) and not any(sign in pattern for sign in "*?["):
        with suppress(DataError):  # braces that are not closed: `find_shards` refuses them
            names = [x for x in expand_braces(pattern) if x.endswith(".tar")]
            if 0 < sum(Path(name).is_file() for name in names) < len(names):
                return list(dict.fromkeys(names))
    return find_shards(pattern)


def _listed(folder: str, plan: _Plan) -> list[str]:
    """Tars of a folder; none where an index names some."""
    try:
        return find_shards(folder)
    except UnreachableError:
        raise
    except DataError:
        if not plan.indexed:
            raise
        if is_url(folder):
            plan.notes.append(
                f"the server of {folder} lists no tars: whether it has some that are not in the "
                f"index is not known"
            )
        return []


def _add_index(plan: _Plan, file: str, files: ShardFiles) -> bool:
    """Whether an index file is there and sound, and has been added."""
    try:
        data = remote.read_all(file) if is_url(file) else Path(file).read_bytes()
    except (UnreadableSample, FileNotFoundError, NotADirectoryError):
        plan.notes.append(
            f"{folder_of(file)} has no {INDEX_NAME}: sizes, checksums and which tars there are "
            f"could not be compared"
        )
        return False
    except OSError as error:
        plan.problems.append(f"the index {file} cannot be read ({error.strerror}); restore it")
        return False
    try:
        index = parse_index(data, file, files)
    except DataError as error:
        plan.problems.append(str(error))
        return False
    plan.index_files.append(file)
    plan.indexed |= {_plain(shard): (index, i) for i, shard in enumerate(index.shards)}
    return True


def _find_new(plan: _Plan, shards: Sequence[str]) -> None:
    indexed_folders = {_plain(folder_of(file)) for file in plan.index_files}
    for shard in shards:
        folder = folder_of(shard)
        is_there = is_url(shard) or Path(shard).exists()  # otherwise reading it fails
        if is_there and shard not in plan.indexed and _plain(folder) in indexed_folders:
            plan.problems.append(
                f"shard {shard} is not in the index of its folder; run `{index_command(folder)}`"
            )


def _plain(name: str) -> str:
    return name if is_url(name) else str(Path(name))


# ---------------------------------------------------------------------------- shards together


def _check_all(plan: _Plan, decode: bool, blocks: BlockCache) -> Iterator[CheckedShard]:
    return map_in_threads(
        lambda shard: check_shard(shard, plan.part(shard), decode, blocks), plan.shards
    )


def _other_fields(checked: Sequence[CheckedShard]) -> Iterator[str]:
    """Shards whose samples have other fields than those of most shards."""
    usual = Counter(check.fields for check in checked if check.fields).most_common(1)
    for check in checked:
        if check.fields and check.fields != usual[0][0]:
            fields, count = usual[0]
            lacking, new = sorted({*fields} - {*check.fields}), sorted({*check.fields} - {*fields})
            lacks = f"lack {', '.join(map(repr, lacking))}" if lacking else ""
            has = f"have {', '.join(map(repr, new))} besides" if new else ""
            yield (
                f"shard {check.shard} has other fields than the rest: its samples "
                f"{' and '.join(filter(None, (lacks, has)))}, unlike those of {count} of "
                f"{len(checked)} shards; pack all shards alike, or leave it out"
            )


def _empty(checked: Sequence[CheckedShard]) -> Iterator[str]:
    for check in checked:
        if not check.problems and not len(check.offsets):
            yield f"shard {check.shard} holds no samples"


def _shared_keys(checked: Sequence[CheckedShard], files: ShardFiles) -> list[str]:
    """Keys that several shards hold; of every pair of shards the first."""
    hashes = np.concatenate([check.key_hashes for check in checked])
    owners = np.repeat(np.arange(len(checked)), [len(check.offsets) for check in checked])
    order = hashes.argsort(kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    rows = np.stack([order[again], order[again + 1]], axis=1)
    rows = rows[owners[rows[:, 0]] != owners[rows[:, 1]]]
    rows = rows[np.lexsort((rows[:, 0], owners[rows[:, 1]], owners[rows[:, 0]]))]
    _, first, counts = np.unique(owners[rows], axis=0, return_index=True, return_counts=True)
    offsets = np.concatenate([check.offsets for check in checked])

    def sentences() -> Iterator[str]:
        for pair, count in zip(rows[first].tolist(), counts.tolist(), strict=True):
            names = [checked[owners[row]].shard for row in pair]
            keys = [
                key_at(name, offsets[row], files) for name, row in zip(names, pair, strict=True)
            ]
            if keys[0] == keys[1]:  # not only their hashes, which of 10^8 keys hardly ever happens
                more = f" and {count - 1} more keys" if count > 1 else ""
                yield f"shards {names[0]} and {names[1]} both hold the key {keys[0]!r}{more}"

    return limited(sentences(), "pairs of shards hold the same keys")
