"""Sentences about values that a validator refuses: what is wanted, within which limits, and the
name that was perhaps meant."""

import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_LONGEST = 120  # characters of a value that are shown
_MOST_NAMES = 8  # of a group that are shown
_WORDS = {
    "int": ("a whole number", "whole numbers"),
    "float": ("a number", "numbers"),
    "bool": ("true or false", "true or false"),
    "str": ("text", "texts"),
    "string": ("text", "texts"),
    "Path": ("a path", "paths"),
    "path": ("a path", "paths"),
    "dict": ("a group of settings", "groups of settings"),
    "NoneType": ("null", "null"),
}
_CONTAINERS = ("dict_type", "list_type", "model_attributes_type", "model_type", "tuple_type")
_BOUNDS = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}

# Words for a setting or a component that are common elsewhere, and ours; what stands behind ours
# belongs to the hint. Names that are merely spelled in another way are found without.
ALSO_CALLED: dict[str, tuple[str, ...]] = {
    "accumulate_grad_batches": ("micro_batch_size",),
    "amp": ("precision",),
    "batch": ("global_batch_size",),
    "batch_size": ("global_batch_size",),
    "bs": ("global_batch_size",),
    "checkpoint_every": ("save_every",),
    "clip": ("infonce (with symmetric: true)", "paired"),
    "color_jitter": ("brightness",),
    "device_batch_size": ("micro_batch_size",),
    "epochs": ("steps",),
    "fp16": ("precision",),
    "gradient_accumulation_steps": ("micro_batch_size",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "gradient_clip_val": ("clip_norm",),
    "grad_clip": ("clip_norm",),
    "img_size": ("image_size",),
    "iterations": ("steps",),
    "learning_rate": ("lr",),
    "log_interval": ("log_every",),
    "max_epochs": ("steps",),
    "max_grad_norm": ("clip_norm",),
    "max_steps": ("steps",),
    "mixed_precision": ("precision",),
    "num_epochs": ("steps",),
    "num_train_epochs": ("steps",),
    "output_dir": ("run_dir",),
    "per_device_train_batch_size": ("global_batch_size",),
    "random_seed": ("seed",),
    "resolution": ("image_size",),
    "save_steps": ("save_every",),
    "simclr": ("ntxent", "two_view"),
    "supervised": ("labelled", "supcon"),
    "supervised_contrastive": ("supcon", "labelled"),
    "supcon": ("supcon", "labelled"),
    "tau": ("temperature",),
    "total_steps": ("steps",),
    "vicreg": ("vicreg", "two_view"),
    "warmup": ("warmup_steps",),
    "wd": ("weight_decay",),
    "workers": ("num_workers",),
    "workdir": ("run_dir",),
    "zero": ("zero_stage",),
    **dict.fromkeys(("byol", "dino", "simsiam", "ssl"), ("two_view",)),
    **dict.fromkeys(("open_clip", "image_text", "pairs"), ("paired", "infonce")),
    **dict.fromkeys(("diffusion", "gan", "drifting"), ("drift",)),
    **dict.fromkeys(("convnet", "resnet18", "resnet50"), ("residual",)),
    **dict.fromkeys(("vit", "dinov2", "convnext", "huggingface", "hf"), ("transformers",)),
}


def shown(value: Any) -> str:
    """A value as a message has it: in YAML's words, shortened."""
    is_word = value is None or isinstance(value, bool)
    text = ({None: "null", True: "true", False: "false"}[value] if is_word else str(value)).strip()
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def problem(detail: ErrorDetails, annotation: Any) -> str:
    """What is wrong with a value, and what to set instead.

    Args:
        annotation: type of the setting, with its limits; None where it is not known.
    """
    kind, value = detail["type"], detail["input"]
    word, _, ending = kind.partition("_")
    if word in _WORDS and ending in ("type", "parsing", "parsing_size", "from_float"):
        limit = " and ".join(dict.fromkeys(limits(annotation)))
        return f"should be {_WORDS[word][0]}" + (f"; set {limit}" if limit else "")
    is_tuple = any(get_origin(member) is tuple for member in _members(annotation))
    if kind in _CONTAINERS or (is_tuple and kind in ("missing", "too_long")):
        if annotation is None:
            return (
                "should be a list" if word in ("list", "tuple") else "should be a group of settings"
            )
        example = _example(annotation, value) if isinstance(value, int | float | str) else ""
        return f"should be {wanted(annotation)}" + (f", as {example}" if example else "")
    context = detail.get("ctx", {})
    if kind == "too_short":
        return f"should have {context['min_length']} or more of them"
    if kind == "too_long":
        return f"should have {context['max_length']} or fewer of them"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    bounds = [text.format(context[name]) for name, text in _BOUNDS.items() if name in context]
    return message + "".join(f"; set {bound}" for bound in bounds)


def wanted(annotation: Any, is_plural: bool = False) -> str:
    """A type in words: "a list of 2 numbers"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return wanted(arguments[0], is_plural)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wanted(member, is_plural) for member in arguments))
    if origin is Literal:
        return f"{'any' if is_plural else 'one'} of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"{'lists' if is_plural else 'a list'} of {count}{wanted(arguments[0], True)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        names = list(annotation.model_fields)
        more = ", ..." if len(names) > _MOST_NAMES else ""
        return f"{_WORDS['dict'][is_plural]} ({', '.join(names[:_MOST_NAMES])}{more})"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return _WORDS.get(name, (name, name))[is_plural]


def _members(annotation: Any) -> Iterator[Any]:
    """Types that a value may have: those of a union, or the one."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _members(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _members(argument)
    else:
        yield annotation


def _example(annotation: Any, value: Any) -> str:
    """A way to write a single value where a list or a group is wanted; empty for others."""
    for member in _members(annotation):
        if get_origin(member) is tuple:
            inner, *others = get_args(member)
            if get_origin(inner) is Literal:
                value = get_args(inner)[0]
            one = _example(inner, value) or shown(value)
            return f"[{', '.join([one] * (1 if ... in others else 1 + len(others)))}]"
        if isinstance(member, type) and issubclass(member, BaseModel):
            return f"{{{next(iter(member.model_fields), 'name')}: {shown(value)}}}"
    return ""


def limits(annotation: Any) -> Iterator[str]:
    """Limits of a value, and of those inside it."""
    if get_origin(annotation) is Annotated:
        for constraint in get_args(annotation)[1:]:
            yield from _limit(constraint)
    for argument in get_args(annotation):
        yield from limits(argument)


def _limit(constraint: Any) -> Iterator[str]:
    match constraint:
        case annotated_types.Ge():
            yield f"{constraint.ge} or more"
        case annotated_types.Gt():
            yield f"more than {constraint.gt}"
        case annotated_types.Le():
            yield f"{constraint.le} or less"
        case annotated_types.Lt():
            yield f"less than {constraint.lt}"
        case annotated_types.MinLen():
            yield f"{constraint.min_length} or more of them"
        case FieldInfo():
            for inner in constraint.metadata:
                yield from _limit(inner)


def nearest(name: str, known: list[str], elsewhere: Iterable[str] = ()) -> str:
    """The end of a sentence about an unknown name: the one that was meant, and all that there are.

    Args:
        known: names that are possible in this place.
        elsewhere: keys with dots of settings in other places.
    """
    hint = meant(name, known, list(elsewhere))
    return (f"; did you mean {hint}?" if hint else "") + f" (known: {', '.join(known)})"


def meant(name: str, known: list[str], elsewhere: list[str]) -> str | None:
    """The name here, or the key elsewhere, that an unknown name is likely meant for."""
    word = name.strip("-").lower().replace("-", "_").replace(" ", "_")
    ours = [*ALSO_CALLED.get(word, ()), word]
    here = [hint for hint in ours if hint.partition(" ")[0] in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    there = [key for hint in ours for key in elsewhere if key.rpartition(".")[2] == hint]
    # A word that is known, and means nothing here, is not guessed at.
    far = [] if word in ALSO_CALLED else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return next(iter([*here, *close, *sorted(there, key=lambda key: key.count(".")), *far]), None)
