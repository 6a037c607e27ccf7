"""Images on their way into shards: encoded ones looked at and copied, arrays made fit for PNG."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_contrastive.data.shards.encoding import decode_field
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample

IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm"),
)
"""Of the files that are taken for images, in lower case."""

_FIELDS = {  # by what Pillow calls the format
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}
IMAGE_FIELDS = tuple(_FIELDS.values())
"""Of images, by their formats."""

_MULTI_PICTURE = "MPO"  # what Pillow calls a JPEG of a camera that holds a preview too
_USUAL_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def check_image_field(name: str | None) -> None:
    """Refuse a name under which an image would not be decoded; None is fine.

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
    """The field and the bytes of an image file. Args and raises: as `image_field`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableSample(f"{what} cannot be read ({error.strerror})") from error
    return image_field(data, what, verify), data


def image_field(data: bytes, what: str, verify: str) -> str:
    """The field that is named after the true format of an encoded image, "jpg" for a JPEG.

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
    """Where the channels of an array of pixels are: None of [H, W], 0 of [C, H, W], 2 of [H, W, C].

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
