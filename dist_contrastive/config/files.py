"""Configs as YAML files, with overrides."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from dist_contrastive.atomic import write_text
from dist_contrastive.config.run import RunConfig
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
    """The resolved config of a run directory; its run_dir is where the folder is now."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run directory: it has no config.yaml; train one first")
    return load(path).model_copy(update={"run_dir": Path(folder)})


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
