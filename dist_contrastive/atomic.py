"""Files and folders written atomically: a crash leaves the old one or the new one, never a part."""

import contextlib
import glob
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dist_contrastive.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Atomic replacement of the content of a file."""
    with open_file(path) as file:
        file.write(text.encode())


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """File open for writing that takes the place of `path` when the block has ended well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """New folder that takes the place of `folder` when the block has ended well.

    On an error, ctrl-C or SIGTERM everything is as before. What a process that was killed outright
    has left is removed by the next that writes the same folder from the same machine.
    """
    folder = folder.resolve()
    _remove_leftovers(folder)
    prefix = f".{folder.name}.{socket.gethostname()}-{os.getpid()}"
    partial, previous = (folder.with_name(f"{prefix}.{state}") for state in ("partial", "old"))
    with _exit_on_sigterm():
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
            _restore(previous, folder)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    prefix = rf"\.{re.escape(folder.name)}\.{re.escape(socket.gethostname())}"
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        match = re.fullmatch(rf"{prefix}-(\d+)\.(partial|old)", path.name)
        if match and not _is_running(int(match[1])):
            if match[2] == "old":
                _restore(path, folder)
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether another process has this number; this one has written nothing yet."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _restore(previous: Path, folder: Path) -> None:
    """Undo the first of the two renames where the second did not happen."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SystemExit on SIGTERM, which would otherwise end the process without clearing up."""
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
