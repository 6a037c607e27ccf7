"""Configs as YAML files, with overrides."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from dist_contrastive.atomic import write_text
from dist_contrastive.config.run import RunConfig, map_paths
from dist_contrastive.errors import ConfigError


def load(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply ``key=value`` overrides (dots for nesting, values as YAML).

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown, missing or out of range.
    """
    return resolve(path, overrides)


def resolve(
    config: RunConfig | Mapping[str, Any] | Path | str, overrides: Sequence[str] = ()
) -> RunConfig:
    """Checked config from a YAML file, a dict or another config, with ``key=value`` overrides.

    Raises:
        ConfigError: as `load`.
    """
    where = ""
    if isinstance(config, RunConfig):
        tree = config.model_dump(mode="json")
    elif isinstance(config, Mapping):
        tree = deepcopy(dict(config))
    else:
        tree, where = _read_yaml(Path(config)), f"{config}: "
    for override in overrides:
        _apply(tree, override)
    return RunConfig.checked(tree, where)


def save(config: RunConfig, folder: Path) -> None:
    """Write the resolved config, defaults included, as folder/config.yaml."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_text(folder / "config.yaml", text)


def load_run(folder: Path | str) -> RunConfig:
    """The resolved config of a run directory, which may have been moved: its run_dir is where the
    folder is now, and its paths lead to what lies beside the folder as it did, or else to where
    they led when it was written."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run directory: it has no config.yaml; train one first")
    tree = map_paths(_read_yaml(path), _moved(Path(folder)))
    tree["run_dir"] = str(folder)
    return RunConfig.checked(tree, f"{path}: ")


def absolute(config: RunConfig) -> RunConfig:
    """The same config, whose paths of what is there do not depend on the current folder."""
    tree = config.model_dump(mode="json")
    return RunConfig.checked(map_paths(tree, lambda p: os.path.abspath(p) if _exists(p) else p))


def place(run_dir: Path) -> dict[str, str]:
    """Where a run directory and the current folder are, for environment.json."""
    return {"run_dir": os.path.abspath(run_dir), "folder": os.getcwd()}


def _moved(run_dir: Path) -> Callable[[str], str]:
    """What becomes of a path in the config of a run directory, by its environment.json."""
    try:
        before = json.loads((run_dir / "environment.json").read_text())
        was, folder = str(before["run_dir"]), str(before["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return lambda path: path
    now = os.path.abspath(run_dir)

    def lead(path: str) -> str:
        whole = os.path.join(folder, path)
        beside = os.path.normpath(os.path.join(now, os.path.relpath(whole, was)))
        if now != was and _exists(beside):
            return beside
        stays = folder == os.getcwd() or not _exists(whole)
        return path if stays else os.path.normpath(whole)

    return lead


def _exists(path: str) -> bool:
    """Whether there is such a file or folder, or the folder in which a pattern begins."""
    head = re.split(r"[*?\[{]", path)[0]
    return os.path.exists(path if head == path else os.path.dirname(head) or ".")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings; see configs/ for examples")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value, as in optim.lr=0.001")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override {override!r}: {parent} is a value, not a group of settings"
            )
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
