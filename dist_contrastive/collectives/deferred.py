"""Checks of values that are on a GPU: measured there, and read when the next ones are to be made.

To read a number waits until the GPU has computed it, and what was queued before. One call later it
has been for long, and the wait is short; the queue goes on meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_contrastive.collectives.group import Group, all_gather_single, world_size

Table = list[list[list[int]]]
"""Measures of every rank, of every input."""


@dataclass(frozen=True)
class _Check:
    raise_for: Callable[[Table], None]
    measures: Tensor  # [ranks, inputs, measures], on the host once they are ready
    ready: Any  # torch.cuda.Event, or None


_WAITING: dict[Group, _Check] = {}  # by group, since all of its ranks make and read them together


def defer_check(measures: Tensor, raise_for: Callable[[Table], None], group: Group = None) -> None:
    """Leave measures [inputs, measures] of this rank for the next `read_deferred` of the group.

    While a CUDA graph is captured nothing is left: what it replays is checked by no one.

    Args:
        raise_for: raises where measures of any rank are bad.

    Collectives: one all-gather of a few numbers, for which the host does not wait.
    """
    if measures.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    gathered = measures[None]
    if world_size(group) > 1:
        gathered = measures.new_empty(world_size(group) * len(measures), measures.shape[1])
        all_gather_single(gathered, measures, group=group)
        gathered = gathered.unflatten(0, (-1, len(measures)))
    ready = None
    if gathered.is_cuda:
        there = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
        gathered, ready = there.copy_(gathered, non_blocking=True), torch.cuda.Event()
        ready.record()
    _WAITING[group] = _Check(raise_for, gathered, ready)


def read_deferred(group: Group = None) -> None:
    """Raise what was wrong with the inputs of the group's last call, on all of its ranks.

    The loss of that call was NaN or infinite, most often. Call it where a loss is not finite, and
    at the end of training; losses call it first of all.

    Raises:
        ConfigError, NonFiniteError: with the words of an immediate check.

    Collectives: none.
    """
    check = _WAITING.get(group)
    if check is None or (check.ready and torch.cuda.is_current_stream_capturing()):
        return
    del _WAITING[group]
    if check.ready is not None:
        check.ready.synchronize()
    check.raise_for(check.measures.tolist())
