"""Verification of one shard: read whole, and compared with its index."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.shards.encoding import decode_or_explain
from dist_contrastive.data.shards.index import ABSENT, MEMBER_TABLES, ShardIndex, index_command
from dist_contrastive.data.shards.locations import folder_of
from dist_contrastive.data.shards.scan import index_shard
from dist_contrastive.data.shards.storage import BlockCache, ShardFiles, open_shard
from dist_contrastive.data.shards.tars import LINKS, REMEDY_OF_LINKS, member_key, scan_samples
from dist_contrastive.errors import DataError, UnreachableError

MAX_LISTED = 20  # problems of one kind that are listed one by one


class CheckedShard(NamedTuple):
    """Problems of one shard, and 16 bytes of each sample to compare it with other shards."""

    shard: str
    problems: list[str]
    fields: tuple[str, ...]  # of its samples, sorted
    key_hashes: NDArray[np.int64]  # of every sample's key, for this process alone
    offsets: NDArray[np.int64]  # first byte of every sample
    left_out: Counter[str]  # members that belong to no sample, by kind


def check_shard(
    shard: str, indexed: ShardIndex | None, decode: bool, cache: BlockCache
) -> CheckedShard:
    """All problems of a shard, which is read whole.

    Args:
        shard: path or URL.
        indexed: the index of this shard; None: there is nothing to compare with.
        decode: decode every field.
        cache: of remote shards.

    Raises:
        UnreachableError: its server does not answer.
    """
    files = ShardFiles(cache)  # handles are not for several threads
    try:
        fresh = index_shard(shard, files, unique_keys=False)
        keys = map(hash, _keys(fresh))
        hashes = np.fromiter(keys, np.int64, len(fresh))
        problems = [
            *([] if indexed is None else _changes(indexed, fresh)),
            *_keys_held_twice(fresh, hashes),
            *_missing_fields(fresh),
            *_links(fresh),
        ]
        if decode:
            problems += limited(_undecodable(fresh), f"fields of shard {shard} cannot be decoded")
        return CheckedShard(
            shard, problems, fresh.fields, hashes, fresh.sample_offset, fresh.left_out
        )
    except UnreachableError:
        raise
    except DataError as error:
        problems = [str(error)]
        if indexed is not None:
            problems += _losses(indexed, files)
    except OSError as error:
        problems = [f"shard {shard} cannot be read ({error}); restore it from a sound disk"]
    finally:
        files.close()
    none = np.zeros(0, np.int64)
    return CheckedShard(shard, problems, (), none, none, Counter())


def limited(findings: Iterator[str], what: str) -> list[str]:
    """First `MAX_LISTED` findings, and the number of the others."""
    listed = list(islice(findings, MAX_LISTED))
    more = sum(1 for _ in findings)
    return [*listed, f"{more} more {what}"] if more else listed


def key_at(shard: str, offset: int, files: ShardFiles) -> str:
    """Key of the sample that begins at this byte of a shard.

    Raises:
        DataError, UnreachableError: it cannot be read.
    """
    with open_shard(shard, files) as (file, _):
        file.seek(offset)
        return next(scan_samples(file, shard)).key


def _keys(part: ShardIndex) -> Iterator[str]:
    """Keys of all samples of one shard, from the headers of their first members."""
    if not len(part):
        return
    first = part.member_start.argmin(axis=1)[:, None]
    headers = np.take_along_axis(part.member_header, first, axis=1)[:, 0]
    shard, size = part.shards[0], int(part.shard_bytes[0])
    for offset, length in zip(part.sample_offset.tolist(), headers.tolist(), strict=True):
        yield member_key(part.files.read(shard, size, offset, length))


def _changes(indexed: ShardIndex, fresh: ShardIndex) -> Iterator[str]:
    """Differences between a shard and its index."""
    shard = fresh.shards[0]
    then, now = ((int(x.shard_bytes[0]), x.shard_sha256[0]) for x in (indexed, fresh))
    if then != now:
        yield _change(indexed, f"{now[0]} bytes with sha256 {now[1]}", fresh.files, now[0])
    elif not _is_same(indexed, fresh):
        yield (
            f"the index tells other samples of shard {shard} than its tar holds, though the "
            f"sha256 is right: the index is damaged; run `{_command(shard)} --full`"
        )


def _losses(indexed: ShardIndex, files: ShardFiles) -> Iterator[str]:
    """Samples that are lost where a shard is not a whole tar."""
    shard, then = indexed.shards[0], int(indexed.shard_bytes[0])
    try:
        with open_shard(shard, files) as (_, now):
            pass
    except UnreachableError:
        raise
    except DataError:  # it is not there at all
        return
    yield _change(indexed, f"{now} bytes" if now != then else "other bytes", files, now)


def _change(indexed: ShardIndex, now: str, files: ShardFiles, size: int) -> str:
    shard, then = indexed.shards[0], int(indexed.shard_bytes[0])
    # Of the size that it has now, lest a server be asked for bytes beyond its end.
    part = replace(indexed, shard_bytes=np.array([size], np.int64), files=files)
    lost = [number for number in range(len(part)) if not _is_readable(part, number)]
    what = f"all of its {len(part)} indexed samples can be read by the index"
    if lost:
        what = (
            f"{len(lost)} of its {len(part)} indexed samples cannot be read by the index, the "
            f"first is number {lost[0]}"
        )
    return (
        f"shard {shard} is not as it was indexed: it has {now}, indexed were {then} bytes with "
        f"sha256 {indexed.shard_sha256[0]}; {what}; restore it, or run `{_command(shard)}` if it "
        f"was changed on purpose"
    )


def _is_readable(part: ShardIndex, number: int) -> bool:
    if part.sample_offset[number] >= part.shard_bytes[0]:
        return False
    try:
        part.read_contents(number)
    except UnreachableError:
        raise
    except DataError:
        return False
    return True


def _is_same(indexed: ShardIndex, fresh: ShardIndex) -> bool:
    """Equality of two indexes of a shard, up to fields of other shards."""
    if not np.array_equal(indexed.sample_offset, fresh.sample_offset):
        return False
    if len(indexed.sample_key) and not np.array_equal(indexed.sample_key, fresh.sample_key):
        return False
    used = np.flatnonzero((indexed.member_start != ABSENT).any(axis=0))
    return tuple(indexed.fields[i] for i in used) == fresh.fields and all(
        np.array_equal(getattr(indexed, name)[:, used], getattr(fresh, name))
        for name in MEMBER_TABLES
    )


def _keys_held_twice(part: ShardIndex, hashes: NDArray[np.int64]) -> Iterator[str]:
    order = hashes.argsort(kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not len(again):
        return
    shard, first = part.shards[0], again[order[again + 1].argmin()]
    places = [int(part.sample_offset[row]) for row in order[first : first + 2]]
    key = key_at(shard, places[0], part.files)
    more = f" ({len(again)} samples have the key of an earlier one)" if len(again) > 1 else ""
    yield (
        f"shard {shard} holds the key {key!r} twice, at byte {places[0]} and again at byte "
        f"{places[1]}{more}; give every sample one key and keep its members together "
        "(`tar --sort=name`)"
    )


def _missing_fields(part: ShardIndex) -> Iterator[str]:
    """Fields that some of the samples of a shard have, and others lack."""
    lacking = part.member_start == ABSENT
    for column, count in enumerate(lacking.sum(axis=0).tolist()):
        if count:
            shard, row = part.shards[0], int(lacking[:, column].argmax())
            key = key_at(shard, int(part.sample_offset[row]), part.files)
            yield (
                f"{count} of {len(part)} samples of shard {shard} have no field "
                f"{part.fields[column]!r}, the first is {key!r}; pack them with one, or leave "
                f"them out"
            )


def _links(part: ShardIndex) -> Iterator[str]:
    if count := part.left_out[LINKS]:
        yield (
            f"shard {part.shards[0]} holds {count} links to other files, which are not read: "
            f"{REMEDY_OF_LINKS}"
        )


def _undecodable(part: ShardIndex) -> Iterator[str]:
    shard = part.shards[0]
    for number in range(len(part)):
        try:
            contents = part.read_contents(number)
        except UnreachableError:
            raise
        except DataError as error:  # it changes while it is read
            yield str(error)
            continue
        key = contents.pop("__key__")
        for name, value in contents.items():
            try:
                decode_or_explain(name, value, key, shard)
            except DataError as error:
                yield str(error)


def _command(shard: str) -> str:
    return index_command(folder_of(shard))
