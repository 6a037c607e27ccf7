"""Run directory: the files that describe a run and guard it; one run writes there at a time.

config.yaml, environment.json    the run; written at every start
changes.jsonl                    settings that changed on the way (changes.py)
data.json                        sources of data.train by checksum (data/record.py)
modules.json                     modules given to `train` from Python, if any
attempts.json                    starts since the last checkpoint
skipped.jsonl                    unreadable samples and their substitutes
lock                             owner of the directory
"""

import errno
import fcntl
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Self

import torch

import dist_contrastive
from dist_contrastive import checkpoint, collectives
from dist_contrastive import config as configs
from dist_contrastive.atomic import write_text
from dist_contrastive.backend import Backend
from dist_contrastive.config import RunConfig
from dist_contrastive.data.record import write_record
from dist_contrastive.data.stream.reader import Skipped, check_skipped
from dist_contrastive.data.training import TrainingData
from dist_contrastive.errors import (
    ChangedError,
    ConfigError,
    LockedError,
    NoProgressError,
    redacted,
)
from dist_contrastive.records import append_lines, open_own, read_json, read_lines

COMMIT = "dist_contrastive.commit"
_MODULES, _ATTEMPTS, _LOCK = "modules.json", "attempts.json", "lock"
_GIT_S = 10.0  # for a slow file system
_PATIENCE_S = 5.0  # for a run that was told to end and saves
_OWN_PATIENCE_S = 60.0  # for the ranks that this very job had before it was requeued
_SHARED_S = 10.0  # that a file system of a network may take to show what another node has written
_POLL_S = 0.1
_MOST_OWNER = 1000  # bytes
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_log = logging.getLogger(__name__)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Context that turns an OSError of the run directory into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run_dir={path} cannot be written ({error.strerror}); choose another folder, or make "
            f"room"
        ) from error


# ------------------------------------------------------------------ description of the run


def describe(
    config: RunConfig, backend: Backend, data: TrainingData, modules: Mapping[str, str]
) -> None:
    """Write config.yaml, environment.json, data.json and modules.json; called by one rank.

    Args:
        data: that of data.train, opened.
        modules: names of the classes of the modules that `train` was given.

    Raises:
        ConfigError: they cannot be written.
    """
    folder = config.run_dir
    environment = {
        "dist_contrastive": dist_contrastive.__version__,
        "commit": code_commit(),
        "command": redacted(shlex.join(sys.orig_argv)),
        **configs.place(folder),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.node(),
        "device": str(backend.device),
        "world_size": backend.world_size,
        "threads": torch.get_num_threads(),
    }
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        configs.save(config, folder)
        write_record(folder, config.data, data.sources, data.example)
        _write_json(folder / "environment.json", environment)
        if modules:
            _write_json(folder / _MODULES, modules)
        else:
            (folder / _MODULES).unlink(missing_ok=True)


def code_commit() -> str | None:
    """Git commit of this package, ending in "-dirty" if files differ from it; None if unknown.

    A copy of a checkout has it in a file beside the package.
    """
    package = Path(dist_contrastive.__file__).parent
    copied = package.parent / COMMIT
    if copied.is_file():
        return copied.read_text().strip() or None
    git = ["git", "-C", str(package)]
    tracked, described = (
        ("ls-files", "--error-unmatch", "__init__.py"),
        (*("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),),
    )
    try:
        for command in (tracked, described):
            done = subprocess.run(
                [*git, *command], capture_output=True, text=True, timeout=_GIT_S, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def check_modules(run_dir: Path, modules: Mapping[str, str]) -> None:
    """Refuse other modules than those that the run was trained with.

    Raises:
        ConfigError: `train` was given others, or none.
    """
    path = run_dir / _MODULES
    before = read_json(path) if path.exists() else {}
    if not isinstance(before, dict):
        _log.warning("%s is damaged: whether the modules are the same is not known", path)
    elif before != modules:
        was, now = (_modules_text(names) for names in (before, modules))
        raise ConfigError(
            f"{run_dir} was trained with {was}, now {now}; give dist_contrastive.train() the "
            f"modules that it was trained with, or choose another run_dir"
        )


def _modules_text(names: Mapping[str, str]) -> str:
    given = " and ".join(f"{argument}={name}" for argument, name in names.items())
    return given or "the modules of its config"


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


# ------------------------------------------------------------------ starts without progress


def count_attempt(config: RunConfig, step: int, is_changed: bool = False) -> None:
    """Record in attempts.json that the run trains from a step; called by one rank.

    Args:
        is_changed: with other settings than before, so that earlier starts do not count.

    Raises:
        NoProgressError: it has been there too often.
    """
    path, limit = config.run_dir / _ATTEMPTS, config.train.max_stalled_starts
    before = read_json(path)
    is_same = isinstance(before, dict) and before.get("step") == step and not is_changed
    starts = before.get("starts") if is_same else 0
    starts = starts if isinstance(starts, int) else 0
    if starts >= limit:
        raise NoProgressError(
            f"{config.run_dir} was started {starts} times from step {step} and never came to "
            f"its next checkpoint (train.max_stalled_starts={limit}); look at how these ended, "
            f"and delete {path} to try again"
        )
    write_text(path, json.dumps({"step": step, "starts": starts + 1}) + "\n")


# ------------------------------------------------------------------ unreadable samples


class SkippedLog:
    """skipped.jsonl: unreadable samples, their substitutes, and the limit of their number.

    All ranks count the same samples, so all stop or none. Made by `open`.
    """

    def __init__(self, path: Path, max_skipped: int, is_main: bool, before: list[Skipped]) -> None:
        self._path, self._max_skipped, self._is_main = path, max_skipped, is_main
        self._known, self._untold = before, list[Skipped]()

    @classmethod
    def open(cls, run_dir: Path, max_skipped: int, is_main: bool) -> Self:
        """Log of a run directory; what it holds already counts too.

        Args:
            max_skipped: different samples that may be skipped, over the whole run.

        Collectives: two gathers of objects.
        """
        path = run_dir / "skipped.jsonl"
        with collectives.raised_together():
            before = _read_skipped(path) if is_main else []
        return cls(path, max_skipped, is_main, collectives.gather_objects(before)[0])

    def __len__(self) -> int:
        """Different samples that were skipped, before a resume too."""
        return len({skipped.sample for skipped in self._known})

    def add(self, step: int, local: list[Skipped]) -> None:
        """Record what all ranks skipped in a step, and check the limit.

        Raises:
            DataError: on all ranks, naming shards, when more samples were skipped than may be.

        Collectives: two gathers of objects.
        """
        gathered = [skipped for part in collectives.gather_objects(local) for skipped in part]
        before = {skipped.sample for skipped in self._known}
        new = {skipped.sample: skipped for skipped in gathered if skipped.sample not in before}
        self._known += gathered
        with collectives.raised_together():
            if self._is_main:
                rows = [{"step": step, **redacted(skipped._asdict())} for skipped in gathered]
                append_lines(self._path, rows)
                self._untold += new.values()
        check_skipped(self._known, self._max_skipped)

    def report(self) -> None:
        """Log one line about the samples that were skipped since the last one, on the first
        rank."""
        if len(self._untold) == 1:
            _log.warning("skipped a sample: %s", self._untold[0].reason)
        elif self._untold:
            first, count = self._untold[0].reason, len(self._untold)
            _log.warning("skipped %d samples, listed in %s: %s; ...", count, self._path, first)
        self._untold.clear()


def _read_skipped(path: Path) -> list[Skipped]:
    rows = [[row.get(name) for name in Skipped._fields] for row in read_lines(path)]
    found = [Skipped._make(row) for row in rows]
    return [skipped for skipped in found if isinstance(skipped.sample, int)]


# ------------------------------------------------------------------ one run at a time


@contextmanager
def locked(run_dir: Path, is_main: bool, checkpoints_before: list[Path]) -> Iterator[None]:
    """Lock of the run directory, by its file system: it is gone with the process.

    Args:
        checkpoints_before: those that were there before the run was opened.

    Raises:
        LockedError: on all ranks: another run holds it.
        ChangedError: on all ranks: another run has written checkpoints since.
        ConfigError: on all ranks: it is another folder on some of them.

    Collectives: three gathers of objects, on entering.
    """
    token = f"{_this_process()} {uuid.uuid4().hex}\n"
    with ExitStack() as held:
        with collectives.raised_together(), writable(run_dir):
            if is_main:
                run_dir.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(_acquire(run_dir, checkpoints_before))
                file.truncate(0)
                file.write(token.encode())
                os.fsync(file.fileno())
        host, token = collectives.gather_objects((platform.node(), token))[0]
        with collectives.raised_together():
            if not is_main:
                _check_shared(run_dir, host, token)
        yield


def _acquire(run_dir: Path, checkpoints_before: list[Path]) -> IO[bytes]:
    # Not flock: data workers would inherit that, and hold it after a rank that was killed. This
    # kind is lost when the process closes any handle of the file, so that nothing else may open it.
    file = open_own(run_dir / _LOCK, "r+b")
    try:
        if os.fstat(file.fileno()).st_nlink > 1:  # its other name's content would be lost
            raise ConfigError(f"{run_dir / _LOCK} is a link to another file; delete it")
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


def _await_lock(file: IO[bytes], run_dir: Path) -> None:
    waited_s = 0.0
    while not _try_lock(file, run_dir):
        file.seek(0)
        owner = file.read(_MOST_OWNER).decode(errors="replace")
        is_same_job = owner.split(" of process ")[0] == _slurm_job() != ""
        if waited_s >= (_OWN_PATIENCE_S if is_same_job else _PATIENCE_S):
            raise LockedError(
                f"{run_dir} is being written by {owner.rpartition(' ')[0] or 'another process'}; "
                f"wait for its end, or choose another run_dir"
            )
        time.sleep(_POLL_S)
        waited_s += _POLL_S


def _try_lock(file: IO[bytes], run_dir: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            _log.warning(
                "%s: the file system has no locks; a second run in it would not be noticed", run_dir
            )
            return True
        return False
    return True


def _check_shared(run_dir: Path, first_host: str, token: str) -> None:
    """Wait until this rank reads the token that the first rank has written.

    Not for the first rank, which would lose its lock by closing the file.
    """
    for _ in range(int(_SHARED_S / _POLL_S)):
        try:
            if (run_dir / _LOCK).read_text() == token:
                return
        except OSError:
            pass
        time.sleep(_POLL_S)
    raise ConfigError(
        f"run_dir={run_dir} on {platform.node()} is not the folder that {first_host} writes to; "
        f"put it on a file system that all nodes share"
    )


def _slurm_job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"SLURM job {job}" if job else ""


def _this_process() -> str:
    job = _slurm_job()
    return f"{f'{job} of ' if job else ''}process {os.getpid()} on {platform.node()}"
