"""What a run is, written into its directory."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import dist_contrastive
from dist_contrastive import config as configs
from dist_contrastive.atomic import write_text
from dist_contrastive.data.record import write_record
from dist_contrastive.errors import ConfigError
from dist_contrastive.trainer.start import Run


def describe(run: Run) -> None:
    """Write config.yaml, environment.json and data.json; called by one rank.

    Raises:
        ConfigError: they cannot be written.
    """
    backend, folder = run.backend, run.config.run_dir
    environment = {
        "dist_contrastive": dist_contrastive.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.node(),
        "device": str(backend.device),
        "world_size": backend.world_size,
        "threads": torch.get_num_threads(),
    }
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        configs.save(run.config, folder)
        write_record(folder, run.config.data, run.data.sources)
        write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """What cannot be written inside is a matter of the run directory.

    Raises:
        ConfigError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run_dir={path} cannot be written ({error.strerror}); choose another folder, or make "
            f"room"
        ) from error
