"""Configs as YAML files, with overrides."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from dist_contrastive.atomic import write_text
from dist_contrastive.config.run import RunConfig, map_paths
from dist_contrastive.errors import ConfigError, UserError, redacted
from dist_contrastive.imports import keep_trust, look_in, names_in, read_recorded
from dist_contrastive.records import read_json
from dist_contrastive.sentences import shown
from dist_contrastive.yaml_files import PlainLoader, parse_yaml, read_yaml

_EXPORTED = "model.safetensors"


def load(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply ``key=value`` overrides (dots for nesting, values as YAML). Of a
    run directory, or the config.yaml in one, it is that run, wherever it is now.

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
        tree, node = _read_given(Path(config))
        where, written = f"{config}: ", [((), node)]
    for override in overrides:
        written.append(_apply(tree, override))
    tree = map_paths(tree, lambda path: os.path.expanduser(path) if path.startswith("~/") else path)
    return RunConfig.checked(tree, where, lambda names: _text(written, names))


def save(config: RunConfig, folder: Path) -> None:
    """Write the resolved config, defaults included, as folder/config.yaml; without the passwords
    and signatures of URLs."""
    tree = public(config)
    text = yaml.safe_dump(tree, sort_keys=False)
    write_text(folder / "config.yaml", text)
    if names_in(tree):
        keep_trust(folder / "config.yaml", text)


def public(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, without the passwords and signatures of URLs."""
    tree: dict[str, Any] = redacted(config.model_dump(mode="json"))
    return tree


def load_run(
    folder: Path | str, granted: Collection[str] = (), is_trusted: bool = False
) -> RunConfig:
    """The resolved config of a run directory, which may have been moved: its run_dir is where the
    folder is now, and its paths lead to what lies beside the folder as it did, or else to where
    they led when it was written.

    The other arguments and errors are those of `imports.read_recorded`.
    """
    folder = Path(folder)
    tree, node = read_recorded(folder, granted, is_trusted)
    where = f"{folder / 'config.yaml'}: "
    tree = _where_it_is(folder, tree)
    return RunConfig.checked(tree, where, lambda names: _text([((), node)], names))


def load_recorded(config: RunConfig, warn: Callable[[str], None]) -> RunConfig:
    """The config in the run directory of a config that goes on with it. A crash or another version
    may have left only some settings that can be read; the others are taken as they are now.

    Args:
        warn: receives a sentence where some are.

    Raises:
        ConfigError: they are no config together.
    """
    now = config.model_dump(mode="json")
    try:
        return load_run(config.run_dir, granted=names_in(now))
    except ConfigError as error:
        problem = error
    path = config.run_dir / "config.yaml"
    try:
        known = _overlaid(now, _without_last(read_yaml(path).value))
    except ConfigError:
        known = now
    try:
        before = RunConfig.checked(known)
    except ConfigError:
        raise problem from None
    warn(
        f"{path} is damaged, or was written by another version ({problem}); only those of its "
        f"settings that can be read and are known are compared"
    )
    return before


def _without_last(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings without the last of them, which a crash may have cut short."""
    others = dict(tree)
    name, value = others.popitem() if others else ("", None)
    return others | ({name: _without_last(value)} if isinstance(value, dict) else {})


def _overlaid(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The settings of now, with earlier values where there are some."""
    both = {name: (value, before.get(name, value)) for name, value in now.items()}
    return {
        name: _overlaid(new, old) if isinstance(new, dict) and isinstance(old, dict) else old
        for name, (new, old) in both.items()
    }


def _read_given(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """Settings in a file that the user gives, whose wish it is what they import; and how they were
    written. Of a run directory, those of the run that is there now."""
    path = path / "config.yaml" if (path / "config.yaml").is_file() else path
    folder, beside = path.parent, ("checkpoints", "environment.json", _EXPORTED)
    if path.name == "config.yaml" and any((folder / name).exists() for name in beside):
        tree, node = read_recorded(folder)
        is_run = _recorded_place(folder) is not None and not (folder / _EXPORTED).exists()
        return _where_it_is(folder, tree) if is_run else tree, node
    read = read_yaml(path)
    look_in(path.parent, Path.cwd())
    return read.value, read.node


def absolute(config: RunConfig) -> RunConfig:
    """The same config, whose paths of what is there do not depend on the current folder."""
    tree = config.model_dump(mode="json")
    return RunConfig.checked(map_paths(tree, lambda p: os.path.abspath(p) if _exists(p) else p))


def place(run_dir: Path) -> dict[str, str]:
    """Where a run directory and the current folder are, for environment.json."""
    return {"run_dir": os.path.abspath(run_dir), "folder": os.getcwd()}


def _where_it_is(run_dir: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run directory, which may have been moved."""
    return map_paths(tree, _moved(run_dir)) | {"run_dir": str(run_dir)}


def _moved(run_dir: Path) -> Callable[[str], str]:
    """What becomes of a path in the config of a run directory, by its environment.json."""
    before = _recorded_place(run_dir)
    if before is None:
        return lambda path: path
    (was, folder), now = before, os.path.abspath(run_dir)

    def lead(path: str) -> str:
        whole = os.path.join(folder, path)
        beside = os.path.normpath(os.path.join(now, os.path.relpath(whole, was)))
        if now != was and _exists(beside):
            return beside
        stays = folder == os.getcwd() or not _exists(whole)
        return path if stays else os.path.normpath(whole)

    return lead


def _recorded_place(run_dir: Path) -> tuple[str, str] | None:
    """What `place` has written into environment.json; None if it is not there."""
    try:
        before = read_json(run_dir / "environment.json")
        return str(before["run_dir"]), str(before["folder"])
    except (UserError, KeyError, TypeError):
        return None


def _exists(path: str) -> bool:
    """Whether there is such a file or folder, or the folder in which a pattern begins."""
    head = re.split(r"[*?\[{]", path)[0]
    return os.path.exists(path if head == path else os.path.dirname(head) or ".")


_Written = tuple[tuple[str, ...], yaml.Node | str]
"""Names of a key, and the YAML of its value; or its value as it was given."""


def _apply(tree: dict[str, Any], override: str) -> _Written:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{shown(override)}' is not key=value, as in optim.lr=0.001")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override '{shown(override)}': {parent} is a value, not a group of settings"
            )
    tree[last] = _value(override, value.strip())
    return (*parents, last), "" if tree[last] is None else value.strip()


def _value(override: str, text: str) -> Any:
    """Value of an override: a number, a word, a text as it stands, or a list or group in YAML.

    Only in quotes and brackets a character means something: # begins no comment.
    """
    try:
        value, node = parse_yaml(text)
    except ValueError:
        if text[0] in "[{\"'":
            raise ConfigError(
                f"override '{shown(override)}': the value is not YAML; quote it"
            ) from None
        return text
    if isinstance(node, yaml.ScalarNode) and node.style not in ("'", '"'):
        loader = PlainLoader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        try:
            return loader.construct_object(yaml.ScalarNode(tag, text))
        except yaml.YAMLError:
            return text
    return value


def _text(written: list[_Written], names: Sequence[str]) -> str | None:
    """A scalar as it was written, but null; the last override of a key counts."""
    for key, value in reversed(written):
        if key == tuple(names[: len(key)]):
            if isinstance(value, str) and len(key) == len(names):
                return value or None
            node = parse_yaml(value)[1] if isinstance(value, str) else value
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
