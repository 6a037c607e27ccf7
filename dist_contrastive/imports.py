"""The user's own code, named in configs by import paths ``package.module:NAME``.

What a config names that is given to a command is imported from the folders of `look_in`, which
come last in ``sys.path``: nothing in them takes the place of an installed module. A config that
lies in a run directory may have come from elsewhere. What it names is imported only where this
user has trained that run, as it is now, or says so; that is kept in the user's own folder.
"""

import hashlib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from dist_contrastive.atomic import write_text
from dist_contrastive.errors import ConfigError
from dist_contrastive.sentences import shown
from dist_contrastive.yaml_files import read_yaml

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d][\w.]*")
_log = logging.getLogger(__name__)
_folders: dict[str, None] = {}  # in order


def look_in(*folders: Path) -> None:
    """Folders from which modules may be imported that are installed nowhere."""
    _folders.update(dict.fromkeys(str(folder.absolute()) for folder in folders))


def looked_in() -> list[Path]:
    """Folders of `look_in`."""
    return [Path(folder) for folder in _folders]


def is_import_path(text: str) -> bool:
    """Whether a text has the form ``package.module:name``: nothing else is imported, so that
    `names_in` misses nothing."""
    return _NAME.fullmatch(text) is not None


def import_module(name: str) -> ModuleType:
    """Module of the user's. Raises: whatever its own code raises."""
    sys.path += [folder for folder in _folders if folder not in sys.path]
    return importlib.import_module(name)


def import_object(path: str, kind: str) -> Any:
    """Object at an import path ``package.module:name``. Raises: ConfigError."""
    if not is_import_path(path):
        raise ConfigError(f"the {kind} {shown(path)} is no import path; write package.module:NAME")
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(
            f"the {kind} {path} cannot be imported ({type(error).__name__}: {error}); write "
            f"package.module:NAME of a module that lies in the current folder or is installed"
        ) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ConfigError(
            f"the {kind} {path} is not there: {module} has no {name!r}; write package.module:NAME"
        ) from None
    return found


def import_class(path: str, kind: str, base: type) -> Any:
    """Class at an import path ``package.module:Class``.

    Raises:
        ConfigError: there is no such module or name, or it is no subclass of base.
    """
    found = import_object(path, kind)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{path} is no {kind}: it must be a class that inherits "
            f"{base.__module__}.{base.__qualname__}"
        )
    return found


# ------------------------------------------------------------------ what came from elsewhere


def names_in(tree: Any) -> set[str]:
    """Texts in settings that can be import paths."""
    if isinstance(tree, dict):
        return {name for value in tree.values() for name in names_in(value)}
    if isinstance(tree, list | tuple):
        return {name for value in tree for name in names_in(value)}
    return {tree} if isinstance(tree, str) and is_import_path(tree) else set()


def read_recorded(
    folder: Path, granted: Collection[str] = (), is_trusted: bool = False
) -> tuple[dict[str, Any], yaml.Node]:
    """Settings in the config.yaml of a run directory, if what they name may be imported; and how
    they were written.

    Args:
        granted: import paths that the user has named himself.
        is_trusted: the user says that the code which the config names may run.

    Raises:
        ConfigError: it is no run directory; its config cannot be read; or it names code and was not
            trained here by this user, as it is now.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run directory: it has no config.yaml; train one first")
    tree, node, text = read_yaml(path)
    require_trust(path, text, names_in(tree) - set(granted), is_trusted)
    return tree, node


def require_trust(path: Path, text: str, code: Collection[str], is_trusted: bool) -> None:
    """Refuse what a file of a run directory asks to be run, unless it is trusted.

    Args:
        path, text: of the file.
        code: what would run, for the message; nothing needs no trust.
        is_trusted: the user's word for it, which is kept.

    Raises:
        ConfigError: it is not trusted.
    """
    if not code or _is_kept(path, text):
        return
    if not is_trusted:
        raise ConfigError(
            f"{path} asks for code to be run ({sorted(code)[0]}), and this user did not start that "
            f"run as it is now, so that it may come from elsewhere; look at that code, then give "
            f"--trust to eval, export, sample or resume of {path.parent}"
        )
    look_in(Path.cwd())
    keep_trust(path, text)


def keep_trust(path: Path, text: str) -> None:
    """Keep that a file with this text may name code, and the folders where that lies."""
    entry = _entry(path, text)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(entry, json.dumps({"file": str(path.resolve()), "folders": list(_folders)}))
    except OSError as error:
        _log.warning(
            "%s cannot be written (%s): eval, sample and resume will ask for --trust",
            *(entry, error.strerror),
        )


def _is_kept(path: Path, text: str) -> bool:
    try:
        folders = json.loads(_entry(path, text).read_text())["folders"]
        look_in(*map(Path, folders))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _entry(path: Path, text: str) -> Path:
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = hashlib.sha256(f"{path.resolve()}\n{text}".encode()).hexdigest()
    return base / "dist_contrastive" / "trusted" / f"{name}.json"
