"""Triton kernels that leave false negatives out, or compare continuous labels: interpreted, against
the dense specification in fp64, and counted at full size."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_kernels import (  # noqa: F401  # fixtures among them
    DIM,
    LAUNCHES,
    MEMORY,
    ROWS,
    check,
    counts,
    gradients,
    interpret,
    interpreted,
    make_pairs,
    random_pairs,
    recorded,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_contrastive import losses, pairwise
from dist_contrastive.collectives import deferred
from dist_contrastive.losses.cosine_embedding import _Embedding
from dist_contrastive.losses.siglip import _Negatives
from dist_contrastive.pairwise import LogSumExp, LogSumExpAndPositives, Pairs
from dist_contrastive.testing import run_ranks

SLOW = pytest.mark.slow


def limits(scores: Tensor) -> Tensor:
    """A number for each row, in the middle of the widest gap of its scores; infinite for some."""
    ordered = scores.sort(1).values
    gap = ordered.diff().argmax(1, keepdim=True)
    middle = (ordered.gather(1, gap) + ordered.gather(1, gap + 1))[:, 0] / 2
    middle[3::7], middle[4::7] = torch.inf, -torch.inf
    return middle


def limited(pairs: Pairs, both: bool) -> Pairs:
    scores = pairs.rows.double() @ pairs.keys.double().T
    return replace(pairs, thresholds=(limits(scores), limits(scores.T) if both else None))


def check_limits(leave_out: Any, scale: float) -> None:
    pairs = random_pairs(21, 37, 19, scale)
    if scale > 50:  # log-sum-exps far from each other: no shift serves all
        pairs = replace(pairs, rows=pairs.rows * torch.linspace(-1, 1, 21)[:, None])
    for both in (False, True):
        check(LogSumExp(leave_out, both), limited(pairs, both), 16, rtol=2e-5)


@pytest.mark.parametrize(
    ("leave_out", "scale"),
    [
        ("own", 3.0),
        ("similar", 100.0),
        *(pytest.param(*case, marks=SLOW) for case in (("nothing", 3.0), ("nothing", 100.0))),
    ],
)
def test_scores_above_limits(interpreted, leave_out, scale):  # noqa: F811
    interpreted(check_limits, leave_out, scale)


def check_at_the_limit(scale: float) -> None:
    """Scores at the limit, up to rounding: weights of those that count add up to 1, which they
    would not if backward took one out that forward had left in."""
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(24, 15), dim=1)
    keys[12:] = keys[:12]
    rows = scale * torch.randn(20, 15)
    rows, keys = (torch.nn.functional.pad(x, (0, 1), value=v) for x, v in ((rows, 0), (keys, 1)))
    rows.requires_grad_()
    for number in range(2):
        at = (rows.detach() @ keys[number]), None
        for both in (False, True):
            if both:
                at = at[0], torch.full((24,), torch.inf)
            pairs = make_pairs(rows, keys, thresholds=at)
            (lse, *_), _ = pairwise.reduce(LogSumExp(both=both), pairs, "triton", 16)
            weights = torch.autograd.grad(lse[lse.isfinite()].sum(), rows)[0][:, -1]
            assert (weights[lse.isfinite()] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=SLOW), 60.0])
def test_forward_and_backward_decide_alike(interpreted, scale):  # noqa: F811
    interpreted(check_at_the_limit, scale)


def check_dissimilar() -> None:
    pairs = random_pairs(21, 37, 19)
    bias = torch.tensor([-1.0], dtype=torch.float64)
    check(_Negatives("similar"), replace(pairs, bias=bias), 16)


def test_sums_over_dissimilar_pairs(interpreted):  # noqa: F811
    interpreted(check_dissimilar)


def check_continuous(reduction: pairwise.Reduction) -> None:
    """Labels at the largest difference, up to rounding of fp64, and missing ones."""
    pairs, labels = random_pairs(21, 37, 19), torch.randint(0, 8, (37,)).double() / 10
    labels[3::7] = torch.nan
    tags = torch.stack([labels, torch.arange(37).double() // 2], 1)
    check(reduction, replace(pairs, tags=tags, max_delta=0.1), 16)


@pytest.mark.parametrize(
    "reduction",
    [
        LogSumExpAndPositives("own"),
        pytest.param(LogSumExp("similar", both=True), marks=SLOW),
        pytest.param(_Embedding(0.2), marks=SLOW),
    ],
    ids=["SupCon", "similar", "cosine embedding"],
)
def test_continuous_labels(interpreted, reduction):  # noqa: F811
    interpreted(check_continuous, reduction)


@pytest.mark.parametrize("dtype", MEMORY)
@pytest.mark.parametrize("kind", [losses.SupCon, losses.CosineEmbedding])
def test_continuous_labels_at_full_size(kind, dtype, recorded):  # noqa: F811
    loss = kind(max_delta=0.1, impl="triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(ROWS, DIM, dtype=dtype, requires_grad=True)
        with counts.Counts() as found:
            loss(rows, torch.empty(ROWS, dtype=torch.float64)).backward()
    deferred._WAITING.clear()
    assert not found.waits
    assert found.launches + len(recorded) <= LAUNCHES
    assert found.peak <= MEMORY[dtype]


LOSSES: dict[str, tuple[type[losses.PairLoss], dict[str, Any], bool]] = {  # whether with ids
    "InfoNCE, ids": (losses.InfoNCE, {"learnable": True}, True),
    "InfoNCE, symmetric, ids, margin": (
        losses.InfoNCE,
        {"symmetric": True, "learnable": True, "false_negative_margin": -0.1},
        True,
    ),
    "InfoNCE, symmetric, ratio": (
        losses.InfoNCE,
        {"symmetric": True, "false_negative_ratio": 0.7, "temperature": 0.02},
        False,
    ),
    "SigLIP, ids": (losses.SigLIP, {"scale": 10.0, "bias": -10.3}, True),
}
OF_RANKS = [LOSSES["InfoNCE, symmetric, ids, margin"], LOSSES["SigLIP, ids"]]


def inputs_of(rows: int, dim: int) -> tuple[list[Tensor], Tensor]:
    """Views that resemble each other, some of them more than their neighbours, and ids."""
    torch.manual_seed(0)
    a = torch.randn(rows, dim)
    a[1::5] = a[::5][: len(a[1::5])] + 0.3 * torch.randn(len(a[1::5]), dim)
    ids = torch.arange(rows) % 6
    return [a, a + 0.5 * torch.randn(rows, dim)], torch.where(ids == 5, -1, ids)


def with_ids(loss: Any, ids: Tensor | None) -> Any:
    """The loss of views and these ids."""

    class Known:
        parameters = loss.parameters

        def __call__(self, *views: Tensor) -> Tensor:
            return loss(*views, ids=ids)

    return Known()


def check_loss(name: str, dtype: torch.dtype) -> None:
    kind, settings, has_ids = LOSSES[name]
    views, ids = inputs_of(21, 16)
    views, ids = [x.to(dtype) for x in views], ids if has_ids else None
    exact = with_ids(kind(**settings, impl="dense").double(), ids)
    value, *expected = gradients(exact, [x.double() for x in views])
    by_kernels = kind(**settings, impl="triton", chunk_size=16)
    found = gradients(with_ids(by_kernels, ids), views)
    assert (found[0] - value).abs() <= 2e-6 * (1 + value.abs())
    rounding = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for place, (x, right) in enumerate(zip(found[1:], expected, strict=True)):
        # Of a scale, terms of both signs nearly cancel.
        assert (x - right).norm() <= rounding * right.norm() * (1 if place < len(views) else 4)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(interpreted, name, dtype):  # noqa: F811
    interpreted(check_loss, name, dtype)


def check_more_keys(ids_of_all: int | None) -> None:
    """Negatives and a bank with ids; where all ids are equal the positive alone is left."""
    torch.manual_seed(0)
    exact = [torch.randn(n, 16, dtype=torch.float64) for n in (21, 21, 9, 30)]
    ids = [torch.randint(-1, 4, (len(x),)) for x in exact]
    if ids_of_all is not None:
        ids = [torch.full_like(x, ids_of_all) for x in ids]
    given = {"ids": ids[0], "negative_ids": ids[2], "bank_ids": ids[3]}
    found = []
    for impl, dtype in (("dense", torch.float64), ("triton", torch.float32)):
        views = [x.to(dtype) for x in exact]
        loss = losses.InfoNCE(symmetric=True, impl=impl, false_negative_margin=0.2)
        value = loss(*(x.requires_grad_() for x in views[:3]), bank=views[3], **given)
        grads = torch.autograd.grad(value, views[:3])
        found.append([x.detach().double() for x in (value, *grads)])
    for x, right in zip(*found, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-5, atol=1e-7)
    assert (found[1][0] == 0) == (ids_of_all is not None)


@pytest.mark.parametrize("ids_of_all", [None, 3])
def test_negatives_and_bank(interpreted, ids_of_all):  # noqa: F811
    interpreted(check_more_keys, ids_of_all)


def on_rank(sizes: tuple[int, ...], keys_from: str) -> list[list[Tensor]]:
    """Gradients of this rank's rows by kernels, for every loss."""
    interpret()
    rank, found = torch.distributed.get_rank(), []
    for kind, settings, has_ids in OF_RANKS:
        views, ids = inputs_of(sum(sizes), 8)
        views, ids = [x.split(sizes)[rank] for x in views], ids.split(sizes)[rank]
        loss = kind(**settings, impl="triton", keys_from=keys_from, grad_reduction="sum")
        found.append(gradients(with_ids(loss, ids if has_ids else None), views))
    return found


def check_ranks(keys_from: str) -> None:
    sizes = (13, 0, 6)
    ranks = run_ranks(on_rank, len(sizes), sizes, keys_from)
    for number, (kind, settings, has_ids) in enumerate(OF_RANKS):
        views, ids = inputs_of(sum(sizes), 8)
        loss = with_ids(kind(**settings, impl="dense").double(), ids if has_ids else None)
        value, *expected = gradients(loss, [x.double() for x in views])
        found = [results[number] for results in ranks]
        for of_rank in found:
            torch.testing.assert_close(of_rank[0], value, rtol=2e-6, atol=2e-6)
        for place, right in enumerate(expected, 1):
            of_ranks = [of_rank[place] for of_rank in found]
            total = torch.cat(of_ranks) if place <= len(views) else sum(of_ranks)
            torch.testing.assert_close(total, right, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("keys_from", ["ring", pytest.param("gather", marks=SLOW)])
def test_ranks_with_uneven_rows(interpreted, keys_from):  # noqa: F811
    interpreted(check_ranks, keys_from)


@pytest.mark.parametrize("dtype", MEMORY)
@pytest.mark.parametrize("name", LOSSES)
def test_no_waits_few_launches_linear_memory_at_full_size(name, dtype, recorded):  # noqa: F811
    kind, settings, has_ids = LOSSES[name]
    loss = kind(**settings, impl="triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        views = [torch.empty(ROWS, DIM, dtype=dtype) for _ in range(2)]
        ids = torch.empty(ROWS, dtype=torch.int64) if has_ids else None
        with counts.Counts() as found:
            loss(*(x.requires_grad_() for x in views), ids=ids).backward()
    deferred._WAITING.clear()
    assert not found.waits
    assert found.launches + len(recorded) <= LAUNCHES
    assert found.peak <= MEMORY[dtype]
