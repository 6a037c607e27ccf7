"""What a checkpoint holds."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FORMAT = 1
WEIGHTS, TRAINING, STATE = "model.safetensors", "training.pt", "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is; with config and data this determines everything that follows."""

    step: int = 0
    consumed: int = 0  # samples of the stream, over all ranks
    bad_steps: int = 0  # the last ones, which were not finite and changed nothing


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are as they were written."""

    folder: Path
    progress: Progress
    score: float | None = None  # what `train.keep_best` goes by, if it was known

    def weights(self) -> dict[str, Tensor]:
        """Weights by name, on the CPU."""
        return load_file(self.folder / WEIGHTS)

    def optimizer_state(self) -> dict[str, Any]:
        """What the optimiser saved, on the CPU."""
        return torch.load(self.folder / TRAINING, weights_only=True, map_location="cpu")


class DamagedError(Exception):
    """A folder that is no checkpoint of ours, as it was written."""


def read(folder: Path, verify: bool = True) -> Checkpoint:
    """The checkpoint in a folder.

    Args:
        verify: compare its files with their checksums.

    Raises:
        DamagedError: what is wrong with it.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        if state.get("format", 1) > FORMAT:
            raise DamagedError(
                f"its format {state['format']} is newer than this version's {FORMAT}"
            )
        for name, expected in state["crc32"].items():
            if verify and checksum(folder / name) != expected:
                raise DamagedError(f"{name} is not as it was written")
        progress = Progress(state["step"], state["consumed"], state["bad_steps"])
        return Checkpoint(folder, progress, state.get("score"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
