"""Ranks of an exchange, their failures, and names that differ between torch versions."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistBackendError, DistNetworkError

Group = Any  # torch.distributed.ProcessGroup, or None for all ranks

# torch 2.13 renamed these two and warns about the old names; torch 2.11 knows only the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_GLOO = re.compile(r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting")
_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only rank, whatever process group there is: what is computed is
    what one process would."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized() and not _is_alone


def is_distributed(group: Group = None) -> bool:
    """Whether there is more than one rank to talk to."""
    return world_size(group) > 1


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size(group) if _has_group() else 1


def rank(group: Group = None) -> int:
    """This rank's place in the group; 0 without a process group."""
    return dist.get_rank(group) if _has_group() else 0


def host_device(group: Group = None) -> torch.device:
    """Device for exchanges of what the host knows: the CPU where the group reaches it (gloo beside
    NCCL), so that nobody waits for a GPU; else the GPU."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")


def global_rank(group: Group, number: int) -> int:
    """The number among all ranks of the group's member `number`."""
    return number if group is None else dist.get_global_rank(group, number)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, otherwise fp32: what scores and sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def refuse_graph() -> None:
    """To be called by backward passes that have no derivative themselves.

    Raises:
        NotImplementedError: a graph of the gradient is asked for. Without one autograd would take
            the gradient for a constant, and the second derivative would lack a part.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "a graph of the gradient is asked for (create_graph=True), which only losses of pairs "
            "with impl='dense' in one process have; use that, or leave create_graph out"
        )


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended or does not answer."""
    if isinstance(error, DistBackendError | DistNetworkError):
        return True
    # gloo reports it by the text of a RuntimeError alone.
    return type(error) is RuntimeError and _GLOO.search(str(error)) is not None
