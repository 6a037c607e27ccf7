"""Python objects of all ranks, and errors that all ranks raise together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dist_contrastive.collectives.group import Group, is_distributed, world_size
from dist_contrastive.errors import NonFiniteError, UserError


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """A small picklable value of every rank, in the order of ranks. Costs two all-gathers."""
    values = [value] * world_size(group)
    if is_distributed(group):
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def raised_together(group: Group = None) -> Iterator[None]:
    """An error that one rank raises inside is raised on all ranks, at the end of the block.

    For work that ranks do by themselves (open files, write a checkpoint), without collectives
    inside: a rank that failed alone would leave the others waiting in their next one. A rank's own
    error is raised again as it is; the others raise its class with "rank N: " before the message.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if is_distributed(group):
        told = None if own is None else (type(own), str(own))
        for number, failure in enumerate(gather_objects(told, group)):
            if failure is not None and own is None:
                kind, message = failure
                kind = kind if issubclass(kind, UserError | NonFiniteError) else RuntimeError
                raise kind(f"rank {number}: {message}")
    if own is not None:
        raise own
