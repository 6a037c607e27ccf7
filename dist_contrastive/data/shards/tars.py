"""Samples in plain webdataset tars: writing and finding them.

A sample is a run of tar members that share a key: `cat.png`, `cat.json`. The rules of what
belongs together are webdataset's, whose functions are used here and nowhere else.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from dist_contrastive.data.shards.encoding import encode_field
from dist_contrastive.data.shards.locations import hidden_kind
from dist_contrastive.errors import DataError, UnreadableSample

_CHUNK = 1 << 20  # bytes read at once
BLOCK = 512  # bytes; tar headers and data are padded to it
_MOST_HEADER = 1 << 20  # bytes
_MOST_BYTES = 1 << 60  # of a member
# What `tarfile` raises for damaged headers.
_DAMAGE = (
    *(tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError),
    *(AttributeError, RecursionError),
)
_COMPRESSED = {
    **{b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"},
    **{b'\x04"': "lz4", b"PK": "zip"},
}
LINKS = "links"
"""Members without content of their own, as `scan_samples` counts them."""
REMEDY_OF_LINKS = "write the tar again with `tar --hard-dereference --dereference`"
_META_NAME = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips


class Member(NamedTuple):
    """One field of a sample: its headers, then its content."""

    field: str  # extension, in lower case
    start: int  # byte of the tar at which its headers begin
    header: int  # bytes of headers
    size: int  # bytes of content


class SampleSlice(NamedTuple):
    """Place of one sample in its tar."""

    key: str
    members: tuple[Member, ...]

    @property
    def offset(self) -> int:
        """Byte at which it begins."""
        return self.members[0].start


# ---------------------------------------------------------------------------- writing


class ShardWriter:
    """Writer of one webdataset tar. Equal samples give equal bytes: times and owners are fixed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = TarWriter(self._file, encoder=False, compress=False, mtime=0, user="", group="")

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample: `__key__` and fields by extension, as `encode_field` takes them."""
        fields = {
            name: encode_field(name, value) for name, value in sample.items() if name != "__key__"
        }
        self._tar.write({"__key__": sample["__key__"], **fields})

    def close(self) -> None:
        """End the tar."""
        try:
            self._tar.close()
        finally:
            self._file.close()


def write_samples(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write a tar of these samples, replacing it if it exists, and return their number."""
    count = 0
    writer = ShardWriter(path)
    try:
        for sample in samples:
            writer.write(sample)
            count += 1
    finally:
        writer.close()
    return count


def tar_bytes(fields: Iterable[bytes]) -> int:
    """Bytes that a sample with these contents takes in a tar, headers and padding included."""
    return sum(BLOCK + -(-len(content) // BLOCK) * BLOCK for content in fields)


# ---------------------------------------------------------------------------- finding


def scan_samples(
    file: BinaryIO, shard: str, left_out: Counter[str] | None = None
) -> Iterator[SampleSlice]:
    """Samples of a tar, in its order, from its headers alone.

    Args:
        file: the tar, open for seeking.
        shard: its name, for messages.
        left_out: counts the members that belong to no sample, by kind; not folders.

    Raises:
        DataError: not a plain tar, truncated or damaged, or a sample has a field twice.
    """
    key: str | None = None
    members: list[Member] = []
    left_out = Counter() if left_out is None else left_out
    for name, start, header, size in _scan_members(file, shard, left_out):
        member_key, extension = base_plus_ext(name)
        if member_key is None:
            left_out["files without extension"] += 1
            continue
        if member_key != key:
            if key is not None:
                yield SampleSlice(key, tuple(members))
            key, members = member_key, []
        extension = extension.lower()
        if any(extension == member.field for member in members) or extension == "__key__":
            raise DataError(
                f"shard {shard} gives the field {extension!r} of sample {key!r} twice, again at "
                f"byte {start}; write every field once, and every sample under its own key"
            )
        members.append(Member(extension, start, header, size))
    if key is not None:
        yield SampleSlice(key, tuple(members))


def member_key(data: bytes) -> str:
    """Key of the sample to which a member belongs, from its headers. Raises: UnreadableSample."""
    name = _member_name(data)
    key = base_plus_ext(name)[0]
    if key is None:
        raise UnreadableSample(f"the member {name!r} has no extension, so that it has no key")
    return key


def _member_name(data: bytes) -> str:
    # Most members have one plain header, whose name is read many times faster than by `tarfile`.
    is_plain = data[156:157] in (b"0", b"\0") and data[345:346] == b"\0"
    if is_plain:
        return data[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    padding = bytes(-len(data) % BLOCK + 2 * BLOCK)
    try:
        file: Any = _Headers(io.BytesIO(data + padding))
        with tarfile.TarFile(fileobj=file) as archive:
            member = archive.next()
    except _DAMAGE as error:
        raise UnreadableSample(f"the headers of a member are damaged ({error})") from error
    if member is None:
        raise UnreadableSample("a member has no headers")
    return member.name


def _scan_members(
    file: BinaryIO, shard: str, left_out: Counter[str]
) -> Iterator[tuple[str, int, int, int]]:
    """Name, first byte, bytes of headers and of content of every member that may be a field."""
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep all
                if not 0 <= member.size < _MOST_BYTES:
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                if member.issparse():
                    raise DataError(
                        f"shard {shard} holds {member.name!r} as a sparse file, whose content is "
                        f"not there in one piece; write it again without `tar --sparse`"
                    )
                if kind := _kind_left_out(member):
                    left_out[kind] += 1
                elif member.isreg():
                    # `offset` is that of the extended headers, if the member has any.
                    header = member.offset_data - member.offset
                    yield member.name, member.offset, header, member.size
            end = archive.offset
    except DataError:
        raise
    except _DAMAGE as error:
        file.seek(0)
        if kind := _COMPRESSED.get(file.read(2)):
            raise DataError(
                f"shard {shard} is compressed by {kind}; decompress it: samples are found by their "
                f"places in the file"
            ) from error
        raise DataError(
            f"shard {shard} ({file.seek(0, io.SEEK_END)} bytes) is truncated or not a plain tar "
            f"({error}); write or copy it again"
        ) from error
    _check_end(file, end, shard)


def _kind_left_out(member: tarfile.TarInfo) -> str | None:
    """Kind of a member that cannot be a field; None of others, and of folders."""
    if member.isdir():
        return None
    if kind := hidden_kind(member.name):
        return kind
    if member.islnk() or member.issym():
        return LINKS
    if not member.isreg():
        return "devices and pipes"
    return "files of folders named __...__" if _META_NAME.match(member.name) else None


class _Headers:
    """A tar as `tarfile` reads it, for its headers alone: one that tells of a size that headers
    never have is not read into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"headers of {size} bytes")
        return self._file.read(size)


def _check_end(file: BinaryIO, end: int, shard: str) -> None:
    """A tar must end in zeros and nothing else; `tarfile` takes a cut between members for an end,
    and reads no further where two tars were joined."""
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(
            f"shard {shard} is truncated: its {file.seek(0, io.SEEK_END)} bytes lack the end mark "
            f"that should follow at byte {end}; write or copy it again"
        )
    if any(block):
        raise DataError(
            f"shard {shard} is damaged: no tar header at byte {end}; write or copy it again"
        )
    at = end + BLOCK
    while chunk := file.read(_CHUNK):
        if any(chunk):
            at += len(chunk) - len(chunk.lstrip(b"\0"))
            raise DataError(
                f"shard {shard} ends at byte {end}, but {file.seek(0, io.SEEK_END) - at} bytes "
                f"follow from byte {at} on, which nobody reads; write it again, and join tars with "
                f"`dist-contrastive shards merge` rather than `cat`"
            )
        at += len(chunk)
