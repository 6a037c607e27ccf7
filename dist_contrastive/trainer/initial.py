"""Weights that a run starts from: those of another run, an export, or any folder of safetensors."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from dist_contrastive import checkpoint
from dist_contrastive.errors import ConfigError
from dist_contrastive.models import MomentumCopy
from dist_contrastive.tables import format_table
from dist_contrastive.tasks import Task

_MOST = 3  # names in a cell of the table, or in a message
_log = logging.getLogger(__name__)
_Reasons = dict[str, str | None]  # why each weight is not taken; None: it is
_Copies = dict[str, tuple[MomentumCopy, nn.Module]]


def load_initial(task: Task, source: Path, strict: bool, is_main: bool) -> None:
    """Put the weights at `source` into the task, and log a table of what was taken and what not.

    Where none of their names is the task's, they are those of one of its parts, as of the encoder.
    A momentum copy for which there are none is that of the new weights.

    Args:
        strict: they must be those of the task, all of them, of the same shapes.

    Raises:
        ConfigError: there are none; they are not finite; none fits, or with `strict` not all.
    """
    expected = {n: x for n, x in task.state_dict().items() if not _is_in(n, task.state_of_run)}
    given = _by_name_in_task(checkpoint.weights_at(source), expected)
    given = {n: x for n, x in given.items() if not _is_in(n, task.state_of_run)}
    reasons: _Reasons = {name: _reason(name, given, expected) for name in {**expected, **given}}
    renewed = {} if strict else _renewed(task.momentum_copies(), reasons)
    reasons |= {n: "copied from the new weights" for n in expected if _is_in(n, renewed)}
    if is_main:
        _log.info("init_from=%s\n%s", source, _table(reasons, expected))
    fitting = {name: given[name] for name, why in reasons.items() if why is None}
    _check(source, reasons, fitting, strict)
    task.load_state_dict({**task.state_dict(), **fitting})
    for copy, module in renewed.values():
        copy.update(module, momentum=0.0)


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _renewed(copies: _Copies, reasons: _Reasons) -> _Copies:
    """Momentum copies for which there are not all weights."""
    missing = [name for name, why in reasons.items() if why is not None]
    return {
        name: copies[name] for name in copies if any(_is_in(other, [name]) for other in missing)
    }


def _by_name_in_task(given: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the task's names, if without their beginning these are theirs."""
    if given.keys() & expected.keys():
        return given
    prefixes = Counter(
        name.removesuffix(other)
        for name in expected
        for other in given
        if name.endswith(f".{other}") and given[other].shape == expected[name].shape
    )
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    return {f"{prefix}{name}": value for name, value in given.items()}


def _reason(name: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    if name not in given:
        return "not there"
    if name not in expected:
        return "not of this task"
    there, here = list(given[name].shape), list(expected[name].shape)
    return None if there == here else f"{there} there, {here} here"


def _table(reasons: _Reasons, expected: Mapping[str, Tensor]) -> str:
    parts = dict.fromkeys(name.partition(".")[0] for name in reasons)
    rows = []
    for part in parts:
        inside = {name: why for name, why in reasons.items() if name.partition(".")[0] == part}
        count = sum(why is None for why in inside.values())
        total = sum(name in expected for name in inside)
        rows.append((part, f"{count} of {total}", _missing(inside) or "-"))
    return format_table(("part", "taken", "not taken"), rows)


def _missing(reasons: _Reasons) -> str:
    """The first few weights that are not taken, by the reason why."""
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        if why is not None:
            by_reason.setdefault(why, []).append(name)
    texts = []
    for why, names in by_reason.items():
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        texts.append(f"{', '.join(names[:_MOST])}{more}: {why}")
    return "; ".join(texts)


def _check(source: Path, reasons: _Reasons, fitting: Mapping[str, Tensor], strict: bool) -> None:
    for name, value in fitting.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigError(
                f"init_from={source}: {name} holds NaN or infinity; give weights that are finite, "
                f"as those of an earlier checkpoint"
            )
    if fitting and not (strict and any(reasons.values())):
        return
    fix = (
        f"set init_strict=false to take the {len(fitting)} that are, or change the task's settings"
    )
    if not fitting:
        fix = "give the weights of a run whose networks are like these, or leave it out"
    raise ConfigError(
        f"init_from={source} holds other weights than this task has: {_missing(reasons)}; {fix}"
    )
