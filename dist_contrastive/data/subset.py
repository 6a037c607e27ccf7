"""Subset of a source: the samples that a filter takes, by their numbers, without other shards.

The numbers are in a file that all processes of a machine map, 4 bytes for each sample taken.
"""

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dist_contrastive import atomic
from dist_contrastive.data.filters import Filter
from dist_contrastive.data.keys import Numbers, key_hashes, look_up, number_type, read_listed
from dist_contrastive.data.places import ABSENT, inside, place_of_label
from dist_contrastive.data.shards.index import ShardIndex, index_command
from dist_contrastive.data.shards.locations import folder_of
from dist_contrastive.data.shards.storage import BlockCache
from dist_contrastive.data.source import Source
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample
from dist_contrastive.malloc import give_back_freed_memory

_logger = logging.getLogger(__name__)
_ROWS = 1 << 20  # samples that are looked up at a time
_KEPT_S = 30 * 86_400  # for which files of numbers that nobody uses stay
_NO_KEY = "\0"  # in the place of one that cannot be read


class Subset(Source):
    """Some samples of a source, in its order and its parts, numbered anew.

    Batches are those of shards with these samples alone: an epoch has each of them once.

    Args:
        numbers: of the samples in the source, ascending.

    Raises:
        DataError: numbers that are not ascending, or of no sample.
    """

    def __init__(self, source: Source, numbers: Numbers) -> None:
        is_ascending = all(
            (part[1:] > part[:-1]).all()
            for part in (numbers[n : n + _ROWS + 1] for n in range(0, len(numbers), _ROWS))
        )
        if not is_ascending or (len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(source)):
            raise DataError(
                f"a subset is of different samples 0..{len(source) - 1} in their order; sort them, "
                f"and name each once"
            )
        self.source, self.numbers = source, numbers
        self.fields, self.shards, self.classes = source.fields, source.shards, source.classes
        self.shard_samples = np.diff(np.searchsorted(numbers, source.shard_starts))

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Sample of the source."""
        return self.source.read(self._number(sample_number), only)

    def key(self, sample_number: int) -> str | None:
        """Key of the sample in the source."""
        return self.source.key(self._number(sample_number))

    def has_field(self, name: str) -> bool:
        """Whether samples of the source have it."""
        return self.source.has_field(name)

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Numbers of the samples taken without a field, where that is known."""
        lacking = self.source.lacking(name)
        place = np.searchsorted(self.numbers, lacking).clip(max=max(len(self) - 1, 0))
        return place[self.numbers[place] == lacking] if len(self) else place[:0]

    def prefetch(self, sample_number: int, only: Collection[str] | None = None) -> None:
        """Announcement to the source."""
        self.source.prefetch(self._number(sample_number), only)

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the source's and of the numbers taken."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(_digest(self.numbers))
        return digest.hexdigest()

    def _number(self, sample_number: int) -> int:
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} is outside 0..{len(self) - 1}")
        return int(self.numbers[sample_number])


def open_subset(source: Source, wanted: Filter, folder: Path | None = None) -> Subset:
    """The samples of a source that a filter takes.

    Args:
        folder: of files of numbers, on a local disk, which processes and runs share: what one has
            found for a filter of shards the others map. None: in the cache of remote shards.

    Raises:
        ConfigError: no sample fulfils the conditions.
        DataError: a file that cannot be read; more than `max_unknown` keys of no sample; an index
            of an older version, without keys.
    """
    folder = folder or BlockCache.Config().folder / "subsets"
    if isinstance(source, ShardIndex):  # its fingerprint is of the whole content
        name = _name_of(source, wanted)
        with _lock(folder, name):  # the others need neither the time nor the memory
            numbers = _mapped(folder, name)
            if numbers is None:
                numbers = _shared(folder, name, find_numbers(source, wanted))
    else:
        found = find_numbers(source, wanted)
        numbers = _shared(folder, _digest(found).hex(), found)
    if not len(numbers):
        raise ConfigError(
            f"none of the {len(source)} samples of {source.shards[0]} is taken by the filter "
            f"{wanted.model_dump(exclude_defaults=True)}; correct it, or leave it out"
        )
    give_back_freed_memory()
    _logger.info("%d of %d samples are taken by the filter", len(numbers), len(source))
    return Subset(source, numbers)


def find_numbers(source: Source, wanted: Filter) -> Numbers:
    """Numbers of the samples that fulfil all conditions. Raises: as `open_subset`."""
    hashes = _hashes(source, wanted) if wanted.keys or wanted.scores else np.zeros(0, np.uint64)
    if wanted.keys is not None:
        listed = read_listed(Path(wanted.keys), wanted.column)
        numbers = look_up(hashes, listed, wanted.max_unknown)[0]
        del listed
    else:
        numbers = np.arange(len(source), dtype=number_type(len(source)))
    if wanted.where is not None:
        numbers = numbers[_fulfil(source, numbers, wanted)]
    if wanted.score is None:
        return numbers
    if wanted.scores is None:
        scores = _stored_scores(source, numbers, wanted.score)
    else:
        listed = read_listed(Path(wanted.scores), wanted.column, wanted.score)
        found, values = look_up(hashes, listed, wanted.max_unknown)
        scores = np.full(len(source), np.nan, np.float64)
        scores[found] = values
        scores = scores[numbers]
    return numbers[_best(scores, wanted)]


# ---------------------------------------------------------------------------- by keys


def _hashes(source: Source, wanted: Filter) -> NDArray[np.uint64]:
    """A number for what files name of each sample."""
    if wanted.key_field is not None:
        everything = range(len(source))
        values = _values(source, everything, wanted.key_field)
        return key_hashes([_NO_KEY if value is None else str(value) for value in values])
    if not isinstance(source, ShardIndex):
        return key_hashes([source.key(number) or _NO_KEY for number in range(len(source))])
    if not source.has_keys:
        raise DataError(
            f"the index of {folder_of(source.shards[0])} is of an older version, which has no "
            f"keys; run `{index_command(folder_of(source.shards[0]))}`"
        )
    return source.sample_key


# ---------------------------------------------------------------------------- by fields


def _values(source: Source, numbers: Iterable[int], place: str) -> Iterator[Any]:
    """What samples hold in a place, as json.width; None where they do not, or are unreadable."""
    field, inner = place_of_label(place)
    if not source.has_field(field):
        raise DataError(
            f"samples have no field {field!r}, by which a filter takes them; name one of "
            f"{', '.join(source.fields)}"
        )
    for number in numbers:
        try:
            value = source.read(int(number), (field,))[field]
        except UnreadableSample:
            yield None
            continue
        value = inside(value, inner) if inner else value
        yield None if value is ABSENT else value


def _fulfil(source: Source, numbers: Numbers, wanted: Filter) -> NDArray[np.bool_]:
    fulfilled = np.ones(len(numbers), bool)
    for place, condition in (wanted.where or {}).items():
        left = np.flatnonzero(fulfilled)
        values = _values(source, numbers[left], place)
        fulfilled[left] = [_is_wanted(value, condition) for value in values]
    return fulfilled


def _is_wanted(value: Any, condition: Any) -> bool:
    if isinstance(condition, dict):
        low, high = condition.get("at_least", -np.inf), condition.get("at_most", np.inf)
        return _is_number(value) and low <= value <= high
    several = condition if isinstance(condition, list | tuple) else [condition]
    return any(
        isinstance(value, bool) == isinstance(one, bool) and bool(value == one) for one in several
    )


def _stored_scores(source: Source, numbers: Numbers, place: str) -> NDArray[np.float64]:
    values = _values(source, numbers, place)
    return np.array([value if _is_number(value) else np.nan for value in values], np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _best(scores: NDArray[np.float64], wanted: Filter) -> NDArray[np.bool_]:
    """Whether each is above the bound, and among the highest fraction."""
    chosen = ~np.isnan(scores)
    if wanted.top is not None:
        count = int(Fraction(repr(wanted.top)) * int(chosen.sum()))
        if count:
            lowest = np.partition(scores[chosen], -count)[-count]
            equal = np.flatnonzero(scores == lowest)
            higher = scores > lowest
            higher[equal[: count - int(higher.sum())]] = True
            chosen = higher
        else:
            chosen[:] = False
    return chosen if wanted.above is None else chosen & (scores > wanted.above)


# ---------------------------------------------------------------------------- shared numbers


def _digest(numbers: Numbers) -> bytes:
    digest = hashlib.sha256()
    for first in range(0, len(numbers), _ROWS):
        digest.update(numbers[first : first + _ROWS].astype(np.int64).tobytes())
    return digest.digest()


def _name_of(source: ShardIndex, wanted: Filter) -> str:
    """Name of the numbers that a filter takes of shards, by the content of all that decides."""
    digest = hashlib.sha256(f"{source.fingerprint} {wanted.model_dump_json()}".encode())
    for name in (wanted.keys, wanted.scores):
        if name is not None:
            try:
                with open(name, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise DataError(
                    f"the file {name}, which names samples, cannot be read ({error.strerror}); "
                    f"give one that can"
                ) from error
    return digest.hexdigest()


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Lock among the processes that want the same numbers, where the folder allows one."""
    lock = FileLock(folder / f"{name}.lock", is_singleton=False)
    with suppress(OSError, NotImplementedError):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _mapped(folder: Path, name: str) -> Numbers | None:
    """Numbers that were stored under a name, mapped; None if there are none, or damaged ones."""
    path = folder / f"{name}.npy"
    with suppress(OSError, ValueError):
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        os.utime(path)
        if numbers.ndim == 1 and numbers.dtype.kind in "iu":
            return np.asarray(numbers)  # a plain view, which is read several times faster
    return None


def _shared(folder: Path, name: str, numbers: Numbers) -> Numbers:
    """The same numbers, mapped from a file where that can be written."""
    if (mapped := _mapped(folder, name)) is not None:
        return mapped
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.open_file(folder / f"{name}.npy") as file:
            np.save(file, numbers)
        now_s = (folder / f"{name}.npy").stat().st_mtime  # by the clock of the other files
        for path in (*folder.glob("*.npy"), *folder.glob("*.lock")):
            if now_s - path.stat().st_mtime > _KEPT_S:
                path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning(
            "%s cannot be written (%s): each process holds the %d numbers of its subset itself; "
            "set data.cache.folder",
            *(folder, error.strerror, len(numbers)),
        )
        return numbers
    mapped = _mapped(folder, name)
    return numbers if mapped is None else mapped  # none can be mapped of a file without any
