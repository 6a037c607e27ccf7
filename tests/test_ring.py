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


@pytest.mark.parametrize("settings", [{"impl": "chunked", "chunk_size": 2}, {"impl": "dense"}])
def test_the_next_block_travels_while_one_is_computed(settings):
    """It is asked for before the products of this one, and the sums of this one travel beside the
    products of the next."""
    forward = ["send block", "products", "send sums", "wait for block"]
    for _ in range(1):  # blocks between the first and the last
        forward += ["send block", "products", "wait for sums", "send sums", "wait for block"]
    forward += ["products", "wait for sums", "send sums", "wait for sums"]
    for order in run_ranks(order_of_a_ring, 3, (3, 2, 4), settings):
        assert order[0] == forward
        assert order[1] == forward


def staged_or_not(is_staged: bool) -> Tensor:
    ring._is_staged = lambda device, group: is_staged
    arrive = collectives.start_shift([torch.arange(3.0) + 10 * dist.get_rank()], 3, first_tag=0)
    return arrive()[0]


def test_what_goes_through_the_cpu_arrives():
    for found in zip(*(run_ranks(staged_or_not, 2, x) for x in (False, True)), strict=True):
        assert torch.equal(*found)


def backends_that_send(backend: str) -> bool:
    group = dist.new_group(backend=backend)
    return ring._is_staged(torch.device("cuda"), group)


@pytest.mark.parametrize(("backend", "expected"), [("cpu:gloo,cuda:gloo", True)])
def test_gloo_is_not_given_tensors_of_a_gpu(backend, expected):
    assert run_ranks(backends_that_send, 2, backend) == [expected] * 2
