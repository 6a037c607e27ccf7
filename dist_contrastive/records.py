"""Small files that a run appends to or writes anew, read as far as they are sound: a crash may have
torn or zeroed them, and another version may have written other fields."""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dist_contrastive.atomic import open_file, write_text
from dist_contrastive.errors import DataError, StorageError, UserError
from dist_contrastive.sentences import shown

_MOST = 2**53  # steps or seconds


def read_json(path: Path) -> Any:
    """Value in a JSON file; None where there is none, or it is not JSON. Raises: as `readable`."""
    content = _content(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, without what is none: torn, blank or zero-filled lines.

    Raises: as `readable`.
    """
    return rows_in(_content(path))


def _content(path: Path) -> bytes:
    with readable(path):
        return path.read_bytes() if path.exists() else b""


def rows_in(data: bytes) -> list[dict[str, Any]]:
    """Rows in whole JSON lines, without those that are none."""
    return [row for line in _whole(data) if (row := _row(line)) is not None]


def numbers_in(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row of metrics; no steps and seconds that cannot be."""
    return {name: value for name, value in row.items() if _is_number(name, value)}


def _is_number(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    is_count = name == "step" or name.endswith("_s")
    return 0 <= value < _MOST if is_count else isinstance(value, float) or abs(value) < 2**63


def _whole(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]  # what follows the last end of a line is unfinished


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines, after what a crash may have left of one.

    Raises:
        OSError: it cannot be written.
    """
    with open_own(path, "r+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
        gap = "\n" if end and file.read(1) != b"\n" else ""
        file.write((gap + "".join(json.dumps(row) + "\n" for row in rows)).encode())


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the other lines, and what is no row."""
    data = path.read_bytes()
    kept = [line for line in _whole(data) if (row := _row(line)) is not None and keep(row)]
    text = b"".join(line + b"\n" for line in kept)
    if text != data:
        with open_file(path) as file:
            file.write(text)


def open_own(path: Path, mode: str) -> IO[Any]:
    """File to append to, unbuffered, made if it is not there; never another one that is reached by
    a link.

    Args:
        mode: as of `open`, with which the descriptor is wrapped.

    Raises:
        OSError: it is a link, or no plain file; or cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise _not_own(path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_own(path)
    return os.fdopen(handle, mode, buffering=0)


def _not_own(path: Path) -> OSError:
    return OSError(errno.ELOOP, f"{path.name} is a link or no plain file: delete it", str(path))


# ------------------------------------------------------------------ what cannot be read

MISSING = (FileNotFoundError, NotADirectoryError)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Context of reading a file that need not be damaged where it cannot be read.

    Raises:
        DataError: it may not be read, or holds what this version cannot read.
        StorageError: the disk or the machine fails for now.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        kind: type[UserError] = StorageError
        if isinstance(error, (*MISSING, PermissionError, IsADirectoryError)):
            kind = DataError
        raise kind(
            f"{path} cannot be read ({error.strerror or error}), and may be sound all the same: "
            f"nothing is deleted; see to that, then start again"
        ) from error
    except Exception as error:  # those of safetensors, pickle, zipfile
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        raise DataError(
            f"{path} holds no weights or state that can be read ({shown(reason)}); give "
            f"whole ones, or another checkpoint"
        ) from error


# ------------------------------------------------------------------ checksums

_SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Write checksums of files of a folder into it, as `sha256sum` writes and checks them."""
    write_text(folder / _SUMS, "".join(f"{_sha256(folder / name)}  {name}\n" for name in names))


def check_sums(folder: Path) -> None:
    """Refuse files that are not as they were when `write_sums` was called, if it was.

    Raises:
        DataError: a file is another one, or not there. OSError: one cannot be read.
    """
    path = folder / _SUMS
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in filter(str.strip, lines):
        match = _SUM.fullmatch(line)
        if match is None:
            raise DataError(f"{path} is damaged; copy it again, or delete it to go without it")
        file = folder / Path(match[2]).name
        if not file.exists() or _sha256(file) != match[1]:
            raise DataError(
                f"{file} is not as it was written; copy it again, or take its line out of {path} "
                f"if it was changed on purpose"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
