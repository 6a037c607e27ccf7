"""Keys of samples as numbers of 64 bits, and files that name samples by their keys."""

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.errors import DataError

_ROWS = 1 << 16  # that are read at a time
_LOOKED_UP = 1 << 20  # samples at a time
_SHOWN = 3  # keys in a message
_WORD = 8  # bytes
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KINDS = ".txt, .csv, .parquet, .npy"

Numbers = NDArray[Any]
"""Sample numbers of a source, ascending, of 4 bytes or 8."""


def key_hashes(keys: Sequence[str | bytes]) -> NDArray[np.uint64]:
    """A number for each key, [n], the same for ever: an index stores them.

    It is ``keyed_random.combine(length, word 0, word 1, ...)``, where the words are the bytes of
    the key in UTF-8, 8 at a time, the first the lowest, with zeros behind the last. Of 10^8 keys
    two have the same number with a probability of 3e-4.
    """
    encoded = [x if isinstance(x, bytes) else x.encode("utf-8", "surrogateescape") for x in keys]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    counts = -(-lengths // _WORD)
    hashes = np.zeros(len(encoded), np.uint64)
    for count in np.unique(counts).tolist():
        rows = np.flatnonzero(counts == count)
        padded = np.array([encoded[row] for row in rows], f"S{max(count, 1) * _WORD}")
        words = padded.view("<u8").reshape(len(rows), -1)
        found = _with(np.zeros(len(rows), np.uint64), lengths[rows].astype(np.uint64))
        for place in range(count):
            found = _with(found, words[:, place])
        hashes[rows] = found
    return hashes


# Not by torch: its threads, which wait for each other on a busy machine, take 20 times as long.
def _with(key: NDArray[np.uint64], part: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A key with one more part, as `combine` has it."""
    return _finalise((key ^ _finalise(part + _GOLDEN)) + _GOLDEN)


def _finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Named(NamedTuple):
    """Samples that a file names, some rows of it."""

    keys: list[str | bytes]
    scores: NDArray[np.float64] | None  # of each, NaN where there is none


def read_named(path: Path, column: str, score: str | None = None) -> Iterator[Named]:
    """Keys in a file, and their scores, some at a time.

    Args:
        path: .txt: a key a line; .csv and .parquet: columns by their names; .npy: an array of
            texts, or of pairs of whole numbers of 64 bits, which are the halves of a key of 32
            hexadecimal digits, as DataComp writes them.
        column: that of the keys. score: that of the scores; None without.

    Raises:
        DataError: it cannot be read, or has no such columns.
    """
    kinds = {".txt": _lines, ".csv": _cells, ".parquet": _parquet, ".npy": _array}
    read = kinds.get(path.suffix.lower())
    if read is None or (score is not None and read in (_lines, _array)):
        wanted = _KINDS if score is None else ".csv, .parquet"
        raise DataError(f"the file {path} is of no kind that is read here; give {wanted}")
    try:
        yield from read(path, column, score)
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's are of these
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the file {path} cannot be read ({reason}); give {_KINDS}") from error


def _lines(path: Path, _: str, __: str | None) -> Iterator[Named]:
    with path.open("rb") as file:
        while lines := list(islice(file, _ROWS)):
            keys = (line.strip(b"\r\n") for line in lines)
            yield Named([key for key in keys if key], None)


def _cells(path: Path, column: str, score: str | None) -> Iterator[Named]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        _check_columns(path, rows.fieldnames or (), column, score)
        while part := list(islice(rows, _ROWS)):
            scores = None if score is None else _numbers(row[score] or None for row in part)
            yield Named([row[column] or "" for row in part], scores)


def _parquet(path: Path, column: str, score: str | None) -> Iterator[Named]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names, column, score)
        columns = [column] if score is None else [column, score]
        for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
            held = batch.column(column).to_pylist()
            keys = [key if isinstance(key, str | bytes) else str(key) for key in held]
            scores = None if score is None else _numbers(batch.column(score).to_pylist())
            yield Named(keys, scores)


def _array(path: Path, _: str, __: str | None) -> Iterator[Named]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    halves = array.dtype.names or ()
    are_pairs = len(halves) == 2 and all(array.dtype[name].kind == "u" for name in halves)
    if array.ndim != 1 or not (are_pairs or array.dtype.kind in "SU"):
        raise DataError(
            f"the file {path} holds {array.dtype} {list(array.shape)}; give an array of texts, or "
            f"of pairs of uint64"
        )
    for first in range(0, len(array), _ROWS):
        part = array[first : first + _ROWS].tolist()
        yield Named([f"{one[0]:016x}{one[1]:016x}" if are_pairs else one for one in part], None)


def _numbers(values: Any) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else float(value) for value in values], np.float64)


def _check_columns(path: Path, names: Sequence[str], column: str, score: str | None) -> None:
    for name in (column, score):
        if name is not None and name not in names:
            raise DataError(
                f"the file {path} has no column {name!r}; name one of {', '.join(names)}"
            )


# ---------------------------------------------------------------------------- looked up


class Listed(NamedTuple):
    """What a file names: keys as numbers, ascending, each once."""

    path: Path
    column: str
    hashes: NDArray[np.uint64]
    scores: NDArray[np.float64] | None


def read_listed(path: Path, column: str, score: str | None = None) -> Listed:
    """All that a file names.

    Args: those of `read_named`.

    Raises:
        DataError: as `read_named`; no keys, or one with two scores.
    """
    hashes, scores = [np.zeros(0, np.uint64)], [np.zeros(0, np.float64)]
    for part in read_named(path, column, score):
        hashes.append(key_hashes(part.keys))
        if part.scores is not None:
            scores.append(part.scores)
    joined = np.concatenate(hashes)
    if not len(joined):
        raise DataError(f"the file {path} names no keys; give some, or leave it out")
    if score is None:
        return Listed(path, column, np.unique(joined), None)
    order, values = joined.argsort(kind="stable"), np.concatenate(scores)
    joined, values = joined[order], values[order]
    is_again = joined[1:] == joined[:-1]
    if count := int((is_again & (values[1:] != values[:-1])).sum()):
        raise DataError(
            f"the file {path} gives {count} keys again with another score; give each key one"
        )
    first = np.concatenate([[True], ~is_again])
    return Listed(path, column, joined[first], values[first])


def number_type(samples: int) -> Any:
    """Type of sample numbers, of 4 bytes or 8."""
    return np.uint32 if samples < 2**32 else np.int64


def look_up(
    hashes: NDArray[np.uint64], listed: Listed, max_unknown: int
) -> tuple[Numbers, NDArray[np.float64]]:
    """Numbers of the samples that a file names, all that have the key, ascending, and their scores.

    Args:
        hashes: [n] of the samples' keys, which may be mapped. max_unknown: as of `Filter`.

    Raises:
        DataError: more than `max_unknown` keys are of no sample.
    """
    is_known, marks = np.zeros(len(listed.hashes), bool), _Marks(listed.hashes)
    numbers, scores = [np.zeros(0, number_type(len(hashes)))], [np.zeros(0, np.float64)]
    for first in range(0, len(hashes), _LOOKED_UP):
        block = hashes[first : first + _LOOKED_UP]
        rows = np.flatnonzero(marks.may_hold(block))
        rows = rows[block[rows].argsort()]  # ascending ones are found many times faster
        place = np.searchsorted(listed.hashes, block[rows]).clip(max=len(listed.hashes) - 1)
        is_found = listed.hashes[place] == block[rows]
        rows, place = rows[is_found], place[is_found]
        is_known[place] = True
        order = rows.argsort()
        numbers.append((first + rows[order]).astype(numbers[0].dtype))
        if listed.scores is not None:
            scores.append(listed.scores[place[order]])
    unknown = len(is_known) - int(is_known.sum())
    if unknown > max_unknown:
        names = _names_of(listed.hashes[~is_known], listed.path, listed.column)
        raise DataError(
            f"{unknown} of {len(is_known)} keys in {listed.path} are of no sample, as "
            f"{', '.join(map(repr, names))}; correct them, or allow so many: "
            f"filter.max_unknown={unknown}"
        )
    return np.concatenate(numbers), np.concatenate(scores)


class _Marks:
    """A bit for the first bits of each of some numbers: of others, one in eight or less seems to
    be among them. It fits into a processor's cache, where a search among them all does not."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        bits = min(max(len(hashes) - 1, 1).bit_length() + 3, 32)
        self._shift = np.uint64(64 - bits)
        self._bits = np.zeros(1 << (bits - 3), np.uint8)
        byte, bit = self._place(hashes)
        np.bitwise_or.at(self._bits, byte, bit)

    def may_hold(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each may be one of the numbers."""
        byte, bit = self._place(hashes)
        return self._bits[byte] & bit != 0

    def _place(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        first = (hashes >> self._shift).astype(np.int64)
        return first >> 3, np.uint8(1) << (first & 7).astype(np.uint8)


def _names_of(hashes: NDArray[np.uint64], path: Path, column: str) -> list[str]:
    """The first keys in a file that are these numbers."""
    names: list[str] = []
    for part in read_named(path, column):
        for row in np.flatnonzero(np.isin(key_hashes(part.keys), hashes)).tolist():
            key = part.keys[row]
            names.append(key if isinstance(key, str) else key.decode(errors="replace"))
            if len(names) == _SHOWN:
                return names
    return names
