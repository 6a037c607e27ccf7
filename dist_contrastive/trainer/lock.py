"""One run at a time in a run directory, and the same directory on all ranks."""

import errno
import fcntl
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from dist_contrastive import checkpoint, collectives
from dist_contrastive.errors import ChangedError, ConfigError, LockedError
from dist_contrastive.trainer.describing import writable
from dist_contrastive.trainer.start import Run, say

_NAME = "lock"
_PATIENCE_S = 5.0  # for a run that was told to end and saves
_OWN_PATIENCE_S = 60.0  # for the ranks that this very job had before it was requeued
_SHARED_S = 10.0  # that a file system of a network may take to show what another node has written
_LOOK_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(run: Run, checkpoints_before: list[Path]) -> Iterator[None]:
    """Hold the run directory, by a lock of its file system that is gone with the process.

    Args:
        checkpoints_before: those that were there before the run was opened.

    Raises:
        LockedError: on all ranks: another run holds it.
        ChangedError: on all ranks: another run has written checkpoints since.
        ConfigError: on all ranks: it is another folder on some of them.
    """
    run_dir, token = run.config.run_dir, f"{_this_process()} {uuid.uuid4().hex}\n"
    with ExitStack() as held:
        with collectives.raised_together(), writable(run_dir):
            if run.backend.is_main:
                run_dir.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(_acquire(run_dir, checkpoints_before))
                file.truncate(0)
                file.write(token)
                file.flush()
                os.fsync(file.fileno())
        host, token = collectives.gather_objects((platform.node(), token))[0]
        with collectives.raised_together():
            if not run.backend.is_main:
                _check_shared(run_dir, host, token)
        yield


def _acquire(run_dir: Path, checkpoints_before: list[Path]) -> IO[str]:
    # Not flock: data workers would inherit that, and hold it after a rank that was killed. This
    # kind is lost when the process closes any handle of the file, so that nothing else may open it.
    file = (run_dir / _NAME).open("a+")
    try:
        _await_lock(file, run_dir)
        if checkpoint.folders(run_dir / "checkpoints") != checkpoints_before:
            raise ChangedError(
                f"{run_dir} was written by another run while this one was being opened; start it "
                f"again, and it goes on from there"
            )
    except BaseException:
        file.close()
        raise
    return file


def _await_lock(file: IO[str], run_dir: Path) -> None:
    waited_s = 0.0
    while not _is_mine(file, run_dir):
        owner = _owner_in(file)
        is_same_job = owner.split(" of process ")[0] == _job() != ""
        if waited_s >= (_OWN_PATIENCE_S if is_same_job else _PATIENCE_S):
            raise LockedError(
                f"{run_dir} is being written by {_text(owner)}; wait for its end, or choose "
                f"another run_dir"
            )
        time.sleep(_LOOK_S)
        waited_s += _LOOK_S


def _is_mine(file: IO[str], run_dir: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            say(f"{run_dir}: the file system has no locks; a second run in it would not be noticed")
            return True
        return False
    return True


def _check_shared(run_dir: Path, first_host: str, token: str) -> None:
    for _ in range(int(_SHARED_S / _LOOK_S)):
        if _owner(run_dir / _NAME) == token:
            return
        time.sleep(_LOOK_S)
    raise ConfigError(
        f"run_dir={run_dir} on {platform.node()} is not the folder that {first_host} writes to; "
        f"put it on a file system that all nodes share"
    )


def _owner(path: Path) -> str:
    """What the run that holds the directory says of itself; not to be called by that one."""
    try:
        with path.open() as file:
            return _owner_in(file)
    except OSError:
        return ""


def _owner_in(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"SLURM job {job}" if job else ""


def _this_process() -> str:
    job = _job()
    return f"{f'{job} of ' if job else ''}process {os.getpid()} on {platform.node()}"


def _text(owner: str) -> str:
    return owner.rpartition(" ")[0] or "another process"
