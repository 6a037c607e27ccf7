"""A folder of images as shards; encoded images checked and copied, arrays made fit for PNG."""

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_contrastive.data.packing.options import PackOptions, check_target, key_of_path, order
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.data.shards.encoding import decode_field
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm"),
)
"""Extensions of image files, in lower case."""

_FIELDS = {  # by Pillow's name of the format
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}
IMAGE_FIELDS = tuple(_FIELDS.values())
"""Fields of images, by their formats."""

_MULTI_PICTURE = "MPO"  # what Pillow calls a JPEG of a camera that holds a preview too
_USUAL_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def pack_images(
    source: Path | str,
    folder: Path | str,
    options: PackOptions | None = None,
    field: str | None = None,
) -> Packed:
    """Pack the images of a folder and of those in it; their bytes are copied as they are.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm: the image, in the field of its true format
        json  "path": where it lies in the source
        cls   the number of its class
        json  "label": the same; "class": its name

    The last two only if every image lies in a folder directly in the source: the names of these
    folders, sorted, are then the classes 0, 1, .... Files and folders whose names begin with a dot
    are passed over.

    Args:
        field: for all images, whatever their formats; they are decoded by their content.

    Raises:
        ConfigError: as `check_target`, `check_image_field`.
        DataError: as `pack_samples`; no folder, no images, or two that would have the same key.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    source = Path(source)
    if not source.is_dir():
        raise DataError(f"the image folder {source} does not exist; give a folder of images")
    paths = sorted(_image_paths(source))
    if not paths:
        raise DataError(
            f"{source} holds 0 images; give a folder of files that end in "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    keys = _keys(paths)
    classes = _classes(paths)

    def make(number: int) -> dict[str, Any]:
        path = paths[number]
        by_format, data = read_image(source / path, f"image {path}", options.verify)
        details: dict[str, Any] = {"path": path}
        sample: dict[str, Any] = {
            "__key__": keys[number],
            field or by_format: data,
            "json": details,
        }
        if classes:
            name = path.partition("/")[0]
            sample["cls"] = classes[name]
            details.update({"label": classes[name], "class": name})
        return sample

    return pack_samples(order(len(paths), options), make, folder, options, len(paths))


def _image_paths(source: Path) -> Iterator[str]:
    """Paths of images in the source, those behind links to folders too."""
    for folder, names, files in os.walk(source, onerror=_refuse_folder, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in names:
            below = Path(folder) / name
            if below.is_symlink() and below.resolve() in {x.resolve() for x in below.parents}:
                raise DataError(f"{below} links to a folder that holds it; remove the link")
        for name in files:
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(source).as_posix()


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}); allow it, or move it away"
    ) from error


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


def _classes(paths: list[str]) -> dict[str, int]:
    """Numbers of the folders directly in the source, if they are classes."""
    if any(path.count("/") != 1 for path in paths):
        return {}
    return {name: number for number, name in enumerate(sorted({p.split("/")[0] for p in paths}))}


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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableSample(f"{what} cannot be read ({error.strerror})") from error
    return image_field(data, what, verify), data


def image_field(data: bytes, what: str, verify: str) -> str:
    """Field of an encoded image by its true format, "jpg" for a JPEG.

    Args:
        what: it is, for messages, as "image cats/1.jpg".
        verify: "open" or "decode", see `PackOptions`.

    Raises:
        UnreadableSample: the stream could not read it.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_FIELDS)) as image:
            kind, mode = image.format, image.mode
            image.verify()
        field = "jpg" if kind == _MULTI_PICTURE else _FIELDS[str(kind)]
        if verify == "decode" or mode not in _USUAL_MODES:  # of which the stream refuses some
            decode_field(field, data)
    except UnidentifiedImageError as error:
        known = ", ".join(_FIELDS)
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


def channels_first(pixels: NDArray[np.uint8], axis: int | None) -> NDArray[np.uint8]:
    """Pixels as [C, H, W], as PNG fields are written from; see `channel_axis`."""
    return pixels[None] if axis is None else np.moveaxis(pixels, axis, 0)
