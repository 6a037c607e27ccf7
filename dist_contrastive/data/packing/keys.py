"""Keys of samples: made from paths and numbers, checked, and found if given twice."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np

from dist_contrastive.errors import DataError

_META = re.compile(r"__[^/]*__/")  # in front of members that webdataset skips
_NAME_BYTES, _FOLDERS_BYTES = 100, 155  # that a plain tar header takes of a name
_LONGEST_FIELD = 24  # bytes that keys made from paths leave free for a field's name
_BATCH = 1 << 16  # new keys that are looked up one by one before they are sorted in


def numbered_key(number: int) -> str:
    """The key of a sample that has only its place in a table, counted from 0."""
    return f"{number:09d}"


def key_of_path(path: str) -> str:
    """The key of a file: its path in the data set without the extension.

    Dots of the file's name become underscores: what follows the first of them would be read as the
    name of a field. A path that is too long for a plain tar header is cut, and ends in a digest.
    """
    whole = PurePosixPath(path)
    name = whole.stem.replace(".", "_")
    key = str(whole.parent / name)
    if _fits(f"{key}.{'x' * _LONGEST_FIELD}") and not _META.match(key):
        return key
    digest = hashlib.blake2b(_bytes(path), digest_size=8).hexdigest()
    return f"{_bytes(name)[:40].decode(errors='ignore')}-{digest}"


def check_key(key: str, fields: Iterable[str]) -> None:
    """Refuse a key from which tars cannot tell the fields.

    Raises:
        DataError: its last part is empty or holds a dot, webdataset skips it, or it is too long.
    """
    last = key.rpartition("/")[2]
    if not last or "." in last:
        raise DataError(
            f"the key {key!r} {'holds a dot in' if last else 'lacks'} its last part, and a field's "
            f"name begins at the first dot there; give KEY or FOLDER/KEY without dots in KEY"
        )
    if _META.match(key):
        raise DataError(
            f"the key {key!r} begins with a folder named __...__, which webdataset skips; rename it"
        )
    for field in fields:
        if not _fits(f"{key}.{field}"):
            raise DataError(
                f"the key {key!r} with the field {field!r} is too long for a plain tar header; "
                f"keep KEY.FIELD within {_NAME_BYTES} bytes, and folders before it within "
                f"{_FOLDERS_BYTES}"
            )


def _fits(name: str) -> bool:
    data = _bytes(name)
    if len(data) <= _NAME_BYTES:
        return True
    slashes = [place for place, byte in enumerate(data) if byte == ord("/")]
    return any(p <= _FOLDERS_BYTES and len(data) - p - 1 <= _NAME_BYTES for p in slashes)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class SeenKeys:
    """Tells whether a key was there before, in about 17 bytes of memory a key.

    It keeps 64-bit digests: of 10 million keys, two that differ are taken for equal with a
    probability of 3 in a million.
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: str) -> bool:
        """Note a key; whether it had been noted already."""
        digest = int.from_bytes(hashlib.blake2b(_bytes(key), digest_size=8).digest(), "little")
        if digest in self._recent or self._is_sorted_in(digest):
            return True
        self._recent.add(digest)
        if len(self._recent) >= max(_BATCH, len(self._sorted) // 8):
            new = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, new]))
            self._recent.clear()
        return False

    def _is_sorted_in(self, digest: int) -> bool:
        value = np.uint64(digest)
        place = int(np.searchsorted(self._sorted, value))
        return place < len(self._sorted) and self._sorted[place] == value
