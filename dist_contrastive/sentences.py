"""Sentences about values that a validator refuses: what is wanted, within which limits, and the
name that was perhaps meant."""

import difflib
import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dist_contrastive.errors import redacted

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

# Settings and components, and words for them that are common elsewhere; what stands behind a name
# of ours belongs to the hint. Names that are merely spelled in another way are found without.
_THEIRS = {
    # settings
    "activation_checkpointing": "gradient_checkpointing",
    "tf32": "allow_tf32 float32_matmul_precision",
    "betas": "momentum",
    "blocks": "depth",
    "blur_sigma": "blur gaussian_blur",
    "brightness": "color_jitter colour_jitter jitter",
    "clip_norm": "clip grad_clip gradient_clip_val max_grad_norm max_norm",
    "crop_area": "crop random_resized_crop",
    "data.label": "target targets",
    "data.pair": "caption captions text texts",
    "data.test": "val valid validation val_data test_data",
    "data.train": "data_dir data_path dataset dir folder path root train_data train_dir",
    "encoder": "arch architecture backbone model network",
    "erase": "cutout random_erasing",
    "final_lr_ratio": "eta_min min_lr",
    "flip": "hflip horizontal_flip random_flip",
    "global_batch_size": "batch batch_size batch_size_per_gpu bs per_device_train_batch_size",
    "greyscale": "gray grey to_gray",
    "image_size": "crop_size img_size input_size resolution",
    "init_from": "checkpoint ckpt finetune load_from warm_start weights",
    "keep_last": "save_total_limit",
    "keys_from": "gather gather_distributed local_loss",
    "log_every": "log_freq log_interval logging_steps print_freq",
    "lr": "learning_rate max_lr",
    "micro_batch_size": "accumulate_grad_batches device_batch_size gradient_accumulation_steps",
    "num_views": "n_views",
    "num_workers": "workers",
    "out": "dim embed_dim embedding_dim feature_dim output_dim proj_dim projection_dim",
    "precision": "amp autocast bf16 dtype fp16 mixed_precision",
    "run_dir": "exp_name experiment log_dir logdir output output_dir run_name save_dir workdir",
    "save_every": "checkpoint_every checkpoint_interval ckpt_every save_freq save_steps",
    "seed": "random_seed",
    "shuffle_window": "shuffle shuffle_buffer",
    "steps": "epochs iterations iters max_epochs max_iters max_steps num_epochs num_train_epochs "
    "total_steps",
    "tail": "drop_last",
    "temperature": "logit_scale t tau",
    "tracker_project": "project wandb_project",
    "trackers": "logger loggers report_to tensorboard wandb",
    "views": "aug augmentation augmentations transform transforms",
    "warmup_steps": "warmup",
    "weight_decay": "wd",
    "zero_stage": "deepspeed fsdp zero",
    # losses
    "infonce (with symmetric: true)": "clip",
    "infonce": "moco open_clip image_text pairs",
    "barlow_twins": "barlow_twins",
    "ntxent": "simclr contrastive",
    "dcl": "decoupled",
    "siglip": "sigmoid",
    "supcon": "supcon supervised_contrastive",
    # tasks
    "two_view": "simclr contrastive vicreg barlow_twins byol dino simsiam ssl swav",
    "labelled": "supervised supervised_contrastive supcon triplet",
    "paired": "clip open_clip siglip image_text pairs",
    "drift": "diffusion drifting gan generative generator",
    # networks
    "residual": "cnn convnet resnet",
    "transformers": "vit deit swin dino dinov convnext bert huggingface hf",
}
ALSO_CALLED = {
    word: [ours for ours, theirs in _THEIRS.items() if word in theirs.split()]
    for word in " ".join(_THEIRS.values()).split()
}
_ELSEWHERE = {  # what does the work of settings that others have
    "ranks are started by python -m launch.local CONFIG --ranks N, or by torchrun": "devices gpus "
    "nproc_per_node num_gpus num_processes ranks world_size",
    "the same command goes on with the run in run_dir by itself": "ckpt_path resume resume_from "
    "resume_from_checkpoint",
    "dist-contrastive eval RUN measures a run": "eval_every eval_steps val_every val_interval",
    "the rate warms up, then falls by a cosine": "lr_schedule lr_scheduler schedule scheduler",
}
_NO_SETTING = {word: text for text, theirs in _ELSEWHERE.items() for word in theirs.split()}


def shown(value: Any) -> str:
    """A value as a message has it: in YAML's words, shortened, but no part of a password."""
    is_word = value is None or isinstance(value, bool)
    text = {None: "null", True: "true", False: "false"}[value] if is_word else str(value)
    text = " ".join(redacted(text).split())
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
        wish = _WORDS[word][0] + (" or null" if type(None) in _members(annotation) else "")
        return f"should be {wish}" + (f"; set {limit}" if limit else "")
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
            values = [part.strip() for part in shown(value).strip("()[] ").split(",")]
            parts = [_example(inner, part) or part for part in values if part]
            count = len(parts) if ... in others else 1 + len(others)
            return f"[{', '.join((parts * count)[:count])}]"
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
    reason = f"; did you mean {hint}?" if hint else no_setting(name)
    return reason + f" (known: {', '.join(known)})"


def no_setting(name: str) -> str:
    """The end of a sentence about what is no setting here, and is elsewhere; empty for others."""
    reason = _NO_SETTING.get(_word(name))
    return f"; {reason}" if reason else ""


def _word(name: str) -> str:
    return name.strip("+- ").lower().replace("-", "_").replace(" ", "_")


def meant(name: str, known: list[str], elsewhere: list[str]) -> str | None:
    """The name here, or the key elsewhere, that an unknown name is likely meant for."""
    word = _word(name)
    if word in _NO_SETTING:
        return None
    family = re.split(r"[_\d]", word)[0] if re.search(r"\d", word) else ""  # resnet of resnet_50
    theirs = next((x for x in (word, family) if x in ALSO_CALLED), None)
    ours = [*ALSO_CALLED.get(theirs or "", ()), word, family]
    here = [hint for hint in ours if hint.partition(" ")[0] in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    there = [key for hint in ours for key in elsewhere if hint in (key, key.rpartition(".")[2])]
    # A word that is known, and means nothing here, is not guessed at.
    far = [] if theirs else difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return next(iter([*here, *close, *sorted(there, key=lambda key: key.count(".")), *far]), None)
