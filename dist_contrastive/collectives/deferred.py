"""Checks of values that are on a GPU: measured there, and read when the next ones are to be made.

To read a number waits until the GPU has computed it, and what was queued before. One call later it
has been for long, and the wait is short; the queue goes on meanwhile.
"""

import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.collectives.group import (
    Group,
    all_gather_single,
    is_distributed,
    world_size,
)

Table = list[list[list[int]]]
"""Measures of every rank, of every input."""


@dataclass(frozen=True)
class _Check:
    raise_for: Callable[[Any], None]
    measures: Tensor  # on the host once they are ready
    ready: Any  # torch.cuda.Event, or None


class _NoGroup:
    """In the place of a group, where there is none."""


_NO_GROUP = _NoGroup()
# By group, since all of its ranks make and read them together; they end with it.
_WAITING: MutableMapping[Any, list[_Check]] = weakref.WeakKeyDictionary()


def defer_check(measures: Tensor, raise_for: Callable[[Table], None], group: Group = None) -> None:
    """Leave measures [inputs, measures] of this rank for the next `read_deferred` of the group.

    While a CUDA graph is captured nothing is left: what it replays is checked by no one.

    Args:
        raise_for: raises where measures of any rank are bad.

    Collectives: one all-gather of a few numbers, for which the host does not wait.
    """
    if _is_captured(measures):
        return
    gathered = measures[None]
    if world_size(group) > 1:
        gathered = measures.new_empty(world_size(group) * len(measures), measures.shape[1])
        all_gather_single(gathered, measures, group=group)
        gathered = gathered.unflatten(0, (-1, len(measures)))
    _leave(gathered, raise_for, group)


def check_numbers(
    numbers: Tensor, raise_for: Callable[[list[float]], None], group: Group = None
) -> None:
    """Check numbers [n]: at once, or where they are on a GPU by the next `read_deferred`.

    Args:
        raise_for: raises where they are bad; on all ranks alike if the numbers are.
    """
    if not is_on_gpu(numbers):
        raise_for(numbers.tolist())
    elif not _is_captured(numbers):
        _leave(numbers, raise_for, group)


def read_deferred(group: Group = None) -> None:
    """Raise what was wrong with the inputs of the group's last call, on all of its ranks.

    The loss of that call was NaN or infinite, most often. Call it where a loss is not finite, and
    at the end of training; losses call it first of all.

    Raises:
        ConfigError, NonFiniteError: with the words of an immediate check.

    Collectives: none.
    """
    checks = _WAITING.get(_owner(group))
    if not checks or (checks[0].ready and torch.cuda.is_current_stream_capturing()):
        return
    forget_deferred(group)
    for check in checks:
        if check.ready is not None:
            check.ready.synchronize()
        check.raise_for(check.measures.tolist())


def forget_deferred(group: Group = None) -> None:
    """Drop what `read_deferred` would read, at the end of a run."""
    _WAITING.pop(_owner(group), None)


def is_on_gpu(x: Tensor) -> bool:
    """Whether the host would wait for the number."""
    return x.is_cuda


def _owner(group: Group) -> Any:
    if group is not None:
        return group
    return dist.group.WORLD if is_distributed() else _NO_GROUP


def _is_captured(measures: Tensor) -> bool:
    return is_on_gpu(measures) and torch.cuda.is_current_stream_capturing()


def _leave(measures: Tensor, raise_for: Callable[[Any], None], group: Group) -> None:
    ready = None
    if measures.is_cuda:
        there = torch.empty(measures.shape, dtype=measures.dtype, pin_memory=True)
        measures, ready = there.copy_(measures, non_blocking=True), torch.cuda.Event()
        ready.record()
    _WAITING.setdefault(_owner(group), []).append(_Check(raise_for, measures, ready))
