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
    where, written = "", list[_Written]()
    if isinstance(config, RunConfig):
        tree = config.model_dump(mode="json")
    elif isinstance(config, Mapping):
        tree = deepcopy(dict(config))
    else:
        tree, node = _read_yaml(Path(config))
        where, written = f"{config}: ", [((), node)]
    for override in overrides:
        written.append(_apply(tree, override))
    return RunConfig.checked(tree, where, lambda names: _text(written, names))


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
    tree = map_paths(_read_yaml(path)[0], _moved(Path(folder)))
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


class _Loader(yaml.SafeLoader):
    """YAML in which a date is text, as names of folders are, and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = "tag:yaml.org,2002:float"
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))

_Written = tuple[tuple[str, ...], yaml.Node | str]
"""Names of a key, and the YAML of its value; or its value as it was given."""


def _read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """Settings of a file, and how they were written."""
    try:
        tree, node = _parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config {path}: {reason}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or node is None:
        raise ConfigError(f"{path} holds no settings; see configs/ for examples")
    return tree, node


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    finally:
        loader.dispose()


def _apply(tree: dict[str, Any], override: str) -> _Written:
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
    tree[last] = _value(override, value.strip())
    return (*parents, last), "" if tree[last] is None else value.strip()


def _value(override: str, text: str) -> Any:
    """Value of an override: a number, a word, a text as it stands, or a list or group in YAML.

    Only in quotes and brackets a character means something: # begins no comment.
    """
    try:
        value, node = _parse(text)
    except (yaml.YAMLError, ValueError):
        if text[0] in "[{\"'":
            raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
        return text
    if isinstance(node, yaml.ScalarNode) and node.style not in ("'", '"'):
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    return value


def _text(written: list[_Written], names: Sequence[str]) -> str | None:
    """A scalar as it was written, but null; the last override of a key counts."""
    for key, value in reversed(written):
        if key == tuple(names[: len(key)]):
            if isinstance(value, str) and len(key) == len(names):
                return value or None
            node = _parse(value)[1] if isinstance(value, str) else value
            return _scalar_text(node, names[len(key) :])
    return None


def _scalar_text(node: yaml.Node | None, names: Sequence[str]) -> str | None:
    for name in names:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in reversed(node.value) if key.value == name), None)
        elif isinstance(node, yaml.SequenceNode):
            node = node.value[int(name)]
    is_text = isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null")
    return node.value if node is not None and is_text else None
