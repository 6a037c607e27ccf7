"""Fields of samples by their extension: from values to bytes and back.

Decoding is by the explicit table below, never by webdataset's default decoders: those unpickle
`.pyd`, `.pickle` and `.pth`, and Pillow left to itself starts Ghostscript for an EPS. Here
nothing from a tar is ever executed; a field of an unknown extension stays bytes. What both decode
they decode alike, which a test holds them to.
"""

import io
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from dist_contrastive.errors import DataError, UnreadableSample

TEXT_FIELDS = ("txt", "text", "caption", "transcript")
"""Extensions of texts in UTF-8, with or without its mark."""
IMAGE_FORMATS = {  # Pillow's names of formats, and the field of each
    **{"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"},
    **{"TIFF": "tif", "PPM": "ppm", "AVIF": "avif"},
}
IMAGE_EXTENSIONS = (
    *IMAGE_FORMATS.values(),
    *("jpeg", "jpe", "jfif", "tiff", "pgm", "pbm", "pnm"),
)
"""Extensions of images, in lower case."""
MULTI_PICTURE = "MPO"  # what Pillow calls a JPEG of a camera that holds a preview too
WHITE = "white"
_OBJECT = re.compile(r"<_io\.BytesIO [^>]*>")  # as Pillow names what it was given
_ORIENTATION = 0x0112  # tag of EXIF
_MOST_REASON = 200  # characters
_MOST_PIXELS = 1 << 26  # a gigabyte in float32


def encode_field(name: str, value: Any) -> bytes:
    """Bytes of one field; the inverse of `decode_field` for the extensions that it writes.

    Raises:
        DataError: no way to write this value under this extension.
    """
    if isinstance(value, bytes):
        return value
    match _last_extension(name):
        case "json":
            return json.dumps(value, sort_keys=True).encode()
        case "cls" | "txt" | "text" | "caption" | "transcript":
            return str(value).encode()
        case "npy":
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.asarray(value), allow_pickle=False)
            return stream.getvalue()
        case "png":
            return _encode_png(np.asarray(value))
    raise DataError(
        f"a {type(value).__name__} cannot be written as field {name!r}; "
        "give bytes, or use one of json, cls, txt, npy, png"
    )


def _encode_png(image: np.ndarray) -> bytes:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise DataError(
            f"an image of shape {list(image.shape)} and type {image.dtype} cannot be written as "
            "png; give uint8 [C, H, W] with C = 1 or 3"
        )
    stream = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, format="PNG")
    return stream.getvalue()


def decode_or_explain(
    name: str, value: bytes, key: str, shard: str, background: str = WHITE
) -> Any:
    """`decode_field`, whose errors name the sample.

    Raises:
        UnreadableSample: bytes that the extension's decoder cannot read.
    """
    try:
        return decode_field(name, value, background)
    # Image libraries and parsers raise nearly anything on damaged input.
    except Exception as error:
        reason = _OBJECT.sub("it", str(error))[:_MOST_REASON]
        raise UnreadableSample(
            f"field {name!r} of sample {key!r} in shard {shard} cannot be decoded "
            f"({type(error).__name__}: {reason}); repair or leave out the sample and pack again"
        ) from error


def decode_field(name: str, data: bytes, background: str = WHITE) -> Any:
    """Decode one field by the last part of its extension; unknown ones stay bytes.

    Images are [C, H, W], C 1 or 3, upright: turned as their EXIF says. They are uint8, gray ones
    of 16 bits uint16.

    Args:
        background: colour behind images that are transparent in places.
    """
    if is_image_field(name):
        return _decode_image(data, background)
    decode = _DECODERS.get(_last_extension(name))
    return data if decode is None else decode(data)


def is_image_field(name: str) -> bool:
    """Whether a field is decoded to pixels."""
    return _last_extension(name) in IMAGE_EXTENSIONS


def _last_extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _decode_image(data: bytes, background: str) -> Tensor:
    with Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)) as image:
        check_size(image)
        image.load()  # what Pillow itself turns it turns here, and takes the tag away
        pixels = _pixels(image, background)
        orientation = _orientation(image)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if orientation >= 5:  # rows are columns
        planes = planes.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        planes = planes[:, ::-1]
    if orientation in (2, 3, 6, 7):
        planes = planes[:, :, ::-1]
    return torch.from_numpy(np.array(planes, order="C"))  # a copy: torch wants writable memory


def check_size(image: Image.Image) -> None:
    """Refuse an image that would fill the memory. Raises: ValueError."""
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {_MOST_PIXELS}")


def _orientation(image: Image.Image) -> int:
    """How the stored rows and columns lie, 1 to 8; 1, upright, where EXIF does not tell."""
    has_tags = any("exif" in str(name).lower() or "xmp" in str(name).lower() for name in image.info)
    if not has_tags and image.format != "TIFF":
        return 1  # looking for it costs a tenth of the decoding of a small image
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged tag raises nearly anything, and the pixels are sound
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _pixels(image: Image.Image, background: str) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3] as they are stored, in front of a background."""
    if _is_wide(image):
        return _wide_pixels(image)
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if layers.getchannel("A").getextrema() != (255, 255):
            red, green, blue = ImageColor.getrgb(background)[:3]
            behind = Image.new("RGBA", image.size, (red, green, blue, 255))
            image = Image.alpha_composite(behind, layers).convert("RGB")
            gray = gray and red == green == blue
    return np.asarray(image.convert("L" if gray else "RGB"))


def image_traits(data: bytes) -> list[str]:
    """Why an encoded image decodes to other pixels than are stored; nothing of one that does not
    open."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)) as image:
            is_cut = any(";16" in str(tile) for tile in image.tile) and not _is_wide(image)
            is_sequence = getattr(image, "is_animated", False) and image.format != MULTI_PICTURE
            traits = {
                "transparent in places, in front of data.background": image.has_transparency_data,
                "turned upright as EXIF says": _orientation(image) > 1,
                "of 16 bits, scaled by data.image_range": _is_wide(image),
                "of colours of 16 bits, read as 8": is_cut,
                "of several frames or pages, of which the first is read": is_sequence,
            }
    except Exception:  # damaged images raise nearly anything
        return []
    return [trait for trait, is_so in traits.items() if is_so]


def _is_wide(image: Image.Image) -> bool:
    """Whether Pillow holds more than 8 bits a channel."""
    return image.mode.partition(";")[0] in ("I", "F")


def _wide_pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
        raise ValueError(f"mode {image.mode} has more than 16 bits a channel; store it as npy")
    return pixels.astype(np.uint16)


def _decode_array(data: bytes) -> np.ndarray:
    return stored_array(data).copy()


_NPY_HEADER = 1 << 17  # bytes, more than the header of an npy file of version 1 or 2 has


def stored_array(data: bytes | memoryview) -> np.ndarray:
    """Array in the bytes of an npy file, without a copy of them.

    Raises:
        ValueError: it holds objects, or another number of bytes than its header tells of.
    """
    stream = io.BytesIO(data[:_NPY_HEADER])
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    try:
        shape, is_fortran, dtype = read(stream)
    except Exception as error:  # as Python's parser raises, MemoryError where it is nested
        raise ValueError("its header is damaged") from error
    begin = stream.tell()
    size, held = math.prod(shape) * dtype.itemsize, len(data) - begin
    is_sound = dtype.itemsize > 0 and min(shape, default=0) >= 0  # else any shape fits no bytes
    if dtype.hasobject or size != held or not is_sound:
        raise ValueError(f"it holds {held} bytes, and {dtype} {list(shape)} takes {size}")
    if not size:
        return np.zeros(shape, dtype)
    values = np.frombuffer(data, dtype, offset=begin)
    return values.reshape(shape, order="F" if is_fortran else "C")


def _decode_class(data: bytes) -> int | str:
    """Number of a class, or its name; empty where it is missing."""
    try:
        return int(data)
    except ValueError:
        return data.decode().strip()


def _decode_text(data: bytes) -> str:
    return data.decode("utf-8-sig")


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "json": json.loads,
    "cls": _decode_class,
    **dict.fromkeys(TEXT_FIELDS, _decode_text),
    "npy": _decode_array,
}
