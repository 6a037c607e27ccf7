"""Settings of a component: one strict pydantic model, the `Config` inside the component's class.

A component is a class with a nested ``Config(Settings)``: name, type, default, limit and a line of
help of each setting stand there and nowhere else. A config of a run composes these classes::

    class MyLoss(PairLoss):
        class Config(PairLoss.Config):
            name: Literal["my_loss"] = "my_loss"
            temperature: PositiveFloat = 0.1
            \"\"\"Divides the similarities.\"\"\"

Where a config chooses one of several components by its ``name``, the type of the field is an
`Annotated` base class with a `Choice`: known names, or an import path ``package.module:Class``.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from dist_contrastive.errors import ConfigError
from dist_contrastive.imports import import_class
from dist_contrastive.sentences import nearest, problem, shown

SettingsT = TypeVar("SettingsT", bound="Settings")
IMPORT_PATH = "MODULE:CLASS"
Size = Annotated[int, Field(ge=1, le=65_536)]
"""Of a dimension of a network, or another number of which larger ones cannot be meant."""
Count = Annotated[int, Field(ge=1, le=1024)]
"""Of layers, views and the like."""
ImageSize = Annotated[int, Field(ge=1, le=16_384)]
"""Side of an image in pixels."""
_MOST = 2**53
_INSIDE = (  # keys of a pydantic schema that hold other schemas
    *("choices", "definitions", "fields", "items_schema", "keys_schema", "lax_schema"),
    *("python_schema", "schema", "steps", "values_schema"),
)


def _numbers_only(schema: Any) -> Any:
    """The same schema, which takes true and false for no number: ``flip: true`` is not 1.0."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_numbers_only, schema))
    if not isinstance(schema, dict) or schema.get("function") == _NO_BOOLEAN:
        return schema
    is_literal = schema.get("type") == "literal" and not any(
        isinstance(value, bool) for value in schema["expected"]
    )
    if is_literal or schema.get("type") in ("int", "float"):
        return {"type": "function-before", "function": _NO_BOOLEAN, "schema": schema}
    is_schema = "type" in schema  # and no dictionary of schemas
    return {
        key: _numbers_only(inner) if key in _INSIDE or not is_schema else inner
        for key, inner in schema.items()
    }


def _no_boolean(value: Any) -> Any:
    return shown(value) if isinstance(value, bool) else value  # a text that is no number


_NO_BOOLEAN = {"type": "no-info", "function": _no_boolean}


class Settings(BaseModel):
    """Group of settings: immutable, and strict about unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _whole_numbers_fit(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int) and abs(one) > _MOST:
                    raise ValueError(f"{name}={shown(one)} is beyond 2**53; set a smaller one")
        return self

    @classmethod
    def checked(
        cls,
        values: Mapping[str, Any],
        where: str = "",
        as_text: Callable[[Sequence[str]], str | None] = lambda _: None,
    ) -> Self:
        """Validated settings.

        Args:
            where: prefix of the message, as the file that holds the values.
            as_text: how the value of a setting, given by the names of its key, was written. It is
                put into `values` where a text or a path is wanted: 007 is a name then, no number.

        Raises:
            ConfigError: one sentence about the first three settings that are unknown, missing or
                out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            if not _put_texts(values, error, cls, as_text):
                raise ConfigError(where + sentences(error, cls)) from None
        return cls.checked(values, where)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _numbers_only(handler(source))
        return schema


class ComponentSettings(Settings):
    """Settings of a component that a config chooses by name; components narrow ``name``."""

    name: str


@dataclass(frozen=True)
class Choice:
    """Annotation of a field that holds the settings of one component of several.

    ``Annotated[PairLoss.Config, Choice("loss", PairLoss, LOSSES)]`` accepts what the `Config` of
    one of LOSSES accepts, chosen by ``name``, or that of a subclass of PairLoss named by its import
    path.

    Attributes:
        kind: what is chosen, for messages.
        base: what a class named by an import path must inherit.
        known: components by name.
        unfit: why a class with an import path cannot be used in this place; None if it can.
        default: name to take where none is given.
    """

    kind: str
    base: type
    known: Mapping[str, type]
    unfit: Callable[[Any], str | None] = lambda _: None
    default: str | None = None

    def __hash__(self) -> int:
        return id(self)

    def component(self, name: str) -> Any:
        """The class of a known name or an import path. Raises: ConfigError."""
        return self.known[name] if name in self.known else self._imported(name)

    def build(self, settings: ComponentSettings, *args: Any, **kwargs: Any) -> Any:
        """``Class(settings, *args, **kwargs)`` of the class that the settings name."""
        return self.component(settings.name)(settings, *args, **kwargs)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        choices: dict[str, CoreSchema] = {
            name: handler.generate_schema(cls.Config)  # type: ignore[attr-defined]
            for name, cls in self.known.items()
        }
        choices[IMPORT_PATH] = core_schema.no_info_plain_validator_function(self._from_path)
        return core_schema.tagged_union_schema(
            choices,
            self._tag,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda settings, info: settings.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def _tag(self, value: Any) -> str | None:
        name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
        name = self.default if name is None else name
        return IMPORT_PATH if isinstance(name, str) and ":" in name else name

    def _from_path(self, value: Any) -> Settings:
        if isinstance(value, Settings):
            return value
        try:
            config = _with_any_name(self._imported(value["name"]).Config)
            return config.checked(value, f"settings of {value['name']}: ")
        except ConfigError as error:
            # A ValueError inside a validator: pydantic puts the place of the field before it.
            raise PydanticCustomError("import_path", "{reason}", {"reason": str(error)}) from None

    def _imported(self, path: str) -> Any:
        cls = import_class(path, self.kind, self.base)
        if not issubclass(getattr(cls, "Config", object), ComponentSettings):
            raise ConfigError(
                f"{path} has no settings; give the class a nested Config that inherits "
                f"dist_contrastive.settings.ComponentSettings"
            )
        if reason := self.unfit(cls):
            raise ConfigError(f"{path} cannot be used here: {reason}")
        return cls


@functools.cache
def _with_any_name(config: type[Settings]) -> type[Settings]:
    """Settings class of an own component whose base is known by another name."""
    if name_of(config) is None:
        return config
    return create_model(config.__name__, __base__=config, name=(str, ...))


def settings_from(
    config: type[SettingsT], args: Sequence[Any], keywords: Mapping[str, Any]
) -> SettingsT:
    """Settings from the arguments of a constructor: settings, or values of their fields.

    Raises:
        ConfigError: a value that is unknown or out of range.
    """
    owner = config.__qualname__.removesuffix(".Config")
    if len(args) == 1 and isinstance(args[0], config):
        if keywords:
            raise TypeError(f"give {owner} its settings, or {', '.join(keywords)} with the others")
        return args[0]
    names = [name for name in ordered_fields(config) if name != "name"]
    if len(args) > len(names):
        raise TypeError(f"{owner} has {len(names)} settings, {', '.join(names)}; got {len(args)}")
    by_position = dict(zip(names, args, strict=False))
    if twice := by_position.keys() & keywords.keys():
        raise TypeError(f"{owner} got {', '.join(sorted(twice))} by position and by name")
    return config.checked({**by_position, **keywords}, f"{owner}: ")


def ordered_fields(config: type[Settings]) -> dict[str, FieldInfo]:
    """Fields as positional arguments: those of the class before inherited ones, in the order of
    declaration, but first the ones without a default."""
    names = [name for cls in config.__mro__ for name in inspect.get_annotations(cls)]
    fields = {name: config.model_fields[name] for name in names if name in config.model_fields}
    return dict(sorted(fields.items(), key=lambda item: not item[1].is_required()))


def signature_of(
    config: type[Settings], keywords: Mapping[str, inspect.Parameter]
) -> inspect.Signature:
    """Signature of a constructor that takes settings and further keyword arguments."""
    positional = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=field.annotation,
        )
        for name, field in ordered_fields(config).items()
        if name != "name"
    ]
    return inspect.Signature([*positional, *keywords.values()])


def settings_in(
    annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()
) -> list[type[Settings]]:
    """Settings classes that a field of this annotation can hold, in the order of declaration."""
    for choice in (annotation, *metadata):
        if isinstance(choice, Choice):
            return [cls.Config for cls in choice.known.values()]  # type: ignore[attr-defined]
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    arguments = get_args(annotation)
    if any(isinstance(argument, Choice) for argument in arguments):
        arguments = tuple(x for x in arguments if isinstance(x, Choice))
    return [cls for argument in arguments for cls in settings_in(argument)]


def name_of(cls: type[Settings]) -> str | None:
    """Name by which a config chooses a class of settings; None where there is no choice."""
    field = cls.model_fields.get("name")
    values = get_args(field.annotation) if field else ()
    return values[0] if values else None


def _put_texts(
    values: Any,
    error: ValidationError,
    root: type[Settings],
    as_text: Callable[[Sequence[str]], str | None],
) -> bool:
    """Put texts into the places of values that should be text; whether there were some."""
    found = False
    for detail in error.errors():
        if detail["type"] in ("string_type", "path_type"):
            names = _walk(detail["loc"], root)[1]
            if (text := as_text(names)) is not None:
                place = values
                for name in names[:-1]:
                    place = place[int(name) if isinstance(place, list) else name]
                place[int(names[-1]) if isinstance(place, list) else names[-1]] = text
                found = True
    return found


def sentences(error: ValidationError, root: type[Settings]) -> str:
    """The first three problems of a validation error, one sentence each."""
    details = error.errors()
    problems = [_sentence(one, root) for one in details if not _follows(one, details)]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _follows(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Whether a list is called too short for want of an item that is itself wrong."""
    loc = detail["loc"]
    inside = (one["loc"] for one in details if len(one["loc"]) > len(loc))
    return detail["type"] == "too_short" and any(one[: len(loc)] == loc for one in inside)


def _sentence(detail: ErrorDetails, root: type[Settings]) -> str:
    """Setting, value, limit and remedy."""
    loc, kind, value = detail["loc"], detail["type"], detail["input"]
    is_item = kind == "missing" and isinstance(loc[-1], int)  # of a list of a fixed length
    classes, names = _walk(loc[:-1] if is_item else loc, root)
    path, context = ".".join(names), detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(dict.fromkeys(name for cls in classes for name in cls.model_fields))
        if owners := _owners(names, root):
            place = f"{'.'.join(names[:-1])}.name={'|'.join(owners)}"
            known_here = ", ".join(known)
            return f"{path} is not a known setting here, but of {place} (known: {known_here})"
        if "." in names[-1]:
            nested = names[-1].replace(".", ": {") + ": VALUE" + "}" * names[-1].count(".")
            return f"{path} has dots, and in a file groups are nested; write {nested}"
        return f"{path} is not a known setting{nearest(names[-1], known, keys_of(root))}"
    if kind == "union_tag_invalid":
        known = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        tag = shown(context["tag"])
        return f"{path}.name={tag} is not known{nearest(tag, known)}"
    if kind == "union_tag_not_found":
        group = next(name for name in reversed(names) if not name.isdigit())
        if not isinstance(value, dict):
            name = shown(value) if isinstance(value, str) else "NAME"
            return (
                f"{path}={shown(value)}: should be a group of settings, as {path}={{name: {name}}}"
            )
        return f"{path}.name is missing; it says which kind of {group} to use"
    field = _field(classes, names[-1]) if names else None
    if kind == "missing" and not is_item:
        return f"{path} is missing; set it in the file or as {path}=VALUE"
    annotation = Annotated[field.annotation, *field.metadata, None] if field else None
    message = problem(detail, annotation)
    if not names:
        return message
    return f"{path}: {message}" if isinstance(value, dict) else f"{path}={shown(value)}: {message}"


def _field(classes: list[type[Settings]], name: str) -> FieldInfo | None:
    return next((cls.model_fields[name] for cls in classes if name in cls.model_fields), None)


def _owners(names: list[str], root: type[Settings]) -> list[str]:
    """Names of the components in the place of a setting that have it; another one is chosen."""
    classes = [root]
    for name in names[:-1]:
        if not name.isdigit():
            fields = [cls.model_fields[name] for cls in classes if name in cls.model_fields]
            classes = [c for f in fields for c in settings_in(f.annotation, f.metadata)]
    owners = [name_of(cls) for cls in classes if names[-1] in cls.model_fields]
    return list(dict.fromkeys(filter(None, owners)))


def keys_of(root: type[Settings], prefix: str = "") -> Iterator[str]:
    """Keys, with dots, of all settings that the file of a root may hold."""
    for name, field in root.model_fields.items():
        yield prefix + name
        for inner in settings_in(field.annotation, field.metadata):
            yield from keys_of(inner, f"{prefix}{name}.")


def _walk(
    loc: tuple[int | str, ...], root: type[Settings]
) -> tuple[list[type[Settings]], list[str]]:
    """Settings classes that hold the last name of a pydantic location, and its names without the
    tags that pydantic puts in for the chosen member of a union."""
    classes: list[type[Settings]] = [root]
    names: list[str] = []
    inside = classes
    may_be_tag = False
    for part in loc:
        if str(part)[:1] + str(part)[-1:] == "<>":  # a tag of a union of forms, as "<list>"
            continue
        tagged = [cls for cls in classes if name_of(cls) == part]
        if may_be_tag and (part == IMPORT_PATH or tagged):
            classes, may_be_tag = tagged, False
            continue
        names.append(str(part))
        inside, may_be_tag = classes, True
        if not isinstance(part, int):
            fields = [cls.model_fields[part] for cls in classes if part in cls.model_fields]
            classes = [c for f in fields for c in settings_in(f.annotation, f.metadata)]
    return inside, names
