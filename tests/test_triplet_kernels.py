"""Kernels of triplets and of nearest neighbours, interpreted, against the dense specification in
fp64; counted at full size, and compiled for cards that are not there."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import (  # noqa: F401  # fixtures among them
    LAUNCHES,
    MEMORY,
    counts,
    gradients,
    interpret,
    interpreted,
    recorded,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import static
import static_triplets

from dist_contrastive import losses
from dist_contrastive.collectives import deferred
from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise import mined
from dist_contrastive.testing import run_ranks

SLOW = pytest.mark.slow
MININGS = ["all", "semihard", "hard"]
DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
DIM = 11
OF_DTYPE = {x: torch.finfo(x).eps for x in (torch.bfloat16, torch.float16)}
ALWAYS = [("all", "euclidean", torch.bfloat16), ("semihard", "cosine", torch.float32)]


def interpret_small() -> None:
    """Two positives at a time, so that most rows have several chunks of them."""
    interpret()
    mined.MINING_STEPS, mined._POSITIVES, mined._DIMS = (1, 8, 4), 2, 8


NAN = math.nan
CONTINUOUS = {  # labels and max_delta
    # 0.1 apart are some of them, others a little more or less in fp64.
    "continuous": ([0.3, 0.0, NAN, 0.1, 0.4, 0.2, 0.1, NAN, 0.9], 0.1),
    "views": ([0.5, NAN, 1.0, NAN, -2.0], 0.5),
    # Differences that round to max_delta, which sums of label and max_delta do not tell.
    "rounded": ([-1e16, 0.0, 1.0, 1e-20, -0.5, 2.0, 3.0, NAN], 1e16),
    "equal labels": ([0.5, 0.25, 0.5, -0.0, 0.0, NAN, 0.5], 0.0),
    "overflow": ([1e308, -1e308, NAN, 0.0, 2.0], 1.5e308),
}


def rows_and_labels(kind: str) -> tuple[Tensor, Tensor]:
    """Rows in fp32, in which something may be lost."""
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 1, 0, 2, 0, -1, 0, 1])
    x = torch.randn(len(labels), DIM)
    if kind == "equal":
        return x[:1].expand(len(x), -1).clone(), labels
    if kind == "pairs of equal rows":
        return torch.cat([x[:4], x[:4], x[:1]]), torch.tensor([2, 0, 1, 0, 2, 0, 1, 0, 2])
    if kind == "tight classes":
        return torch.randn(4, DIM)[labels] + 1e-4 * x, labels
    if kind == "far from the origin":
        return x + 1e4, labels
    if kind == "near negatives":  # closer than any positive
        return x[:3].repeat(4, 1)[: len(x)] + 1e-3 * x, labels
    if kind == "one class":
        return x, torch.zeros_like(labels)
    if kind == "no positives":
        return x, torch.full_like(labels, -1)
    if kind in CONTINUOUS:
        values = torch.tensor(CONTINUOUS[kind][0], dtype=torch.float64)
        return (torch.randn(len(values), 2, DIM) if kind == "views" else x[: len(values)]), values
    return x, labels


def slope_of(loss: losses.Triplet, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Value and gradient by rows, in fp64."""
    x = x.detach().requires_grad_()
    value = loss(x, labels)
    return [t.detach().double() for t in (value, *torch.autograd.grad(value, x))]


def check(kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Value, gradient and counts of kernels, on the same numbers, up to rounding."""
    interpret_small()
    x, labels = rows_and_labels(kind)
    x = x.to(dtype)
    made = [losses.Triplet(impl=impl, **settings) for impl in ("triton", "dense")]
    value, grad = slope_of(made[0], x, labels)
    exact, slope = slope_of(made[1], x.double(), labels)
    assert made[0].metrics == made[1].metrics
    assert (value - exact).abs() <= 2e-6 * (1 + exact.abs())
    # Gradients by negatives are differences of products, which lose what is small beside the norms.
    rounding = (1e-4 if kind == "near negatives" else 2e-5) if dtype == torch.float32 else 0.0
    assert (grad - slope).norm() <= max(rounding, OF_DTYPE.get(dtype, 0.0)) * slope.norm()


@pytest.mark.parametrize(
    ("mining", "distance", "dtype"),
    [
        pytest.param(mining, distance, dtype, marks=[] if quick else SLOW)
        for mining in MININGS
        for distance in DISTANCES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for quick in [
            (mining, distance, dtype) in ALWAYS or (mining == "hard" and dtype != torch.float16)
        ]
    ],
)
def test_triplets_by_kernels(interpreted, mining, distance, dtype):  # noqa: F811
    settings = {"mining": mining, "distance": distance, "chunk_size": 6}
    interpreted(check, "random", dtype, settings)


EXTREMES = ["tight classes", "near negatives", "pairs of equal rows", "far from the origin"]
EXTREMES += ["equal", "one class", "no positives"]


@pytest.mark.parametrize(
    ("mining", "kind", "margin"),
    [
        pytest.param(mining, kind, margin, marks=[] if quick else SLOW)
        for mining in MININGS
        for kind in EXTREMES
        for margin in (5.0, 0.0)
        for quick in [margin and kind == EXTREMES[MININGS.index(mining)]]
    ],
)
def test_extreme_rows(interpreted, mining, kind, margin):  # noqa: F811
    interpreted(check, kind, torch.float32, {"mining": mining, "margin": margin})


@pytest.mark.parametrize(
    ("kind", "mining", "distance"),
    [
        pytest.param(kind, mining, distance, marks=[] if quick else SLOW)
        for kind in CONTINUOUS
        for mining in MININGS
        for distance in ("euclidean", "cosine")
        for quick in [
            (kind, distance) == ("continuous", "euclidean")
            or (kind, mining, distance) == ("views", "hard", "cosine")
        ]
    ],
)
def test_continuous_labels(interpreted, kind, mining, distance):  # noqa: F811
    settings = {"mining": mining, "distance": distance, "max_delta": CONTINUOUS[kind][1]}
    interpreted(check, kind, torch.float32, settings | {"chunk_size": 6})


def check_order(kind: str) -> None:
    """Which keys are similar to which rows, of all ranks and of one in the middle."""
    labels, max_delta = CONTINUOUS[kind]
    tags = torch.tensor([[x, i] for i, x in enumerate(labels * 3)], dtype=torch.float64)
    mixed = torch.randperm(2 * len(tags), generator=torch.Generator().manual_seed(0))
    tags = tags[mixed // 2]  # two views of each, in any order
    for rows in (slice(0, len(tags)), slice(4, 9), slice(3, 3)):
        order = mined._Order.of(tags, max_delta, rows.start, rows.stop - rows.start)
        similar = (tags[rows, None, 0] - tags[:, 0]).abs() <= max_delta
        similar |= tags[rows, None, 1] == tags[:, 1]
        assert torch.equal(order.keys[order.places.long()].long(), torch.arange(len(tags)))
        place = order.places
        found = (order.begins[:, None] <= place) & (place < order.ends[:, None])
        assert torch.equal(found, similar)
        number = torch.empty_like(order.rows)
        number[order.rows.long()] = torch.arange(len(number), dtype=torch.int32)
        number = number[:, None]
        assert torch.equal((order.key_begins <= number) & (number < order.key_ends), similar)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_similar_keys_are_a_span(interpreted, kind):  # noqa: F811
    interpreted(check_order, kind)


def check_twice() -> None:
    """The same numbers, and gradients for any weight of the loss."""
    interpret_small()
    x, labels = rows_and_labels("random")
    for mining in ("all", "hard"):
        x.requires_grad_()
        value = losses.Triplet(mining=mining, impl="triton")(x, labels)
        (once,) = torch.autograd.grad(value, x, retain_graph=True)
        (again,) = torch.autograd.grad(3 * value, x)
        torch.testing.assert_close(3 * once, again)
        with torch.no_grad():
            assert torch.equal(losses.Triplet(mining=mining, impl="triton")(x, labels), value)


@SLOW
def test_backward_with_another_weight(interpreted):  # noqa: F811
    interpreted(check_twice)


RANK_SIZES = (5, 0, 4)
OF_RANKS = [("all", "euclidean", "random"), ("semihard", "cosine", "continuous")]
OF_RANKS += [("hard", "euclidean", "continuous")]
OfRanks = list[tuple[str, str, str]]  # mining, distance, rows and labels


def on_rank(keys_from: str, settings: OfRanks) -> list[list[Tensor]]:
    interpret_small()
    found = []
    for mining, distance, kind in settings:
        x, labels = rows_and_labels(kind)
        mine = [t.split(RANK_SIZES)[torch.distributed.get_rank()] for t in (x, labels)]
        options = {"keys_from": keys_from, "grad_reduction": "sum", "chunk_size": 4}
        options["max_delta"] = CONTINUOUS.get(kind, (None, None))[1]
        loss = losses.Triplet(1.0, distance, mining, impl="triton", **options)
        found.append([*slope_of(loss, *mine), loss.metrics["active_triplets"]])
    return found


def check_ranks(keys_from: str, settings: OfRanks) -> None:
    ranks = run_ranks(on_rank, len(RANK_SIZES), keys_from, settings)
    for number, (mining, distance, kind) in enumerate(settings):
        x, labels = rows_and_labels(kind)
        max_delta = CONTINUOUS.get(kind, (None, None))[1]
        loss = losses.Triplet(1.0, distance, mining, max_delta=max_delta, impl="dense")
        value, slope = slope_of(loss, x.double(), labels)
        found = [results[number] for results in ranks]
        for of_rank in found:
            torch.testing.assert_close(of_rank[0], value, rtol=2e-6, atol=2e-6)
            assert of_rank[2] == loss.metrics["active_triplets"]
        total = torch.cat([of_rank[1] for of_rank in found])
        torch.testing.assert_close(total, slope, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("keys_from", "settings"),
    [
        ("ring", OF_RANKS[:1]),
        pytest.param("gather", OF_RANKS, marks=SLOW),
        pytest.param("ring", OF_RANKS[1:], marks=SLOW),
    ],
)
def test_ranks_with_uneven_rows(interpreted, keys_from, settings):  # noqa: F811
    interpreted(check_ranks, keys_from, settings)


def check_koleo(kind: str, dtype: torch.dtype, eps: float) -> None:
    interpret_small()
    x = rows_and_labels(kind)[0].to(dtype)
    value, grad = gradients(losses.KoLeo(eps, impl="triton"), [x])
    exact, slope = gradients(losses.KoLeo(eps, impl="dense"), [x.double()])
    assert (value - exact).abs() <= 2e-6 * (1 + exact.abs())
    rounding = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (grad - slope).norm() <= rounding * slope.norm()


@pytest.mark.parametrize(
    ("kind", "dtype", "eps"),
    [
        ("pairs of equal rows", torch.float32, 1e-2),
        pytest.param("near negatives", torch.bfloat16, 1e-8, marks=SLOW),
        pytest.param("random", torch.float16, 1e-8, marks=SLOW),
    ],
)
def test_koleo_by_kernels(interpreted, kind, dtype, eps):  # noqa: F811
    interpreted(check_koleo, kind, dtype, eps)


def test_where_they_cannot_run():
    x = torch.randn(6, 4)
    for loss, given in ((losses.Triplet, [x, torch.arange(6) % 2]), (losses.KoLeo, [x])):
        with pytest.raises(ConfigError, match=r"'triton' cannot be used: rows are on cpu"):
            loss(impl="triton")(*given)


def check_unfit() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"rows are torch.float64, and kernels take"):
        losses.Triplet(impl="triton")(x, torch.arange(6) % 2)


def test_what_kernels_do_not_take(interpreted):  # noqa: F811
    interpreted(check_unfit)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("max_delta", [None, 0.1])
@pytest.mark.parametrize("dtype", MEMORY)
def test_no_waits_few_launches_linear_memory_at_full_size(
    mining,
    distance,
    max_delta,
    dtype,
    recorded,  # noqa: F811
):
    loss = losses.Triplet(mining=mining, distance=distance, max_delta=max_delta, impl="triton")
    of_labels = torch.int64 if max_delta is None else torch.float64
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(65536, 768, dtype=dtype, requires_grad=True)
        labels = torch.empty(65536, dtype=of_labels)
        with counts.Counts() as found:
            loss(x, labels).backward()
    deferred._WAITING.clear()
    assert not found.waits
    assert found.launches + len(recorded) <= LAUNCHES
    assert found.peak <= MEMORY[dtype]


COMPILED = [
    pytest.param(name, card, dtype, marks=[] if (name, card, dtype) == QUICK else SLOW)
    for QUICK in [("panel", 90, "bf16")]
    for name in static_triplets.VARIANTS
    for card in static.CARDS
    for dtype in ("bf16", "fp32")
]


@pytest.mark.parametrize(("name", "card", "dtype"), COMPILED)
def test_compiled_for_cards(name, card, dtype):
    """No register is spilled, no sum is made by floating atomics, offsets are of 64 bits."""
    report = static_triplets.compiled(static_triplets.VARIANTS[name], card, dtype=dtype)
    assert report.spilled == 0
    assert report.blocks >= 1
    assert not re.search(r"\b(atom|red)\.\S*add\S*\.(f|bf)\d+", report.ptx)
    assert "xi64>" in report.ttir
    if static_triplets.VARIANTS[name].name in ("panel", "extreme"):
        assert report.tensor > 0
        if dtype == "fp32" or name == "panel":
            assert "inputPrecision = tf32x3" in report.ttir
