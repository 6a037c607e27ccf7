"""Experiment trackers besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

import logging
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from dist_contrastive.atomic import write_text
from dist_contrastive.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
_ID, _IDS = "run_id", re.compile(r"[\w-]{1,64}", re.ASCII)
_log = logging.getLogger(__name__)


class Trackers:
    """Accelerate's trackers of a run. One that fails is logged and dropped: training goes on
    without it.

    Args:
        names: none on ranks other than the first.
        folder: the run directory; its file `run_id` keeps the id of the run over restarts.
        project: name under which runs are listed.
        resumed_at: steps done before; later ones, of a run that was killed, are done again.
        config: of the run, in plain values.

    Raises:
        ConfigError: a tracker is not installed, or does not start.
    """

    def __init__(
        self,
        names: tuple[TrackerName, ...],
        folder: Path,
        project: str,
        resumed_at: int,
        config: dict[str, Any],
    ) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in names:
            try:
                self._trackers.append(_start(name, folder, project, resumed_at, config))
            except ImportError as error:
                raise ConfigError(
                    f"train.trackers names {name}, which is not installed; pip install {name}, or "
                    f"leave it out"
                ) from error
            except Exception as error:
                raise ConfigError(
                    f"train.trackers: {name} does not start ({error}); leave it out, or mend that"
                ) from error

    def __call__(self, numbers: dict[str, float], step: int) -> None:
        """Send a row."""
        self._send(lambda tracker: tracker.log(numbers, step=step))

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        """Send pictures, PNG files by name, to the trackers that take some."""
        if not pictures or not self._trackers:
            return
        images = {
            name: np.asarray(Image.open(path).convert("RGB"))[None]
            for name, path in pictures.items()
        }

        def send(tracker: GeneralTracker) -> None:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(images, step=step, **layout)

        self._send(send)

    def _send(self, send: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                send(tracker)
            except Exception as error:  # whatever a tracker's own code raises
                self._drop(tracker, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: GeneralTracker, error: Exception) -> None:
        _log.warning("%s failed (%s); the training goes on without it", tracker.name, error)
        self._trackers.remove(tracker)


def _start(
    name: TrackerName, folder: Path, project: str, resumed_at: int, config: dict[str, Any]
) -> GeneralTracker:
    options: dict[TrackerName, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder, "purge_step": resumed_at + 1},
        "wandb": {"id": run_id(folder), "name": folder.name, "resume": "allow", "dir": folder},
        "trackio": {"name": f"{folder.name}-{run_id(folder)}", "resume": "allow"},
    }
    where = "tensorboard" if name == "tensorboard" else project
    tracker = LOGGER_TYPE_TO_CLASS[name](where, **options[name])
    tracker.start()
    if name != "tensorboard":  # which would make a folder of its own for them
        tracker.store_init_configuration(config)
    return tracker


def run_id(folder: Path) -> str:
    """Id of a run, created on first use, and where a crash has left none."""
    path = folder / _ID
    text = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
    if not _IDS.fullmatch(text):
        text = uuid.uuid4().hex[:16]
        write_text(path, text + "\n")
    return text
