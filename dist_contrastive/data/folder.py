"""A folder of images as a data source, without packing."""

import hashlib
import os
from collections.abc import Collection
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.packing.images import IMAGE_FIELDS, find_images
from dist_contrastive.data.shards.encoding import WHITE, decode_or_explain
from dist_contrastive.data.source import Source, alternatives, in_parts
from dist_contrastive.errors import DataError, UnreadableSample

_SEED = 0  # of their order, as of `shards pack`


class ImageFolder(Source):
    """The images of a folder and of those in it, in the samples and the order that `shards pack
    images` would write: batches are the same, packed or not.

    It holds a path and a key for each image in memory; from some millions on, and for folders on a
    network, shards are read faster.

    Args:
        background: colour behind images that are transparent in places.

    Raises:
        DataError: as `find_images`.
    """

    class Config(Source.Config):
        """Settings of a folder of images."""

        name: Literal["folder"] = "folder"
        path: str
        """Folder of images. If every image lies in a folder directly in it, these folders are
        classes; a text beside an image, as 1.txt beside 1.jpg, is the field txt."""
        classes: tuple[str, ...] | None = None
        """Names of the folders of the classes 0, 1, ..., as those of other data; null: all, in
        alphabetical order."""

    def __init__(self, config: Config, background: str = WHITE) -> None:
        self._found = find_images(config.path, config.classes)
        self._background = background
        self._states = self._look()
        self._order = keyed_permutation(len(self._found.paths), _SEED)
        self.shards, self.shard_samples = in_parts(config.path, len(self._order))
        self.classes = self._found.classes
        has = {"cls": bool(self.classes), "txt": bool(self._found.texts)}
        beside = [name for name, is_there in has.items() if is_there]
        # The name of a format is no more than a name: images are decoded by their content.
        self.fields = (*IMAGE_FIELDS, "json", *beside)

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """As `Source.read`; the image has the name that is asked for, "png" if all is."""
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} is outside 0..{len(self) - 1}")
        number = int(self._order[sample_number])
        key, beside = self._found.keys[number], None
        sample: dict[str, Any] = {"__key__": key}
        for name in ("png", "json", "cls", "txt") if only is None else only:
            if set(alternatives(name)) & set(IMAGE_FIELDS):
                data, where = self._content(number), str(self._found.source)
                sample[name] = decode_or_explain("png", data, key, where, self._background)
                continue
            beside = beside or self._found.beside(number)
            values = (beside.get(one) for one in alternatives(name))
            value = next((x for x in values if x is not None), None)
            if value is not None:
                sample[name] = value
            elif only is not None:
                raise UnreadableSample(f"image {key!r} of {self._found.source} has no {name!r}")
        return sample

    def key(self, sample_number: int) -> str | None:
        """Key of a sample."""
        return self._found.keys[int(self._order[sample_number])]

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Numbers of the images without a text, if that is what the name is of."""
        if set(alternatives(name)) - {"txt"}:
            return np.empty(0, np.int64)
        paths, texts = self._found.paths, self._found.texts
        return np.flatnonzero([paths[number] not in texts for number in self._order])

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the paths and sizes of the images."""
        digest = hashlib.sha256(repr(sorted(self.classes.items())).encode())
        for path, size in zip(self._found.paths, self._states[:, 0].tolist(), strict=True):
            digest.update(f"{path}\0{size}\n".encode())
        return digest.hexdigest()

    def _look(self) -> NDArray[np.int64]:
        """Size and time of the last change of each image, [n, 2]."""
        states = np.empty((len(self._found.paths), 2), np.int64)
        for number, path in enumerate(self._found.paths):
            try:
                states[number] = _state(os.stat(f"{self._found.source}/{path}"))
            except OSError as error:
                raise DataError(
                    f"image {path} of {self._found.source} cannot be looked at ({error.strerror}); "
                    f"start again when the folder is as it should be"
                ) from error
        return states

    def _content(self, number: int) -> bytes:
        """Bytes of an image that is as it was when the folder was opened."""
        path = self._found.paths[number]
        try:
            with open(f"{self._found.source}/{path}", "rb", buffering=0) as file:
                state, data = _state(os.fstat(file.fileno())), file.read()
        except OSError as error:
            raise UnreadableSample(f"image {path} cannot be read ({error.strerror})") from error
        if state != tuple(self._states[number].tolist()):
            raise UnreadableSample(
                f"image {path} of {self._found.source} has changed since the folder was opened "
                f"({self._states[number, 0]} bytes then, {state[0]} now); put it back as it was, "
                f"or train on the changed folder in another run_dir"
            )
        return data


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
