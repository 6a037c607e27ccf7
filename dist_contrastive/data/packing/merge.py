"""Several shards as fewer, larger ones: contents are copied, nothing is decoded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_contrastive.data.labels import refuse_other_classes
from dist_contrastive.data.packing.options import PackOptions, check_target
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.data.progress import progress_bar
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.locations import (
    INDEX_NAME,
    find_shards,
    folder_of,
    other_files,
)
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.shards.scan import index_shard
from dist_contrastive.data.shards.storage import BlockCache, ShardFiles, open_shard
from dist_contrastive.data.shards.tars import scan_samples
from dist_contrastive.errors import DataError


def merge_shards(
    locations: Sequence[Path | str],
    folder: Path | str,
    options: PackOptions | None = None,
    *,
    prefix_keys: bool = False,
) -> Packed:
    """Samples of several shards, in their order, as shards of another size.

    Keys, fields and contents stay; times and owners in the tars do not. Where a folder has
    an index, what is read is compared with it.

    Args:
        locations: folders, shards, patterns such as `data/train-{000..099}.tar`, or URLs of these.
        folder: another one.
        options: of which only `name`, `bounds` and `overwrite` matter.
        prefix_keys: a key becomes SHARD/KEY, or FOLDER/SHARD/KEY if two shards have one name.

    Raises:
        ConfigError: as `check_target`.
        DataError: as `pack_samples`; no shards, one that is damaged or given twice, one that lies
            in the folder to be written, a key that is in two shards, or a number that stands for
            two classes.
    """
    check_target(folder, options or PackOptions())
    shards = [shard for location in locations for shard in find_shards(str(location))]
    _check_shards(shards, Path(folder).resolve())
    prefixes = _prefixes(shards) if prefix_keys else dict.fromkeys(shards, "")
    files = ShardFiles(BlockCache())
    total = _check_keys(shards, prefixes, files)
    known = {place: _indexes(place) for place in dict.fromkeys(map(folder_of, shards))}
    parts = [part for indexes in known.values() for part in indexes.values()]
    refuse_other_classes("cls", parts)
    classes = {number: name for part in parts for number, name in part.classes.items()}
    left_out = sum(map(other_files, map(str, locations)), Counter[str]())
    samples = _samples(shards, prefixes, known, files, left_out)
    packed = pack_samples(samples, lambda sample: sample, folder, options, total, classes)
    return replace(packed, not_packed=left_out)


def _check_shards(shards: Sequence[str], folder: Path) -> None:
    counts = Counter(shard if is_url(shard) else str(Path(shard).resolve()) for shard in shards)
    for shard, count in counts.items():
        if count > 1:
            raise DataError(f"the shard {shard} is given {count} times; name every shard once")
        if not is_url(shard) and Path(shard).parent == folder:
            raise DataError(
                f"the shard {shard} lies in {folder}, which would be replaced; give another folder"
            )


def _prefixes(shards: Sequence[str]) -> dict[str, str]:
    names = {shard: Path(shard).stem for shard in shards}
    if len(set(names.values())) < len(names):
        names = {shard: f"{Path(shard).parent.name}/{name}" for shard, name in names.items()}
    return {shard: f"{name}/" for shard, name in names.items()}


def _check_keys(shards: Sequence[str], prefixes: dict[str, str], files: ShardFiles) -> int:
    """Number of samples, whose keys must all differ."""
    seen: set[str] = set()
    for shard in progress_bar(shards, len(shards), "reading keys"):
        for key in _keys(shard, files):
            if prefixes[shard] + key in seen:
                first = _first_with(prefixes[shard] + key, shards, prefixes, files)
                raise DataError(
                    f"the key {key!r} is in {first} and in {shard}; leave one of them out, or put "
                    f"the shards' names before all keys with --prefix-keys"
                )
            seen.add(prefixes[shard] + key)
    return len(seen)


def _keys(shard: str, files: ShardFiles) -> Iterator[str]:
    with open_shard(shard, files) as (file, _):
        for sample in scan_samples(file, shard):
            yield sample.key


def _first_with(
    key: str, shards: Sequence[str], prefixes: dict[str, str], files: ShardFiles
) -> str:
    return next(
        shard for shard in shards if any(prefixes[shard] + k == key for k in _keys(shard, files))
    )


def _samples(
    shards: Sequence[str],
    prefixes: dict[str, str],
    known: dict[str, dict[str, ShardIndex]],
    files: ShardFiles,
    left_out: Counter[str],
) -> Iterator[dict[str, Any]]:
    for shard in shards:
        index = known[folder_of(shard)].get(shard.rpartition("/")[2]) or index_shard(shard, files)
        left_out += index.left_out
        for number in range(len(index)):
            sample = index.read_contents(number)
            yield {**sample, "__key__": prefixes[shard] + sample["__key__"]}


def _indexes(folder: str) -> dict[str, ShardIndex]:
    """Index of each shard of a local folder that has one, by the shard's name."""
    if is_url(folder) or not (Path(folder) / INDEX_NAME).is_file():
        return {}
    index = load_index(folder)
    numbers = {n: s for n, s in enumerate(index.shards) if folder_of(s) == str(Path(folder))}
    return {shard.rpartition("/")[2]: index.select([n]) for n, shard in numbers.items()}
