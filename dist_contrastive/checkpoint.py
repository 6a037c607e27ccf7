"""Checkpoints: written aside, verified by checksum, published by one rename.

    checkpoints/step-00000200/model.safetensors    weights of the module
                              training.pt          state of the optimiser (loaded weights-only)
                              state.json           step, samples consumed, checksums; written last

A folder named step-* is complete: a crash leaves one with another name, which the next save sweeps.
"""

import json
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_contrastive.errors import DataError

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a run is; with config and data this determines everything that follows."""

    step: int = 0
    consumed: int = 0  # samples of the stream, over all ranks
    bad_steps: int = 0  # the last ones, which were not finite and changed nothing


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    progress: Progress

    def weights(self) -> dict[str, Tensor]:
        """Weights by name, on the CPU."""
        return load_file(self.folder / "model.safetensors")

    def optimizer_state(self) -> dict[str, Any]:
        """What the optimiser saved."""
        return torch.load(self.folder / "training.pt", weights_only=True, map_location="cpu")


def save(
    root: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write a checkpoint and delete all but the newest `keep_last`; called by one rank.

    Later steps, left where the run was resumed from an earlier one, are deleted too: they are
    being done again.
    """
    final = root / f"step-{progress.step:08d}"
    aside = root / f".writing-{final.name}"
    for unfinished in root.glob(".writing-*"):
        shutil.rmtree(unfinished)
    aside.mkdir(parents=True)
    # Tensors may share memory (tied weights); safetensors wants each alone and contiguous.
    save_file(
        {name: x.detach().cpu().clone().contiguous() for name, x in weights.items()},
        aside / "model.safetensors",
    )
    torch.save(optimizer_state, aside / "training.pt")
    checksums = {file.name: _checksum(file) for file in sorted(aside.iterdir())}
    state = {**asdict(progress), "crc32": checksums}
    (aside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for path in [*aside.iterdir(), aside]:
        _flush(path)
    if final.exists():  # the same step again, after a resume from an earlier one
        shutil.rmtree(final)
    aside.rename(final)
    _flush(root)
    folders = _folders(root)
    here = folders.index(final)
    for other in folders[: max(0, here + 1 - keep_last)] + folders[here + 1 :]:
        shutil.rmtree(other)
    return final


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; None if there is none at all.

    Raises:
        DataError: there are checkpoints, but every one is damaged.
    """
    problems = []
    for folder in reversed(_folders(root)):
        problem = _problem(folder)
        if problem is None:
            state = json.loads((folder / "state.json").read_text())
            names = ("step", "consumed", "bad_steps")
            progress = Progress(**{name: state[name] for name in names})
            return Checkpoint(folder, progress)
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise DataError(
            f"every checkpoint in {root} is damaged ({'; '.join(problems)}); "
            f"delete the folder to train from the start"
        )
    return None


def _folders(root: Path) -> list[Path]:
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _problem(folder: Path) -> str | None:
    try:
        checksums = json.loads((folder / "state.json").read_text())["crc32"]
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk before the next step relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
