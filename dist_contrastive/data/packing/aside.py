"""Folders written aside and moved into place whole: a crash leaves no half data set that loads."""

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dist_contrastive.errors import DataError


def refuse_foreign_files(folder: Path, own: str, writer: str) -> None:
    """Refuse to replace what something else wrote.

    Args:
        own: regular expression of what may be there: paths in the folder, those of folders ending
            in a slash.
        writer: who writes such, for the message, as "packing the digits".

    Raises:
        DataError: the folder is a file, or holds something else.
    """
    if re.match(r"[a-z0-9]+:/", _given(folder)):
        raise DataError(
            f"{_given(folder)} is a URL; pack into a folder, and copy that to the server"
        )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new or empty folder to pack into")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
        if not re.fullmatch(own, name):
            raise DataError(
                f"{folder} already holds {name!r}, which {writer} did not write; "
                "give a new or empty folder"
            )


def _given(folder: Path) -> str:
    """As it was given, if it lies below the working directory."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside this one, which takes its place when the block has ended well.

    On an error, ctrl-C or SIGTERM all is as before. What a process that was killed outright has
    left is removed by the next that writes the same folder from the same machine.
    """
    folder = folder.resolve()
    _clear_leftovers(folder)
    partial, previous = (
        folder.with_name(f".{folder.name}.{_process_name(os.getpid())}.{state}")
        for state in ("partial", "old")
    )
    with _ending_by_exception():
        try:
            try:
                partial.mkdir(parents=True)
            except OSError as error:
                raise DataError(
                    f"{folder} cannot be written ({error.strerror}); give another folder"
                ) from error
            yield partial
            if folder.exists():
                folder.rename(previous)
            partial.rename(folder)
        finally:
            _put_back(previous, folder)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)


def _process_name(process: int) -> str:
    return f"{socket.gethostname()}-{process}"


def _clear_leftovers(folder: Path) -> None:
    mine = rf"\.{re.escape(folder.name)}\.{re.escape(socket.gethostname())}-(\d+)\.(partial|old)"
    for path in folder.parent.glob(f".{_escaped(folder.name)}.*"):
        match = re.fullmatch(mine, path.name)
        if match and not _is_running(int(match[1])):
            if match[2] == "old":
                _put_back(path, folder)
            shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    """For `glob`."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_running(process: int) -> bool:
    """Whether another process has this number; that of this one has written nothing yet."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_back(previous: Path, folder: Path) -> None:
    """Undo the first of the two moves, where the second did not come."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)


@contextmanager
def _ending_by_exception() -> Iterator[None]:
    """SIGTERM, which else ends a process without clearing up, raises SystemExit meanwhile."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
