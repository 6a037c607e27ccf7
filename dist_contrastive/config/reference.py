"""Reference of the settings: key, type, default, limits, unit and help of each, from the Configs.

Help is the docstring under a field. Python does not keep it, so it is read from the source, when
it is asked for.
"""

import ast
import inspect
import json
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from dist_contrastive.config.run import RunConfig
from dist_contrastive.errors import ConfigError
from dist_contrastive.sentences import limits, meant, no_setting
from dist_contrastive.settings import IMPORT_PATH, Choice, Settings, keys_of, settings_in

_UNITS = {"_s": "seconds", "_mb": "MiB", "_bytes": "bytes", "steps": "steps", "_every": "steps"}
_NAMES = {type(None): "null", Any: "any", dict: "group"}
REQUIRED = "required"


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        key: name in the file, dots for nesting, as ``optim.lr``.
        when: which component it belongs to, as ``task.loss.name=infonce``; empty: always there.
        type: in YAML's terms.
        default: as JSON, or ``required``.
        limits: of the value, or of each one in a list.
        unit: of the value, where it has one.
        help: first sentences of the field's docstring.
    """

    key: str
    when: str
    type: str
    default: str
    limits: str
    unit: str
    help: str


def reference(section: str | None = None) -> list[Row]:
    """Settings of a run, in the order of the file.

    Args:
        section: a key, as ``optim.lr`` or ``task.loss``, or a name in it, or that of a component,
            as ``infonce``; None: all.

    Raises:
        ConfigError: no key has such a name.
    """
    rows = _merged(_rows(RunConfig, "", ""))
    if section is None:
        return rows
    chosen = [
        row for row in rows if section in _names(row) or f"{row.key}.".startswith(f"{section}.")
    ]
    if not chosen:
        names = list(dict.fromkeys(name for row in rows for name in _names(row)))
        near = meant(section, names, [row.key for row in rows])
        hint = f"did you mean {near}?" if near else f"known: {', '.join(_sections(rows))}"
        raise ConfigError(
            f"there is no setting or section {section!r}{no_setting(section)}; {hint}"
        )
    return chosen


def key_of(word: str) -> str | None:
    """The key that a word means, as ``optim.lr`` for lr, --lr or learning_rate; None: none."""
    keys = list(dict.fromkeys(keys_of(RunConfig)))
    word = word.lstrip("-").partition("=")[0]
    return word if word in keys else meant(word, [], keys)


def _names(row: Row) -> list[str]:
    """Names by which a setting is found: those in its key, and its components."""
    return [*row.key.split("."), *row.when.rpartition("=")[2].split("|")]


def as_json(rows: Iterable[Row]) -> str:
    """Rows as a JSON list of objects; defaults are values, and absent where required."""
    objects = []
    for row in rows:
        values = asdict(row)
        values["required"] = row.default == REQUIRED
        values["default"] = None if values["required"] else json.loads(row.default)
        objects.append(values)
    return json.dumps(objects, indent=1, ensure_ascii=False)


@cache
def help_of(cls: type[Settings], name: str) -> str:
    """Docstring under a field, that of the nearest class that has one; of ``name`` the class's."""
    if name == "name" and _chosen(cls):
        return _one_line(cls.__doc__ or "")
    for owner in cls.__mro__:
        if issubclass(owner, Settings) and (text := _docstrings(owner).get(name)):
            return _one_line(text)
    return ""


@cache
def _docstrings(cls: type[Settings]) -> dict[str, str]:
    """Docstrings under the fields of a class itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=help)):
                found[name] = str(help)
    return found


def _rows(cls: type[Settings], prefix: str, when: str) -> Iterator[Row]:
    for name, field in cls.model_fields.items():
        key = f"{prefix}{name}"
        annotation = (
            Annotated[field.annotation, *field.metadata] if field.metadata else (field.annotation)
        )
        yield Row(
            key,
            when,
            _type_text(annotation),
            _default_text(field),
            ", ".join(dict.fromkeys(limits(annotation))),
            next((unit for end, unit in _UNITS.items() if name.endswith(end)), ""),
            help_of(cls, name),
        )
        for inner in settings_in(field.annotation, field.metadata):
            chosen = _chosen(inner)
            yield from _rows(inner, f"{key}.", f"{key}.name={chosen}" if chosen else when)


def _chosen(cls: type[Settings]) -> str | None:
    """Name by which a component is chosen; None of a group that has one of several names."""
    names = get_args(cls.model_fields["name"].annotation) if "name" in cls.model_fields else ()
    return names[0] if len(names) == 1 else None


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in the component that they belong to as one, its names joined."""
    merged: dict[Row, list[str]] = {}
    for row in rows:
        names = merged.setdefault(replace(row, when=""), [])
        if row.when not in names:
            names.append(row.when)
    return [replace(row, when=_joined(names)) for row, names in merged.items()]


def _joined(conditions: list[str]) -> str:
    """``a.name=x`` and ``a.name=y`` as ``a.name=x|y``."""
    values: dict[str, list[str]] = {}
    for condition in filter(None, conditions):
        key, _, value = condition.partition("=")
        values.setdefault(key, []).append(value)
    return ", ".join(f"{key}={'|'.join(names)}" for key, names in values.items())


def _sections(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.key.split(".")[0] for row in rows))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Settings):
        default = default.model_dump(mode="json", exclude_defaults=True) | (
            {"name": default.name} if hasattr(default, "name") else {}
        )
    return json.dumps(to_jsonable_python(default), ensure_ascii=False)


def _type_text(annotation: Any) -> str:
    """Type in YAML's terms."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for choice in arguments[1:]:
            if isinstance(choice, Choice):
                return f"group of the {choice.kind} {' | '.join([*choice.known, IMPORT_PATH])}"
        return _type_text(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_type_text, arguments)))
    if origin is tuple:
        if arguments[-1] is ...:
            return f"list of {_type_text(arguments[0])}"
        return f"[{', '.join(map(_type_text, arguments))}]"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "group"
    name = _NAMES.get(origin or annotation)
    return name or str(getattr(annotation, "__name__", annotation))


def _one_line(text: str) -> str:
    return " ".join(text.split())
