"""One more checkpoint on disk: at any instant the last complete one is there and usable."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dist_contrastive.checkpoint.choosing import Keep, to_remove
from dist_contrastive.checkpoint.content import (
    FORMAT,
    STATE,
    TRAINING,
    WEIGHTS,
    Progress,
    checksum,
)

_UNFINISHED, _GOING = ".writing-", ".removing-"


def save(
    root: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Any],
    keep: Keep,
    score: float | None = None,
) -> Path:
    """Write a checkpoint, then delete those that are not to be kept; called by one rank.

    Args:
        root: folder of the checkpoints.
        score: of this one, to compare with others.

    Returns:
        Its folder.

    Raises:
        OSError: it could not be written; what was begun is removed, the others are untouched.
    """
    final = root / f"step-{progress.step:08d}"
    _sweep(root)
    aside = root / f"{_UNFINISHED}{final.name}"
    try:
        aside.mkdir(parents=True)
        write_weights(aside / WEIGHTS, weights)
        with (aside / TRAINING).open("wb") as file:
            _save_state(optimizer_state, file)
        checksums = {file.name: checksum(file) for file in sorted(aside.iterdir())}
        state = {"format": FORMAT, **asdict(progress), "score": score, "crc32": checksums}
        (aside / STATE).write_text(json.dumps(state, indent=1) + "\n")
        for path in [*aside.iterdir(), aside]:
            flush(path)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk this makes room
        raise
    if final.exists():  # it was damaged, or the run would not have come to this step again
        _remove(final)
    aside.rename(final)
    flush(root)
    for folder in to_remove(root, final, keep):
        _remove(folder)
    return final


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    # Tensors may share memory (tied weights); safetensors wants each alone and contiguous.
    alone = {name: x.detach().cpu().clone().contiguous() for name, x in weights.items()}
    try:
        save_file(alone, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _save_state(state: dict[str, Any], file: Any) -> None:
    """On a full disk torch hides the error of the file behind one of its own."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sweep(root: Path) -> None:
    """Remove what a crash has left."""
    for leftover in [*root.glob(f"{_UNFINISHED}*"), *root.glob(f"{_GOING}*")]:
        shutil.rmtree(leftover)


def _remove(folder: Path) -> None:
    """A crash in the middle leaves nothing that looks like a checkpoint."""
    going = folder.with_name(f"{_GOING}{folder.name}")
    folder.rename(going)
    shutil.rmtree(going)


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk before the next step relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
