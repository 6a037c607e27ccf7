"""Record of the settings that changed while a run went on, `changes.jsonl` in its directory.

A row for each step from which on some were others: the step, when, old and new values by name.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_contrastive.atomic import write_text
from dist_contrastive.records import read_lines

Settings = Mapping[str, Sequence[Any]]
"""Old and new value of settings by their names."""

_NAME = "changes.jsonl"
_MOST = 3  # settings that a message names


class Change(NamedTuple):
    """Settings that are others from a step on."""

    step: int
    time: str
    settings: Settings


def read_changes(run_dir: Path) -> list[Change]:
    """Changes of a run, in the order of steps; rows that are torn or not ours are left out."""
    found = []
    for row in read_lines(run_dir / _NAME):
        try:
            settings = {str(key): (old, new) for key, (old, new) in row["settings"].items()}
            found.append(Change(int(row["step"]), str(row["time"]), settings))
        except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda change: change.step)


def record_changes(run_dir: Path, step: int, settings: Settings) -> None:
    """Add the changes of a start from a step. Those of later steps, which are not there any more,
    count from this one; what is as it was before is no change; at the start nothing is."""
    before = read_changes(run_dir)
    since = [change.settings for change in before if change.step >= step] + [settings]
    merged: dict[str, Sequence[Any]] = {}
    for one in since:
        merged |= {key: (merged.get(key, pair)[0], pair[1]) for key, pair in one.items()}
    merged = {key: pair for key, pair in merged.items() if pair[0] != pair[1]}
    kept = [change for change in before if change.step < step]
    if merged and step:
        same = [change for change in before if change.step == step and change.settings == merged]
        now = Change(step, time.strftime("%Y-%m-%d %H:%M:%S"), merged)
        kept += same[:1] or [now]
    if kept != before:
        text = "".join(json.dumps(change._asdict()) + "\n" for change in kept)
        write_text(run_dir / _NAME, text)


def changes_text(settings: Settings) -> str:
    """``key: old -> new`` of the first few."""
    texts = [f"{key}: {old} -> {new}" for key, (old, new) in settings.items()]
    more = f" (and {len(texts) - _MOST} more)" if len(texts) > _MOST else ""
    return "; ".join(texts[:_MOST]) + more
