"""Keys of samples: made from paths and numbers, checked, and found if given twice."""

import hashlib
import re
from pathlib import PurePosixPath

import numpy as np

from dist_contrastive.errors import DataError

_META = re.compile(r"__[^/]*__/")  # in front of members that webdataset skips
_BATCH = 1 << 16  # new keys that are looked up one by one before they are sorted in


def numbered_key(number: int) -> str:
    """The key of a sample that has only its place in a table, counted from 0."""
    return f"{number:09d}"


def key_of_path(path: str) -> str:
    """The key of a file: its path in the data set without the extension.

    Dots of the file's name become underscores: what follows the first of them would be read as the
    name of a field. A first folder named __...__, which webdataset skips, loses the underscores in
    front.
    """
    whole = PurePosixPath(path)
    key = str(whole.parent / whole.stem.replace(".", "_"))
    return key.lstrip("_") if _META.match(key) else key


def check_key(key: str) -> None:
    """Refuse a key of which tars cannot tell the fields.

    Raises:
        DataError: its last part is empty or holds a dot, or webdataset skips it.
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
        data = key.encode("utf-8", "surrogateescape")
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
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
