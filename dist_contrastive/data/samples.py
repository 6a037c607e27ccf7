"""Samples in plain webdataset tars: writing, finding and decoding them.

A sample is a run of tar members that share a key: `cat.png`, `cat.json`. The rules of what
belongs together are webdataset's, whose functions are used here and nowhere else.

Decoding is by the explicit tables below, never by webdataset's default decoders: those unpickle
`.pyd`, `.pickle` and `.pth`, and Pillow left to itself starts Ghostscript for an EPS. Here
nothing from a tar is ever executed; a field of an unknown extension stays bytes.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from dist_contrastive.errors import DataError

_IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_WIDE_MODES = ("I", "F")  # and "I;16...": more than 8 bits a channel

_BLOCK = 512  # bytes; tar headers and data are padded to it
_META_NAME = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips


class SampleSlice(NamedTuple):
    """Where one sample lies in its tar, headers and padding included."""

    key: str
    offset: int  # bytes
    length: int  # bytes


# ---------------------------------------------------------------------------- writing


def write_samples(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write a webdataset tar and return the number of its samples.

    Equal samples give equal bytes: times and owners are fixed.

    Args:
        path: the tar; replaced if it exists.
        samples: `__key__` and fields by extension. Bytes are written as they are; other values
            by extension: json, cls, txt, npy, png (uint8 array or tensor [C, H, W]).
    """
    count = 0
    with (
        path.open("wb") as file,
        TarWriter(file, encoder=False, compress=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            key = sample["__key__"]
            fields = {
                name: encode_field(name, v) for name, v in sample.items() if name != "__key__"
            }
            writer.write({"__key__": key, **fields})
            count += 1
    return count


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
        case "cls" | "txt":
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


# ---------------------------------------------------------------------------- finding


def scan_samples(path: Path) -> Iterator[SampleSlice]:
    """Find the samples of a tar, in its order, from its headers alone.

    Raises:
        DataError: not a plain tar, truncated or damaged, or a sample has a field twice.
    """
    key, start, stop, fields = None, 0, 0, set[str]()
    for name, member_start, member_stop in _scan_members(path):
        member_key, extension = base_plus_ext(name)
        if member_key is None:
            continue
        extension = extension.lower()
        if member_key != key:
            if key is not None:
                yield SampleSlice(key, start, stop - start)
            key, start, fields = member_key, member_start, {"__key__"}
        if extension in fields:
            raise DataError(
                f"shard {path} gives the field {extension!r} of sample {key!r} twice, again at "
                f"byte {member_start}; write every field once, and every sample under its own key"
            )
        fields.add(extension)
        stop = member_stop
    if key is not None:
        yield SampleSlice(key, start, stop - start)


def _scan_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and end of every member that webdataset would read."""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep all
                    if _is_field(member):
                        # `offset` is that of the extended headers, if the member has any.
                        yield member.name, member.offset, archive.offset
                end = archive.offset
        except tarfile.TarError as error:
            raise DataError(
                f"shard {path} ({path.stat().st_size} bytes) is truncated or not a plain tar "
                f"({error}); write or copy it again"
            ) from error
        _check_end(file, end, path)


def _is_field(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not _META_NAME.match(member.name)


def _check_end(file: BinaryIO, end: int, path: Path) -> None:
    """A tar must end in zeros; `tarfile` takes a cut between members for an end."""
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise DataError(
            f"shard {path} is truncated: its {path.stat().st_size} bytes lack the end mark that "
            f"should follow at byte {end}; write or copy it again"
        )
    if any(block):
        raise DataError(
            f"shard {path} is damaged: no tar header at byte {end}; write or copy it again"
        )


# ---------------------------------------------------------------------------- decoding


def decode_sample(data: bytes, shard: str, only: Collection[str] | None = None) -> dict[str, Any]:
    """Decode the bytes of one sample.

    Args:
        data: a slice of a tar as `scan_samples` gives it.
        shard: name of the tar, for messages.
        only: the fields to decode, the others are left as bytes; None decodes all.

    Returns:
        `__key__` and the decoded fields by extension: images as uint8 tensors [C, H, W] (C = 1
        for gray, else 3: transparency is left out), json as objects, cls as int, txt as str,
        npy as arrays, all others as bytes.

    Raises:
        DataError: a field that its extension's decoder cannot read.
    """
    sample: dict[str, Any] = {}
    for name, value in _members(data):
        key, extension = base_plus_ext(name)
        if key is not None:
            sample.setdefault("__key__", key)
            field = extension.lower()
            wanted = only is None or field in only
            sample[field] = _decode_or_explain(field, value, key, shard) if wanted else value
    return sample


def _members(data: bytes) -> Iterable[tuple[str, bytes]]:
    """Names and contents of the members of a slice that webdataset would read."""
    return _plain_members(data) or _any_members(data)


def _plain_members(data: bytes) -> list[tuple[str, bytes]] | None:
    """Those of a slice in which every member is a file behind one plain header; else None.

    The usual case, read several times faster than by `tarfile`, whose checks the checksum of the
    slice has made.
    """
    found, at = [], 0
    while at < len(data):
        header = data[at : at + _BLOCK]
        name = header[:100].partition(b"\0")[0]
        is_plain = header[156:157] in (b"0", b"\0") and header[345:346] == b"\0"
        if not is_plain or header[124] & 0x80 or name.endswith(b"/"):
            return None
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        at += _BLOCK
        text = name.decode("utf-8", "surrogateescape")
        if not _META_NAME.match(text):
            found.append((text, data[at : at + size]))
        at += -(-size // _BLOCK) * _BLOCK
    return found


def _any_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Those of any slice."""
    # Opened for seeking: webdataset's own iterator opens a stream, which costs as much again.
    with tarfile.TarFile(fileobj=io.BytesIO(data)) as archive:
        while (member := archive.next()) is not None:
            content = archive.extractfile(member) if _is_field(member) else None
            if content is not None:
                yield member.name, content.read()


def _decode_or_explain(name: str, value: bytes, key: str, shard: str) -> Any:
    try:
        return decode_field(name, value)
    # Image libraries and parsers raise nearly anything on damaged input.
    except Exception as error:
        raise DataError(
            f"field {name!r} of sample {key!r} in shard {shard} cannot be decoded "
            f"({type(error).__name__}: {error}); repair or leave out the sample and pack again"
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
    "txt": _decode_text,
    "npy": _decode_array,
}
