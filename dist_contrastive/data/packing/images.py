"""A folder of images as shards; encoded images checked and copied, arrays made fit for PNG."""

import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_contrastive.data.classes import named_classes
from dist_contrastive.data.packing.options import PackOptions, check_target, key_of_path, order
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.data.shards.encoding import (
    IMAGE_EXTENSIONS,
    IMAGE_FORMATS,
    MULTI_PICTURE,
    TEXT_FIELDS,
    check_size,
    decode_field,
)
from dist_contrastive.data.shards.index import index_command
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.locations import counted, hidden_kind, kind_of_file
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

_log = logging.getLogger(__name__)
IMAGE_FIELDS = tuple(IMAGE_FORMATS.values())
"""Fields of images, by their formats."""

_IMAGES = tuple(f".{name}" for name in IMAGE_EXTENSIONS)
_TEXTS = tuple(f".{name}" for name in TEXT_FIELDS)
_USUAL_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def pack_images(
    source: Path | str,
    folder: Path | str,
    options: PackOptions | None = None,
    field: str | None = None,
    classes: Sequence[str] | None = None,
) -> Packed:
    """Pack the images of a folder and of those in it; their bytes are copied as they are.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm, avif: the image, in the field of its true format
        txt   the text beside it, of 1.txt, 1.text or 1.caption beside 1.jpg, unless it is blank
        json  "path": where it lies in the source
        cls   the number of its class
        json  "label": the same; "class": its name

    The last two only if every image lies in a folder directly in the source: the names of these
    folders, sorted, are then the classes 0, 1, ..., those without images too. A file without
    extension is taken if it is an image. `Packed.not_packed` counts all other files.

    Args:
        field: for all images, whatever their formats; they are decoded by their content.
        classes: names of the classes 0, 1, ..., as those of other shards; None: see above.

    Raises:
        ConfigError: as `check_target`, `check_image_field`.
        DataError: as `pack_samples`; no folder, no images, two that would have the same key, or a
            folder that is none of the given classes.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    found = find_images(source, classes)

    def make(number: int) -> dict[str, Any]:
        path = found.paths[number]
        by_format, data = read_image(found.source / path, f"image {path}", options.verify)
        sample = {"__key__": found.keys[number], field or by_format: data, **found.beside(number)}
        return {name: value for name, value in sample.items() if value is not None}

    held = {path.partition("/")[0] for path in found.paths}
    if empty := {number: name for number, name in found.classes.items() if name not in held}:
        _log.warning("classes without images: %s", named_classes(empty))
    count = len(found.paths)
    packed = pack_samples(order(count, options), make, folder, options, count, found.classes)
    lost = len(found.texts) - packed.field_counts().get("txt", 0)
    others = found.others + Counter({"texts that are blank or of images that were left out": lost})
    return replace(packed, not_packed=others)


def class_names(location: str) -> list[str]:
    """Names of the classes 0, 1, ... of packed shards.

    Raises:
        DataError: as `load_index`; they have none, or not of every number.
    """
    names = load_index(location).classes
    if not names or list(names) != list(range(len(names))):
        raise DataError(
            f"{location} has no names of the classes 0, 1, ...; give shards that were packed from "
            f"folders of classes, or index them again: {index_command(location)} --full"
        )
    return list(names.values())


@dataclass(frozen=True)
class FolderOfImages:
    """Images of a folder and what stands beside them; paths are seen from the folder."""

    source: Path
    paths: list[str]
    keys: list[str]
    texts: dict[str, str]  # by the image beside which they lie
    classes: dict[int, str]  # names by number
    others: Counter[str]  # all other files, by kind

    def beside(self, number: int) -> dict[str, Any]:
        """Fields of a sample beside its image: json, and cls and txt, None where it has none.

        Raises:
            UnreadableSample: the text cannot be read.
        """
        path = self.paths[number]
        details: dict[str, Any] = {"path": path}
        label = text = None
        if self.classes:
            name = path.partition("/")[0]
            label = self._numbers[name]
            details |= {"label": label, "class": name}
        if path in self.texts:
            text = _read_text(self.source, self.texts[path])
        return {"json": details, "cls": label, "txt": text if text and text.strip() else None}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in self.classes.items()}


def find_images(source: Path | str, classes: Sequence[str] | None = None) -> FolderOfImages:
    """The images of a folder, in the order of their paths. Args, Raises: as `pack_images`."""
    source = Path(source)
    if not source.is_dir():
        problem = "is a file" if source.exists() else "does not exist"
        raise DataError(f"the image folder {source} {problem}; give a folder of images")
    found = _find(source)
    names = {number: name for name, number in _class_numbers(found, classes).items()}
    keys = _keys(found.images)
    return FolderOfImages(source, found.images, keys, found.texts, names, found.others)


class _Found(NamedTuple):
    images: list[str]
    texts: dict[str, str]
    folders: list[str]  # directly in it
    others: Counter[str]


def _find(source: Path) -> _Found:
    images, texts, others = list[str](), list[str](), Counter[str]()
    for path in sorted(_files(source)):
        extension = os.path.splitext(path)[1].lower()
        if kind := _special_kind(source, path):
            others[kind] += 1
        elif extension in _IMAGES or (not extension and _is_image(source / path)):
            images.append(path)
        elif extension in _TEXTS:
            texts.append(path)
        else:
            others[kind_of_file(path)] += 1
    if not images:
        others.update(map(kind_of_file, texts))
        has = f"; it has {counted(others)}" if others else ""
        raise DataError(
            f"{source} holds 0 images{has}; give a folder of files that end in "
            f"{', '.join(_IMAGES)}, or convert others to these"
        )
    beside = _beside(images, texts)
    others.update(map(kind_of_file, set(texts) - set(beside.values())))
    folders = sorted(p.name for p in source.iterdir() if p.is_dir() and not _is_hidden(p.name))
    return _Found(images, beside, folders, others)


def _files(source: Path) -> Iterator[str]:
    """Paths of all files in the source, those behind links to folders too."""
    for folder, names, files in os.walk(source, onerror=_refuse_folder, followlinks=True):
        below = Path(folder)
        for name in names:
            if _is_hidden(name):
                files += [f"{name}/{x}" for _, _, held in os.walk(below / name) for x in held]
            elif (below / name).is_symlink():
                _refuse_loop(below / name)
        names[:] = [name for name in names if not _is_hidden(name)]
        yield from ((below / name).relative_to(source).as_posix() for name in files)


def _is_hidden(name: str) -> bool:
    return hidden_kind(name) is not None


def _refuse_loop(link: Path) -> None:
    if link.resolve() in {folder.resolve() for folder in link.parents}:
        raise DataError(f"{link} links to a folder that holds it; remove the link")


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}); allow it, or move it away"
    ) from error


def _special_kind(source: Path, path: str) -> str | None:
    """Kind of a file that is not looked at, whatever its extension."""
    kinds = (hidden_kind(part) for part in path.split("/"))
    if kind := next(filter(None, kinds), None):
        return kind
    is_special = not (source / path).is_file() and (source / path).exists()
    return "devices and pipes" if is_special else None


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path, formats=tuple(IMAGE_FORMATS)):
            return True
    except OSError:  # of which one is that no format fits
        return False


def _beside(images: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """Text of each image that has one: 1.txt, or else 1.jpg.txt, beside 1.jpg."""
    by_stem = {
        os.path.splitext(text)[0]: text
        for kind in reversed(_TEXTS)
        for text in texts
        if text.lower().endswith(kind)
    }
    pairs = ((path, by_stem.get(os.path.splitext(path)[0], by_stem.get(path))) for path in images)
    return {path: text for path, text in pairs if text is not None}


def _read_text(source: Path, path: str) -> str:
    try:
        return (source / path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UnreadableSample(f"text {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UnreadableSample(f"text {path} is no UTF-8 ({error}); convert it") from error


def _keys(paths: list[str]) -> list[str]:
    by_key: dict[str, str] = {}
    for path in paths:
        key = key_of_path(path)
        if key in by_key:
            raise DataError(
                f"{by_key[key]} and {path} would both have the key {key!r}; rename one of them, or "
                f"pack them apart"
            )
        by_key[key] = path
    return list(by_key)


def _class_numbers(found: _Found, classes: Sequence[str] | None) -> dict[str, int]:
    """Numbers of the folders directly in the source, if they are classes."""
    if any(path.count("/") != 1 for path in found.images):
        if classes is not None:
            raise DataError(
                "classes are given, but not every image lies in a folder of a class; put them there"
            )
        return {}
    names = found.folders if classes is None else classes
    if unknown := {path.partition("/")[0] for path in found.images} - set(names):
        raise DataError(
            f"the folder {min(unknown)} is none of the {len(names)} classes {', '.join(names)}; "
            f"rename it, or leave it out"
        )
    return {name: number for number, name in enumerate(names)}


# ---------------------------------------------------------------------------- encoded images


def check_image_field(name: str | None) -> None:
    """Refuse a field under which an image would not be decoded; None is fine.

    Raises:
        ConfigError: it ends in no extension of images.
    """
    endings = "|".join(IMAGE_FIELDS)
    if name is not None and not re.fullmatch(rf"([a-z0-9_-]+\.)*({endings})", name):
        raise ConfigError(
            f"field={name!r} is no name of an image field; use one of "
            f"{', '.join(IMAGE_FIELDS)}, or NAME. and one of these"
        )


def read_image(path: Path, what: str, verify: str) -> tuple[str, bytes]:
    """Field and bytes of an image file. Args and raises: as `image_field`."""
    data = read_file(path, what)
    return image_field(data, what, verify), data


def read_file(path: Path, what: str) -> bytes:
    """Content of a file. Raises: UnreadableSample."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableSample(f"{what} cannot be read ({error.strerror})") from error


def image_field(data: bytes, what: str, verify: str) -> str:
    """Field of an encoded image by its true format, "jpg" for a JPEG.

    Args:
        what: it is, for messages, as "image cats/1.jpg".
        verify: "open" or "decode", see `PackOptions`.

    Raises:
        UnreadableSample: the stream could not read it.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)) as image:
            kind, mode = image.format, image.mode
            check_size(image)
            image.verify()
        field = "jpg" if kind == MULTI_PICTURE else IMAGE_FORMATS[str(kind)]
        if verify == "decode" or mode not in _USUAL_MODES:  # of which the stream refuses some
            decode_field(field, data)
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_FORMATS)
        raise UnreadableSample(
            f"{what} ({len(data)} bytes) is none of the formats {known}"
        ) from error
    except Exception as error:  # damaged images raise nearly anything
        raise UnreadableSample(
            f"{what} cannot be decoded ({type(error).__name__}: {error})"
        ) from error
    return field


def channel_axis(shape: Sequence[int], what: str) -> int | None:
    """Axis of the channels of pixels: None of [H, W], 0 of [C, H, W], 2 of [H, W, C].

    Raises:
        DataError: the shape is none of these with C = 1 or 3, or could be two of them.
    """
    if len(shape) == 2:
        return None
    axes = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in (1, 3)]
    if len(axes) == 1:
        return axes[0]
    problem = "could be [C, H, W] and [H, W, C]" if axes else "is no image"
    raise DataError(
        f"{what} have the shape {list(shape)}, which {problem}; give [H, W], or [C, H, W] or "
        f"[H, W, C] with C = 1 or 3" + (" and H, W that are neither" if axes else "")
    )


def channels_first(pixels: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """Pixels as [C, H, W], as PNG fields are written from; see `channel_axis`."""
    return pixels[None] if axis is None else np.moveaxis(pixels, axis, 0)
