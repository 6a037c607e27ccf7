"""Folders of shards made ready for the stream: packing real data, indexing any tars."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.index import ShardIndex
from dist_contrastive.data.order import keyed_permutation
from dist_contrastive.data.samples import write_samples
from dist_contrastive.errors import ConfigError, DataError

_SPLIT_SEED = 0
_TEST_SAMPLES = 360
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_OWN_FILE = re.compile(r"(train|test)/(digits-\1-\d{5}\.tar|index\.npz)")


def index_folder(folder: Path | str) -> ShardIndex:
    """Index the tars of a folder, whoever wrote them, and save the index beside them.

    Raises:
        DataError: see `ShardIndex.build`.
    """
    index = ShardIndex.build(folder)
    index.save()
    return index


def pack_digits(folder: Path | str, samples_per_shard: int = 180) -> dict[str, ShardIndex]:
    """Pack scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, ten classes.

    Writes FOLDER/train (1437 samples) and FOLDER/test (360), split by class in a fixed way,
    shuffled once so that every shard mixes the classes, and indexed. Packing twice gives the same
    bytes. With v in 0..16 an original value, the ink of its pixel, a sample has

        png   8-bit gray, round(v 255 / 16)
        txt   the caption: "a handwritten seven"
        npy   float32 [16], the projection profile: mean of v / 16 over each of the 8 rows, from the
              top, then over each of the 8 columns, from the left
        json  "label": 0..9
              "index": place in the original set
              "slant": mu11 / mu02 of the ink's central second moments, x to the right and y down,
              rounded to 4 digits: pixels that the stroke moves to the right for each pixel down,
              so that it is negative for one that leans to the right, as a slash

    Args:
        folder: new, empty, or written by an earlier call, which is then replaced.
        samples_per_shard: 180 gives 8 shards of train and 2 of test.

    Returns:
        The indexes by split name, "train" and "test".

    Raises:
        ConfigError: samples_per_shard below 1.
        DataError: the folder holds something else.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard} is below 1; set 1 or more")
    folder = Path(folder).resolve()
    _refuse_foreign_files(folder)
    # Written aside and moved into place whole: a crash leaves no half set that loads.
    partial, previous = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{state}") for state in ("partial", "old")
    )
    try:
        _write_digits(partial, samples_per_shard)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
    return {split: ShardIndex.load(folder / split) for split in ("train", "test")}


def _refuse_foreign_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new or empty folder to pack into")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not (name in ("train", "test") and path.is_dir()) and not _OWN_FILE.fullmatch(name):
            raise DataError(
                f"{folder} already holds {name!r}, which packing the digits did not write; "
                "give a new or empty folder"
            )


def _write_digits(folder: Path, samples_per_shard: int) -> None:
    # Imported late: it takes a second that only packing needs.
    from sklearn.datasets import load_digits

    digits = load_digits()
    values, labels = np.asarray(digits.images), np.asarray(digits.target)
    for split, numbers in split_by_class(labels, _TEST_SAMPLES).items():
        (folder / split).mkdir(parents=True)
        for shard, start in enumerate(range(0, len(numbers), samples_per_shard)):
            chosen = numbers[start : start + samples_per_shard]
            path = folder / split / f"digits-{split}-{shard:05d}.tar"
            write_samples(path, _digit_samples(values, labels, chosen))
        index_folder(folder / split)


def _digit_samples(
    values: NDArray[np.float64], labels: NDArray[np.int64], numbers: NDArray[np.int64]
) -> Iterator[dict[str, Any]]:
    for number in numbers.tolist():
        ink, label = values[number], int(labels[number])
        profile = np.concatenate([ink.mean(axis=1), ink.mean(axis=0)]) / 16
        yield {
            "__key__": f"digit-{number:04d}",
            "png": np.rint(ink * (255 / 16)).astype(np.uint8)[None],
            "txt": f"a handwritten {_NAMES[label]}",
            "npy": profile.astype(np.float32),
            "json": {"label": label, "index": number, "slant": _slant(ink)},
        }


def _slant(ink: NDArray[np.float64]) -> float:
    """mu11 / mu02 of ink [rows, columns]: the slope of x over y, in the mean of the ink."""
    y, x = np.indices(ink.shape)
    x, y = (axis - (axis * ink).sum() / ink.sum() for axis in (x, y))
    return round(float((x * y * ink).sum() / (y * y * ink).sum()), 4)


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
    for label, count in zip(classes.tolist(), wanted.tolist(), strict=True):
        in_test[shuffled[labels[shuffled] == label][:count]] = True
    return {"train": shuffled[~in_test[shuffled]], "test": shuffled[in_test[shuffled]]}
