"""YAML as plain settings: of bounded size, every key once, errors in one short sentence."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_contrastive.errors import ConfigError
from dist_contrastive.sentences import shown

_MOST_BYTES = 1 << 18  # of a file
_MOST_VALUES = 20_000  # of a file, those that aliases repeat counted each time
_CHARACTERS = 100  # of a text that count as a value
_DEEPEST, _NESTED = 100, "it is nested too deeply"
_YAML = "tag:yaml.org,2002:"
_MERGE = f"{_YAML}merge"
_PLAIN = [f"{_YAML}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]
_WORDS = (f"{_YAML}null", f"{_YAML}bool", _MERGE)


class PlainLoader(yaml.SafeLoader):
    """Safe loader to which 1e-3 is a number, and dates (names of folders), 010 (eight to YAML) and
    1:30 (ninety) are texts; what parsers of scalars raise is an error of YAML."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as in the base class
        first: [(tag, form) for tag, form in resolvers if tag in _WORDS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > _DEEPEST:  # the time to read on would be its square
            raise yaml.MarkedYAMLError(problem=_NESTED, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # int and float have their own
            kind = node.tag.rpartition(":")[2]
            reason = f"this is no {kind}: {shown(getattr(node, 'value', ''))}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error


for _kind, _form in {
    "int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+|0b[01]+)$",
    "float": r"[-+]?((\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|\.nan$",
}.items():
    PlainLoader.add_implicit_resolver(f"{_YAML}{_kind}", re.compile(_form), list("-+.0123456789"))


class _TextLoader(PlainLoader):
    """Loader to which all scalars are texts."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # as in the base class


class Document(NamedTuple):
    """Settings in a file, how they were written, and the text of the file."""

    value: dict[str, Any]
    node: yaml.Node
    text: str


def parse_yaml(text: str, as_text: bool = False) -> tuple[Any, yaml.Node | None]:
    """Value of a YAML document, made of dicts, lists and plain scalars; and how it was written.

    Args:
        as_text: all scalars are texts.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    loader = None
    try:
        loader = _TextLoader(text) if as_text else PlainLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check(node, {}, set())
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{shown(error.problem)}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position} is not text") from None
    except RecursionError:
        raise ValueError(_NESTED) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check(node: Any, known: dict[int, int], around: set[int]) -> int:
    """Number of values in a node. Refuses keys that stand twice, and what aliases blow up."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in around:
        raise _problem("an alias stands for what it is a part of", node)
    if node.tag not in _PLAIN:
        kind = shown(node.tag.removeprefix(_YAML))
        raise _problem(f"settings hold no {kind}: write a text, a number, a list or a group", node)
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [value for _, value in parts]
    around.add(id(node))
    length = len(node.value) // _CHARACTERS if isinstance(node, yaml.ScalarNode) else 0
    count = 1 + length + sum(_check(part, known, around) for part in parts)
    around.remove(id(node))
    if count > _MOST_VALUES:
        raise _problem(f"more than {_MOST_VALUES} values, with those that aliases repeat", node)
    known[id(node)] = count
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    keys = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key is a list or a group; give it a name", key)
        if key.tag != _MERGE and (key.tag, key.value) in keys:
            raise _problem(f"the key {shown(key.value)} stands twice", key)
        keys.add((key.tag, key.value))


def _problem(text: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def read_yaml(path: Path, as_text: bool = False) -> Document:
    """Settings in a YAML file.

    Args:
        as_text: as of `parse_yaml`.

    Raises:
        ConfigError: it cannot be read, is too large, is not YAML, or holds no settings.
    """
    try:
        with path.open("rb") as file:  # it may be a pipe, or endless
            data = file.read(_MOST_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the config {path}: {reason}; give a YAML file, as those in configs/"
        ) from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(
            f"cannot read the config {path}: it has more than {_MOST_BYTES} bytes; give a file of "
            f"settings"
        )
    try:
        tree, node = parse_yaml(text, as_text)
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML: {error}; see configs/ for examples") from None
    if not isinstance(tree, dict) or node is None:
        raise ConfigError(f"{path} holds no settings; see configs/ for examples")
    return Document(tree, node, text)
