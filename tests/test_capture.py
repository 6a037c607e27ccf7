"""What a CUDA graph needs of a loss, as far as it can be known without a GPU.

Captured are the kernels that one call starts. So the host may read nothing of the device, copy
nothing to it from memory that is not pinned, draw no random numbers and size nothing by data; and
a call must start what those before it have started, whatever Python holds between them.
"""

import gc
from collections.abc import Callable
from typing import Any

import no_device
import pytest
import torch
import torch.distributed as dist
from test_gpu import STEPS as PAIRS
from torch import Tensor

from dist_contrastive import collectives, losses
from dist_contrastive.backend import Backend
from dist_contrastive.collectives import deferred
from dist_contrastive.losses import PairLoss
from dist_contrastive.testing import run_ranks

FORCE = {"impl": "triton", "cache_mb": 1.0}
LOSSES: dict[str, tuple[type[PairLoss], dict[str, Any]]] = {
    **{name: (kind, {**settings, "impl": "triton"}) for name, (kind, settings) in PAIRS.items()},
    "Triplet, max_delta": (losses.Triplet, {"impl": "triton", "max_delta": 0.1}),
    "VICReg": (losses.VICReg, {}),
    "BarlowTwins": (losses.BarlowTwins, {}),
    "ContrastiveForce": (losses.ContrastiveForce, FORCE),
    "ContrastiveForce, seed": (losses.ContrastiveForce, {**FORCE, "preset": "seed"}),
}
NUM_ROWS = 256
DRAWS = ("rand", "bernoulli", "dropout", "normal", "uniform", "multinomial", "exponential")


@pytest.fixture
def started(monkeypatch) -> list[str]:
    return no_device.stand_in(monkeypatch)


def call_of(name: str, is_checked: bool) -> Callable[[], list[Tensor]]:
    """Forward and backward on static inputs."""
    kind, settings = LOSSES[name]
    loss = kind(**settings).to(no_device.DEVICE)
    num_inputs = 1 if kind.takes in ("features", "labels") else 2
    given = [
        torch.empty(NUM_ROWS, 64, dtype=torch.bfloat16, device=no_device.DEVICE, requires_grad=True)
        for _ in range(num_inputs)
    ]
    of_labels = torch.float64 if "max_delta" in settings else torch.int64
    labels = [torch.empty(NUM_ROWS, dtype=of_labels, device=no_device.DEVICE)]
    known: dict[str, Any] = {"sizes": (NUM_ROWS,)}
    if kind.takes == "points":
        known = {"counts": [(NUM_ROWS, 0, NUM_ROWS)]}
        given[1] = given[1].detach()
    wanted = [*(x for x in given if x.requires_grad), *loss.parameters()]

    def call() -> list[Tensor]:
        inputs = [*given, *(labels if kind.takes == "labels" else [])]
        value = loss(*inputs, **({} if is_checked else known))
        return [value, *torch.autograd.grad(value, wanted)]

    return call


@pytest.mark.parametrize("is_checked", [False, True], ids=["sizes given", "checked"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_may_be_captured(name, is_checked, started, monkeypatch):
    call, kind = call_of(name, is_checked), LOSSES[name][0]
    call()  # warms up
    runs = []
    for is_captured in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda x=is_captured: x)
        started.clear()
        with no_device.Waits() as found:
            call()
        assert not found.waits
        assert not [x for x in found.operators if any(draw in x for draw in DRAWS)]
        runs.append((found.operators, [*started]))
    warm, captured = runs
    assert captured[1] == warm[1], "the same kernels"
    assert warm[1] or not kind.has_kernels
    if not is_checked:  # else what is measured for the check is left out
        assert captured[0] == warm[0], "and the same operators between them"


def test_nothing_is_left_to_be_read_while_a_graph_is_captured(started, monkeypatch):
    left = []
    monkeypatch.setattr(deferred, "_leave", lambda *check: left.append(check))
    call = call_of("NTXent", is_checked=True)
    call()
    assert len(left) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call()
    assert len(left) == 1


class Ready:
    """An event of a copy, which nothing may wait for while a graph is captured."""

    def synchronize(self) -> None:
        assert not torch.cuda.is_current_stream_capturing()


def test_what_was_left_before_is_read_after(monkeypatch):
    def refuse(_: Any) -> None:
        raise ValueError("bad")

    check = deferred._Check(refuse, torch.ones(1), Ready())
    monkeypatch.setitem(deferred._WAITING, deferred._owner(None), [check])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    collectives.read_deferred()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match="bad"):
        collectives.read_deferred()
    collectives.read_deferred()  # once


def left_and_group() -> tuple[int, int, int]:
    """Checks that wait: of a group, after it is destroyed, and after a run has ended."""
    group = dist.new_group()
    dist.barrier(group)  # no rank ends before another one has joined
    for one in (group, None):
        deferred._leave(torch.ones(1, 1, 1), lambda _: None, one)
    before = len(deferred._WAITING)
    dist.destroy_process_group(group)
    del group, one
    gc.collect()
    destroyed = len(deferred._WAITING)
    Backend(Backend.Config(device="cpu")).close()
    return before, destroyed, len(deferred._WAITING)


def test_checks_end_with_their_group():
    assert run_ranks(left_and_group, 2) == [(2, 1, 0)] * 2


def test_a_lazily_made_constant_is_seen(started, monkeypatch):
    """The planted fault: a copy from the host in every call."""
    mean = PairLoss.mean

    def copying(self: PairLoss, total: Tensor, count: int | Tensor) -> Tensor:
        return mean(self, total * torch.tensor(2.0, device=total.device), count)

    monkeypatch.setattr(PairLoss, "mean", copying)
    call = call_of("NTXent", is_checked=False)
    with no_device.Waits() as found:
        call()
    assert found.waits
