"""Scikit-learn's handwritten digits as a data set: images, captions, profiles, labels, slants."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.packing.splits import pack_splits, split_by_class
from dist_contrastive.data.shards.index import ShardIndex

_TEST_SAMPLES = 360
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_Samples = Iterator[dict[str, Any]]


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

    Args, returns and raises: see `pack_splits`; 180 samples a shard make 8 of train and 2 of test.
    """
    return pack_splits(folder, "digits", _splits, samples_per_shard)


def _splits() -> dict[str, _Samples]:
    # Imported late: it takes a second that only packing needs.
    from sklearn.datasets import load_digits

    digits = load_digits()
    values, labels = np.asarray(digits.images), np.asarray(digits.target)
    numbers = split_by_class(labels, _TEST_SAMPLES)
    return {split: _samples(values, labels, chosen) for split, chosen in numbers.items()}


def _samples(
    values: NDArray[np.float64], labels: NDArray[np.int64], numbers: NDArray[np.int64]
) -> _Samples:
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
