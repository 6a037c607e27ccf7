"""Data sets of two splits, packed whole: written aside, moved into place."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.index_file import load_index
from dist_contrastive.data.shards.indexing import index_folder
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import ConfigError, DataError

_SPLITS = ("train", "test")
_SPLIT_SEED = 0

MakeSplits = Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]]


def pack_splits(
    folder: Path | str, source: str, make_splits: MakeSplits, samples_per_shard: int
) -> dict[str, ShardIndex]:
    """Write FOLDER/train and FOLDER/test as indexed shards, named after their source.

    Args:
        folder: new, empty, or written by an earlier call with this source, which is then replaced.
        source: name of the data set.
        make_splits: gives the samples of "train" and "test", see `write_samples`; called when the
            arguments have been found good.
        samples_per_shard: the last shard of a split may have fewer.

    Returns:
        The indexes by split name, "train" and "test".

    Raises:
        ConfigError: samples_per_shard below 1.
        DataError: the folder holds something else.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard} is below 1; set 1 or more")
    folder = Path(folder).resolve()
    _refuse_foreign_files(folder, source)
    # Written aside and moved into place whole: a crash leaves no half set that loads.
    partial, previous = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{state}") for state in ("partial", "old")
    )
    try:
        splits = make_splits()
        for split in _SPLITS:
            _write_split(partial / split, f"{source}-{split}", splits[split], samples_per_shard)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
    return {split: load_index(folder / split) for split in _SPLITS}


def split_by_class(labels: NDArray[np.int64], test_samples: int) -> dict[str, NDArray[np.int64]]:
    """Shuffled sample numbers of "train" and "test", the classes in equal proportion in both.

    Shares of the test split are rounded by largest remainder, so they sum to `test_samples`.
    """
    shuffled = keyed_permutation(len(labels), _SPLIT_SEED)
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * (test_samples / len(labels))
    wanted = np.floor(share).astype(np.int64)
    largest = np.argsort(wanted - share, kind="stable")[: test_samples - int(wanted.sum())]
    wanted[largest] += 1
    in_test = np.zeros(len(labels), dtype=bool)
    for label, number in zip(classes.tolist(), wanted.tolist(), strict=True):
        in_test[shuffled[labels[shuffled] == label][:number]] = True
    return {"train": shuffled[~in_test[shuffled]], "test": shuffled[in_test[shuffled]]}


def _refuse_foreign_files(folder: Path, source: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new or empty folder to pack into")
    own_file = re.compile(rf"(train|test)/({source}-\1-\d{{5}}\.tar|index\.npz)")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not (name in _SPLITS and path.is_dir()) and not own_file.fullmatch(name):
            raise DataError(
                f"{folder} already holds {name!r}, which packing the {source} did not write; "
                "give a new or empty folder"
            )


def _write_split(
    folder: Path, name: str, samples: Iterable[Mapping[str, Any]], samples_per_shard: int
) -> None:
    folder.mkdir(parents=True)
    left = iter(samples)
    for shard in count():
        if not (chosen := list(islice(left, samples_per_shard))):
            break
        write_samples(folder / f"{name}-{shard:05d}.tar", chosen)
    index_folder(folder)
