"""Record of a run's training data, `data.json` in its directory.

A resumed run must read the same samples in the same order, wherever they lie now.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_contrastive.atomic import write_text
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.source import Source
from dist_contrastive.errors import ConfigError, redacted
from dist_contrastive.records import read_json

_NAME = "data.json"
_log = logging.getLogger(__name__)


def write_record(
    run_dir: Path, config: DataConfig, sources: list[Source], example: Samples
) -> None:
    """Write data.json: of each source where it is, its size, weight and checksum; and the shapes of
    a sample, which all of them share."""
    pair = example.pair
    shapes = {
        "image": list(example.images.shape[1:]),
        "pair": list(pair.shape[1:]) if isinstance(pair, Tensor) else pair and "text",
    }
    record = [{**one, **shapes} for one in _record(config, sources)]
    write_text(run_dir / _NAME, json.dumps(record, indent=1) + "\n")


def recorded_example(run_dir: Path) -> Samples | None:
    """A black sample of the shapes that a run was trained on, for a task to be built by; None where
    it has no record of them."""
    try:
        first = json.loads((run_dir / _NAME).read_bytes())[0]
        images, pair = torch.zeros(1, *first["image"]), first["pair"]
        if pair is not None:
            pair = ("",) if pair == "text" else torch.zeros(1, *pair)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        return None
    number = torch.zeros(1, dtype=torch.int64)
    return Samples(images, None, number, number, pair)


def check_record(run_dir: Path, config: DataConfig, sources: list[Source]) -> None:
    """Refuse other samples than those that the run was trained on, if it remembers.

    Raises:
        ConfigError: another number of sources, or one with other shards or another weight.
    """
    path = run_dir / _NAME
    if not path.exists():
        return
    before, now = read_json(path), _record(config, sources)
    if not isinstance(before, list) or not all(isinstance(old, dict) for old in before):
        _log.warning("%s is damaged: whether the data are those of the run is not known", path)
        return
    if len(before) != len(now):
        raise ConfigError(_changed(run_dir, f"{len(before)} sources, now {len(now)}"))
    for old, new in zip(before, now, strict=True):
        if any(old.get(name, new[name]) != new[name] for name in ("fingerprint", "weight")):
            raise ConfigError(_changed(run_dir, f"{_text({**new, **old})}, now {_text(new)}"))


def _record(config: DataConfig, sources: list[Source]) -> list[dict[str, Any]]:
    return [
        {
            "shards": redacted(getattr(settings, "shards", settings.name)),
            "num_shards": len(source.shards),
            "samples": len(source),
            "weight": settings.weight,
            "fingerprint": source.fingerprint,
        }
        for settings, source in zip(config.sources, sources, strict=True)
    ]


def _text(source: dict[str, Any]) -> str:
    weight = f" with weight {source['weight']}" if source["weight"] else ""
    return (
        f"{source['samples']} samples in {source['num_shards']} shards of {source['shards']}"
        f"{weight} (checksum {str(source['fingerprint'])[:8]})"
    )


def _changed(run_dir: Path, what: str) -> str:
    return (
        f"{run_dir} was trained on {what}; give it the data that it was trained on, choose another "
        f"run_dir, or delete that one to start over"
    )
