"""Fields of samples by their extension: from values to bytes and back.

Decoding is by the explicit table below, never by webdataset's default decoders: those unpickle
`.pyd`, `.pickle` and `.pth`, and Pillow left to itself starts Ghostscript for an EPS. Here
nothing from a tar is ever executed; a field of an unknown extension stays bytes. What both decode
they decode alike, which a test holds them to.
"""

import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_contrastive.errors import DataError, UnreadableSample

TEXT_FIELDS = ("txt", "text", "caption", "transcript")
"""Extensions of texts in UTF-8."""
_IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_OBJECT = re.compile(r"<_io\.BytesIO [^>]*>")  # as Pillow names what it was given
_WIDE_MODES = ("I", "F")  # and "I;16...": more than 8 bits a channel


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


def decode_or_explain(name: str, value: bytes, key: str, shard: str) -> Any:
    """`decode_field`, whose errors name the sample.

    Raises:
        UnreadableSample: bytes that the extension's decoder cannot read.
    """
    try:
        return decode_field(name, value)
    # Image libraries and parsers raise nearly anything on damaged input.
    except Exception as error:
        raise UnreadableSample(
            f"field {name!r} of sample {key!r} in shard {shard} cannot be decoded "
            f"({type(error).__name__}: {_OBJECT.sub('it', str(error))}); repair or leave out the "
            f"sample and pack again"
        ) from error


def decode_field(name: str, data: bytes) -> Any:
    """Decode one field by the last part of its extension; unknown ones stay bytes."""
    decode = _DECODERS.get(_last_extension(name))
    return data if decode is None else decode(data)


def _last_extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _decode_image(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
        if image.mode.partition(";")[0] in _WIDE_MODES:
            raise ValueError(f"mode {image.mode} has more than 8 bits a channel; store it as npy")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        pixels = np.array(image.convert(mode))  # a copy: torch wants writable memory
    if pixels.ndim == 2:
        return torch.from_numpy(pixels)[None]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _decode_array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _decode_text(data: bytes) -> str:
    return data.decode("utf-8")


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(_IMAGE_EXTENSIONS, _decode_image),
    "json": json.loads,
    "cls": int,
    **dict.fromkeys(TEXT_FIELDS, _decode_text),
    "npy": _decode_array,
}
