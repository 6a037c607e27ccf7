"""Data sets of two splits, packed whole: written aside, moved into place."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.packing.aside import refuse_foreign_files, written_aside
from dist_contrastive.data.packing.writer import ShardBounds, encoded, made, write_shards
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import index_folder, load_index

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
    bounds = ShardBounds(samples_per_shard, mib=None)
    folder = Path(folder).resolve()
    own = rf"(train|test)/({re.escape(source)}-\1-\d{{5}}\.tar|index\.npz)?"
    refuse_foreign_files(folder, own, f"packing the {source}")
    with written_aside(folder) as aside:
        splits = make_splits()
        for split in _SPLITS:
            (aside / split).mkdir()
            with closing(made(splits[split], encoded, os.cpu_count() or 1)) as samples:
                write_shards(samples, aside / split, f"{source}-{split}", bounds)
            index_folder(aside / split)
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
