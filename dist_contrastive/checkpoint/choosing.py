"""Which checkpoint a run goes on with, and which are kept."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_contrastive.checkpoint.content import Checkpoint, DamagedError, read
from dist_contrastive.errors import DataError

_NAME = re.compile(r"step-(\d{8,})")
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Keep:
    """The newest `last`, those whose step is a multiple of `every`, and the one whose score is
    lowest or highest."""

    last: int = 2
    every: int | None = None
    best: Mode | None = None


def newest(root: Path, tell: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; None if there is none at all.

    Args:
        tell: is given a sentence for each newer one that is damaged.

    Raises:
        DataError: there are checkpoints, but every one is damaged.
    """
    problems = []
    for folder in reversed(folders(root)):
        try:
            found = read(folder)
        except DamagedError as error:
            problems.append(f"{folder.name}: {error}")
            continue
        for problem in problems:
            tell(f"a checkpoint is damaged ({problem}); going back to {folder.name}")
        return found
    if problems:
        raise DataError(
            f"every checkpoint in {root} is damaged ({'; '.join(problems)}); "
            f"delete the folder to train from the start"
        )
    return None


def best(root: Path, mode: Mode, verify: bool = True) -> Checkpoint | None:
    """The one with the lowest or highest score among those that are not damaged, the earlier of
    equal ones; None: none has a score."""
    found = []
    for folder in folders(root):
        try:
            one = read(folder, verify)
        except DamagedError:
            continue
        if one.score is not None:
            found.append((one.score if mode == "min" else -one.score, one.progress.step, one))
    return min(found)[-1] if found else None


def to_remove(root: Path, current: Path, keep: Keep) -> list[Path]:
    """What `keep` does not keep, and what is later than the current one: that was damaged."""
    found = folders(root)
    here = found.index(current)
    kept = set(found[: here + 1][-keep.last :])
    if keep.every is not None:
        kept |= {folder for folder in found[: here + 1] if step_of(folder) % keep.every == 0}
    if keep.best is not None and (favourite := best(root, keep.best, verify=False)):
        kept.add(favourite.folder)
    return [folder for folder in found if folder not in kept]


def folders(root: Path) -> list[Path]:
    """Those of all checkpoints, in the order of their steps."""
    return sorted((p for p in root.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The number of steps in its name."""
    return int(folder.name.removeprefix("step-"))
