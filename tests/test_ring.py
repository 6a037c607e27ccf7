"""The ring: what travels while scores are computed, in which order it is asked for."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_contrastive import collectives, losses
from dist_contrastive.collectives import ring
from dist_contrastive.pairwise.keys import _SUMS_TAG
from dist_contrastive.testing import run_ranks

Events = list[str]


class Products(TorchDispatchMode):
    """Notes matrix products, of scores and of gradients."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self._events.append("products")
        return func(*args, **(kwargs or {}))


class Noted:
    """A work that notes when it is waited for."""

    def __init__(self, work: dist.Work, events: Events, what: str) -> None:
        self._work, self._events, self._what = work, events, what

    def wait(self) -> None:
        self._events.append(f"wait for {self._what}")
        self._work.wait()


def order_of_a_ring(sizes: tuple[int, ...], settings: dict[str, object]) -> list[Events]:
    """What this rank begins and waits for, forward and backward; what follows itself is once."""
    events: Events = []
    exchange = dist.batch_isend_irecv

    def noted(operations: list[dist.P2POp]) -> list[Noted]:
        what = "sums" if operations[0].tag >= _SUMS_TAG else "block"
        events.append(f"send {what}")
        return [Noted(work, events, what) for work in exchange(operations)]

    dist.batch_isend_irecv = noted
    torch.manual_seed(dist.get_rank())
    x, y = torch.randn(2, sizes[dist.get_rank()], 8).requires_grad_()
    loss = losses.InfoNCE(symmetric=True, keys_from="ring", **settings)
    found = []
    with Products(events):
        value = loss(x, y, sizes=sizes)
        found.append([name for name, _ in itertools.groupby(events)])
        events.clear()
        value.backward()
        found.append([name for name, _ in itertools.groupby(events)])
    return found


@pytest.mark.parametrize(
    "settings",
    [{"impl": "chunked", "chunk_size": 2}, pytest.param({"impl": "dense"}, marks=pytest.mark.slow)],
    ids=["chunked", "dense"],
)
def test_the_next_block_travels_while_one_is_computed(settings):
    """It is asked for before the products of this one, and the sums of this one travel beside the
    products of the next."""
    order = ["send block", "products", "send sums", "wait for block"]
    order += ["send block", "products", "wait for sums", "send sums", "wait for block"]
    order += ["products", "wait for sums", "send sums", "wait for sums"]
    for found in run_ranks(order_of_a_ring, 3, (3, 2, 4), settings):
        assert found == [order, order]


def staged_or_not() -> tuple[list[Tensor], list[bool]]:
    """What arrives, directly and through the CPU; whether gloo needs that on CPUs, and on GPUs."""
    group = dist.new_group(backend="cpu:gloo,cuda:gloo")
    dist.barrier(group)  # no rank ends before another one has joined
    needed = [ring._is_staged(torch.device(name), group) for name in ("cpu", "cuda")]
    arrived = []
    for is_staged in (False, True):
        ring._is_staged = lambda device, group, x=is_staged: x
        arrive = collectives.start_shift([torch.arange(3.0) + dist.get_rank()], 3, first_tag=0)
        arrived += arrive()
    return arrived, needed


def test_what_gloo_does_not_take_goes_through_the_cpu():
    for number, (arrived, needed) in enumerate(run_ranks(staged_or_not, 2)):
        assert needed == [False, True]
        for x in arrived:
            assert torch.equal(x, torch.arange(3.0) + 1 - number)
