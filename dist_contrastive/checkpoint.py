"""Checkpoints: written beside, with checksums, published by one rename, verified when read.

    checkpoints/step-00000200/model.safetensors    weights of the task
                              training.pt          optimizer state (loaded weights-only)
                              state.json           progress of the run, checksums; written last

A folder named step-* is complete. A crash leaves one with another name, which the next save
removes: at any instant the last complete checkpoint is there and usable.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_contrastive.errors import ConfigError, DataError

FORMAT = 1
WEIGHTS, TRAINING, STATE = "model.safetensors", "training.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED, _REMOVED = ".writing-", ".removing-"
Mode = Literal["min", "max"]


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
        """Weights by name, on the CPU."""
        return load_file(self.folder / WEIGHTS)

    def optimizer_state(self) -> dict[str, Any]:
        """Optimizer state, on the CPU."""
        return torch.load(self.folder / TRAINING, weights_only=True, map_location="cpu")


@dataclass(frozen=True)
class Keep:
    """Retention: the newest `last`, steps that are a multiple of `every`, and the best score."""

    last: int = 2
    every: int | None = None
    best: Mode | None = None


class _DamagedError(Exception):
    """A folder that does not hold a checkpoint as it was written."""


# ------------------------------------------------------------------ reading


def newest(root: Path, warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """Newest checkpoint that is not damaged; None if there is none at all.

    Args:
        warn: receives a sentence for each newer one that is damaged.

    Raises:
        DataError: there are checkpoints, but every one is damaged.
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
            f"delete the folder to train from the start"
        )
    return None


def best(root: Path, mode: Mode, verify: bool = True) -> Checkpoint | None:
    """Undamaged checkpoint with the lowest or highest score, the earlier of equal ones; None if
    none has a score."""
    scored = []
    for folder in folders(root):
        try:
            checkpoint = _read(folder, verify)
        except _DamagedError:
            continue
        if checkpoint.score is not None:
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
    """Weights of a run's newest checkpoint, or those exported."""
    exported = run_dir / WEIGHTS
    return load_file(exported) if exported.exists() else run_newest(run_dir).weights()


def newest_step(root: Path) -> int:
    """Step of the newest checkpoint by its name, damaged or not; 0 without one."""
    return max(map(_step, folders(root)), default=0)


def weights_at(path: Path) -> dict[str, Tensor]:
    """Weights by name, on the CPU, of a run's newest checkpoint, an export, a checkpoint, a file of
    safetensors or a folder of some.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    try:
        if (path / STATE).is_file():
            return _read(path).weights()
        if any((path / name).exists() for name in (WEIGHTS, "checkpoints")):
            return run_weights(path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        found = [item for file in files for item in load_file(file).items()]
    except (OSError, SafetensorError, _DamagedError) as error:
        raise ConfigError(
            f"{path} holds no weights that can be read ({error}); give whole safetensors"
        ) from error
    if not files:
        there = "holds no safetensors and no checkpoints" if path.is_dir() else "is not there"
        raise ConfigError(
            f"{path} {there}; give a run directory, an export, or a folder or file of safetensors"
        )
    if len(dict(found)) < len(found):
        raise ConfigError(f"several files in {path} have weights of the same names; give one file")
    return dict(found)


def folders(root: Path) -> list[Path]:
    """Folders of all checkpoints, in the order of their steps."""
    return sorted((p for p in root.glob("step-*") if _NAME.fullmatch(p.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read(folder: Path, verify: bool = True) -> Checkpoint:
    """Checkpoint in a folder. Raises: _DamagedError."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state.get("format", 1) > FORMAT:
            raise _DamagedError(
                f"its format {state['format']} is newer than this version's {FORMAT}"
            )
        for name, expected in state["crc32"].items():
            if verify and _checksum(folder / name) != expected:
                raise _DamagedError(f"{name} is not as it was written")
        progress = Progress(state["step"], state["consumed"], state["bad_steps"])
        return Checkpoint(folder, progress, state.get("score"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error


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
        shutil.rmtree(leftover)  # of a crash
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
    if final.exists():  # it was damaged, or the run would not have come to this step again
        _remove(final)
    unfinished.rename(final)
    flush(root)
    for folder in _expired(root, final, keep):
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


def _expired(root: Path, current: Path, keep: Keep) -> list[Path]:
    """Folders beyond the retention, and those later than the current one: they were damaged."""
    present = folders(root)
    valid = present[: present.index(current) + 1]
    kept = set(valid[-keep.last :])
    if keep.every is not None:
        kept |= {folder for folder in valid if _step(folder) % keep.every == 0}
    if keep.best is not None and (best_one := best(root, keep.best, verify=False)):
        kept.add(best_one.folder)
    return [folder for folder in present if folder not in kept]


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
    shutil.rmtree(removed)
