"""Ring exchange: each rank sends rows to the next while it receives from the previous one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.collectives.group import Group, global_rank, rank, world_size


def start_shift(
    tensors: Sequence[Tensor], rows: int, first_tag: int, group: Group = None
) -> Callable[[], list[Tensor]]:
    """Begin to send tensors to the next rank and to receive those of the previous one.

    Meanwhile the caller may compute, but not change the tensors. NCCL sends on a stream of its own,
    behind what has been computed by now and beside what follows; to wait makes the current stream
    wait, not the host. gloo sends from the CPU, through which tensors on a GPU go.

    Args:
        tensors: each [n, ...]; all ranks send the same number of them with the same trailing
            dimensions and dtypes. Nothing is sent of a tensor without rows.
        rows: how many rows arrive; the previous rank's n.
        first_tag: keeps apart several shifts at a time; needs one tag a tensor.

    Returns:
        A function that waits and returns what has arrived, each [rows, ...].
    """
    here, size = rank(group), world_size(group)
    if size == 1:
        return lambda: list(tensors)
    to, source = (global_rank(group, (here + step) % size) for step in (1, -1))
    is_staged = _is_staged(tensors[0].device, group)
    sent = [x.cpu() if is_staged else x.contiguous() for x in tensors]
    arriving = [x.new_empty(rows, *x.shape[1:]) for x in sent]
    operations = []
    for tag, (x, y) in enumerate(zip(sent, arriving, strict=True), first_tag):
        if len(x):
            operations.append(dist.P2POp(dist.isend, x, to, group, tag))
        if rows:
            operations.append(dist.P2POp(dist.irecv, y, source, group, tag))
    works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()  # kept until here: they may be read meanwhile
        return [y.to(x.device) for x, y in zip(tensors, arriving, strict=True)]

    return wait


def _is_staged(device: torch.device, group: Group) -> bool:
    """Whether tensors go through the CPU: gloo would take addresses on a GPU for the host's."""
    if device.type == "cpu":
        return False
    used: Any = group or dist.group.WORLD
    return bool(used._get_backend(device).name() == "gloo")
