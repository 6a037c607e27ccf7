"""Checkpoints: written beside, with checksums, published by one rename, verified when read.

    checkpoints/step-00000200/model.safetensors    weights of the task
                              training.pt          optimizer state (loaded weights-only)
                              state.json           progress of the run, checksums; written last

A folder named step-* is complete. A crash leaves one with another name, which the next save
removes: at any instant the last complete checkpoint is there and usable.

Damage is what a checksum shows, or a file that is not there. What cannot be read for another
reason may be sound: it ends the run, and stays. Damaged ones are set aside, never removed.
"""

import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_contrastive.errors import ConfigError, DataError, UserError
from dist_contrastive.records import MISSING, check_sums, readable

FORMAT = 1
WEIGHTS, TRAINING, STATE = "model.safetensors", "training.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED, _REMOVED, _SET_ASIDE = ".writing-", ".removing-", "set-aside-"
_MOST = 2**53  # steps or samples
Mode = Literal["min", "max"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Position of a run; with config and data it determines everything that follows."""

    step: int = 0
    consumed: int = 0  # samples of the stream, over all ranks
    bad_steps: int = 0  # the last ones in a row that were not finite and changed nothing


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint on disk whose files match their checksums."""

    folder: Path
    progress: Progress
    score: float | None = None  # the metric of `train.keep_best`, if it was measured

    def weights(self) -> dict[str, Tensor]:
        """Weights by name, on the CPU. Raises: DataError, StorageError."""
        return _read_weights(self.folder / WEIGHTS)

    def optimizer_state(self) -> dict[str, Any]:
        """Optimizer state, on the CPU. Raises: DataError, StorageError."""
        path = self.folder / TRAINING
        with readable(path):
            return torch.load(path, weights_only=True, map_location="cpu")


@dataclass(frozen=True)
class Keep:
    """Retention: the newest `last`, steps that are a multiple of `every`, and the best score."""

    last: int = 2
    every: int | None = None
    best: Mode | None = None


class _DamagedError(Exception):
    """A folder that does not hold a checkpoint as it was written."""


def _read_weights(path: Path) -> dict[str, Tensor]:
    with readable(path):
        return load_file(path)


# ------------------------------------------------------------------ reading


def newest(root: Path, warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """Newest checkpoint that is not damaged; None if there is none at all.

    Args:
        warn: receives a sentence for each newer one that is damaged.

    Raises:
        DataError: every one is damaged; or one may not be read, or is of a newer version.
        StorageError: one cannot be read for now.
    """
    problems = []
    for folder in reversed(folders(root)):
        try:
            checkpoint = _read(folder)
        except _DamagedError as error:
            problems.append(f"{folder.name}: {error}")
            continue
        for problem in problems:
            warn(f"a checkpoint is damaged ({problem}); going back to {folder.name}")
        return checkpoint
    if problems:
        raise DataError(
            f"every checkpoint in {root} is damaged ({'; '.join(problems)}); "
            f"move the folder away to train from the start"
        )
    return None


def best(root: Path, mode: Mode, verify: bool = True) -> Checkpoint | None:
    """Undamaged checkpoint with the lowest or highest score, the earlier of equal ones; None if
    none has a finite one. Raises: as `newest`."""
    scored = []
    for folder in folders(root):
        try:
            checkpoint = _read(folder, verify)
        except _DamagedError:
            continue
        if checkpoint.score is not None and math.isfinite(checkpoint.score):
            cost = checkpoint.score if mode == "min" else -checkpoint.score
            scored.append((cost, checkpoint.progress.step, checkpoint))
    return min(scored)[-1] if scored else None


def run_newest(run_dir: Path) -> Checkpoint:
    """Newest checkpoint of a run. Raises: ConfigError, without one."""
    checkpoint = newest(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train it first")
    return checkpoint


def run_weights(run_dir: Path) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint, or those exported.

    Raises: ConfigError, without any; DataError, where an export was changed; and as `newest`.
    """
    exported = run_dir / WEIGHTS
    if not exported.exists():
        return run_newest(run_dir).weights()
    with readable(run_dir):
        check_sums(run_dir)
    return _read_weights(exported)


def newest_step(root: Path) -> int:
    """Step of the newest checkpoint by its name, damaged or not; 0 without one."""
    return max(map(_step, folders(root)), default=0)


def weights_at(path: Path) -> dict[str, Tensor]:
    """Weights by name, on the CPU, of a run's newest checkpoint, an export, a checkpoint, a folder
    of checkpoints, a file of safetensors or a folder of some.

    Raises: as `run_weights`.
    """
    if path.is_file() and path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is no file of safetensors; write its weights with "
            f"safetensors.torch.save_file(), and give that"
        )
    try:
        if (path / STATE).is_file():
            return _read(path).weights()
        if any((path / name).exists() for name in (WEIGHTS, "checkpoints")):
            return run_weights(path)
        if path.is_dir() and (inside := newest(path)):
            return inside.weights()
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        found = [item for file in files for item in _read_weights(file).items()]
    except DataError as error:
        raise ConfigError(str(error)) from error
    except _DamagedError as error:
        raise ConfigError(f"{path} holds no weights that can be read: {error}") from error
    if not files:
        there = "holds no safetensors and no checkpoints" if path.is_dir() else "is not there"
        raise ConfigError(
            f"{path} {there}; give a run directory, an export, or a folder or file of safetensors"
        )
    if len(dict(found)) < len(found):
        raise ConfigError(f"several files in {path} have weights of the same names; give one file")
    return dict(found)


def folders(root: Path) -> list[Path]:
    """Folders of all checkpoints, in the order of their steps. Raises: DataError, StorageError."""
    with readable(root):
        try:
            names = os.listdir(root)  # a glob would find none where it may not look
        except MISSING:
            return []
    return sorted((root / name for name in names if _NAME.fullmatch(name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read(folder: Path, verify: bool = True) -> Checkpoint:
    """Checkpoint in a folder.

    Raises:
        _DamagedError: it is damaged. DataError, StorageError: it cannot be read.
    """
    state = _read_state(folder / STATE)
    try:
        progress = Progress(*(int(state[name]) for name in ("step", "consumed", "bad_steps")))
        checksums = {str(Path(name).name): int(value) for name, value in state["crc32"].items()}
        score = None if state.get("score") is None else float(state["score"])
        is_moved = _NAME.fullmatch(folder.name) and progress.step != _step(folder)
        is_whole = {WEIGHTS, TRAINING} <= checksums.keys()
        if is_moved or not is_whole or not all(0 <= n < _MOST for n in astuple(progress)):
            raise ValueError(f"it tells of {progress} and {sorted(checksums)}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _DamagedError(f"{STATE} lacks what it was written with: {error}") from error
    for name, expected in checksums.items() if verify else ():
        with readable(folder / name):
            try:
                is_same = _checksum(folder / name) == expected
            except MISSING:
                is_same = False
        if not is_same:
            raise _DamagedError(f"{name} is not as it was written")
    return Checkpoint(folder, progress, score)


def _read_state(path: Path) -> dict[str, Any]:
    with readable(path):
        try:
            text = path.read_bytes()
        except MISSING:
            text = b""
    try:
        state = json.loads(text)
        version = int(state.get("format", 1))
    except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"{path.name} is not as it was written: {error}") from error
    if version > FORMAT:
        raise DataError(
            f"{path.parent} is a checkpoint of a newer version: its format {version} is newer than "
            f"this version's {FORMAT}; go on with that version"
        )
    return state


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


# ------------------------------------------------------------------ writing


def save(
    root: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Any],
    keep: Keep,
    score: float | None = None,
) -> Path:
    """Write a checkpoint, then delete those beyond the retention; called by one rank.

    Args:
        root: folder of the checkpoints.
        score: metric by which the best checkpoint is chosen.

    Returns:
        Its folder.

    Raises:
        OSError: it could not be written; what was begun is removed, the others are untouched.
    """
    final = root / f"step-{progress.step:08d}"
    for leftover in [*root.glob(f"{_UNFINISHED}*"), *root.glob(f"{_REMOVED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)  # of a crash
    unfinished = root / f"{_UNFINISHED}{final.name}"
    try:
        unfinished.mkdir(parents=True)
        write_weights(unfinished / WEIGHTS, weights)
        with (unfinished / TRAINING).open("wb") as file:
            _save_state(optimizer_state, file)
        checksums = {file.name: _checksum(file) for file in sorted(unfinished.iterdir())}
        state = {"format": FORMAT, **asdict(progress), "score": score, "crc32": checksums}
        (unfinished / STATE).write_text(json.dumps(state, indent=1) + "\n")
        for path in [*unfinished.iterdir(), unfinished]:
            flush(path)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk this makes room
        raise
    if os.path.lexists(final):  # it was damaged, or the run would not have come to this step again
        _set_aside(final)
    unfinished.rename(final)
    flush(root)
    present = folders(root)
    current = present.index(final)
    for folder in present[current + 1 :]:
        if _is_damaged(folder):
            _set_aside(folder)
    for folder in _expired(root, present[: current + 1], keep):
        _remove(folder)
    return final


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    # Tensors may share memory (tied weights); safetensors wants each separate and contiguous.
    separate = {name: x.detach().cpu().clone().contiguous() for name, x in weights.items()}
    path.touch()  # as readable as the umask has it; safetensors puts a file of its own there
    mode = path.stat().st_mode
    try:
        save_file(separate, path)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def flush(path: Path) -> None:
    """fsync of a file or folder: on disk before the next step relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _expired(root: Path, present: list[Path], keep: Keep) -> list[Path]:
    """Folders beyond the retention, none where it cannot be known which is the best."""
    kept = set(present[-keep.last :])
    if keep.every is not None:
        kept |= {folder for folder in present if _step(folder) % keep.every == 0}
    try:
        if keep.best is not None and (best_one := best(root, keep.best, verify=False)):
            kept.add(best_one.folder)
    except UserError:
        return []
    return [folder for folder in present if folder not in kept]


def _is_damaged(folder: Path) -> bool:
    try:
        _read(folder)
    except _DamagedError:
        return True
    except UserError:
        pass
    return False


def _save_state(state: dict[str, Any], file: Any) -> None:
    """torch.save that raises the file's own error: on a full disk torch hides it behind another."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _remove(folder: Path) -> None:
    """Renamed first: a crash in the middle leaves nothing that looks like a checkpoint."""
    removed = folder.with_name(f"{_REMOVED}{folder.name}")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    """Give a folder a name that no checkpoint has; it is for people to look at and to delete."""
    name = f"{_SET_ASIDE}{folder.name}"
    places = (folder.with_name(f"{name}-{n}" if n > 1 else name) for n in count(1))
    place = next(place for place in places if not place.exists())
    folder.rename(place)
    _log.warning("%s is now %s; delete it when you have looked at it", folder.name, place)
