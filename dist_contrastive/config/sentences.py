"""What is wrong with a config, in words."""

import difflib
from typing import Any, get_args

from pydantic_core import ErrorDetails

from dist_contrastive.settings import Settings

_LIMITS = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}


def sentence(detail: ErrorDetails, root: type[Settings]) -> str:
    """One validation error of `root` as a sentence: the setting, its value, the limit, the fix."""
    classes, names = _walk(detail["loc"], root)
    path, kind, context = ".".join(names), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = [name for cls in classes for name in cls.model_fields]
        return f"{path} is not a known setting{_nearest(names[-1], known)}"
    if kind == "union_tag_invalid":
        known = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        return f"{path}.name={context['tag']} is not known{_nearest(context['tag'], known)}"
    if kind == "union_tag_not_found":
        return f"{path}.name is missing; it says which kind of {names[-1]} to use"
    if kind == "missing":
        return f"{path} is missing; set it in the file or as {path}=VALUE"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not names:
        return message
    if isinstance(detail["input"], dict):
        return f"{path}: {message}"
    limits = {name: context[name] for name in _LIMITS if name in context}
    fix = "".join(f"; set {_LIMITS[name].format(limit)}" for name, limit in limits.items())
    return f"{path}={detail['input']}: {message}{fix}"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]}?" if near else ";") + f" (known: {', '.join(known)})"


def _walk(
    loc: tuple[int | str, ...], root: type[Settings]
) -> tuple[list[type[Settings]], list[str]]:
    """The settings classes that hold the last name of a pydantic location, and the names
    without the tags that pydantic puts in for the chosen member of a union."""
    classes: list[type[Settings]] = [root]
    names: list[str] = []
    inside = classes
    for part in loc:
        tagged = [cls for cls in classes if _tag(cls) == part]
        if tagged and not any(part in cls.model_fields for cls in classes):
            classes = tagged
            continue
        names.append(str(part))
        inside = classes
        found = [
            _classes_in(cls.model_fields[part].annotation)
            for cls in classes
            if part in cls.model_fields
        ]
        if not isinstance(part, int):
            classes = [cls for group in found for cls in group]
    return inside, names


def _tag(cls: type[Settings]) -> str | None:
    field = cls.model_fields.get("name")
    values = get_args(field.annotation) if field else ()
    return values[0] if values else None


def _classes_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in _classes_in(part)]
