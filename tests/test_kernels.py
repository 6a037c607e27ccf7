"""Triton kernels on a machine without a GPU: interpreted, against the dense specification in fp64,
and counted at full size, on tensors without data."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import counts

from dist_contrastive import losses, pairwise
from dist_contrastive.collectives import deferred, schema
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.cosine_embedding import _Embedding
from dist_contrastive.losses.siglip import _Negatives
from dist_contrastive.pairwise import (
    LogSumExp,
    LogSumExpAndPositives,
    Pairs,
    fused,
    kernel_calls,
    tile_shapes,
)
from dist_contrastive.pairwise.tile_shapes import TileShape
from dist_contrastive.testing import run_ranks

REDUCTIONS = [
    LogSumExp(),
    LogSumExp(both=True),
    LogSumExp("own"),
    LogSumExp("own", both=True),
    LogSumExp("similar"),
    LogSumExp("similar", both=True),
    LogSumExpAndPositives("own"),
    _Negatives(),
    _Embedding(0.2),
]
NAMES = [*map(str, REDUCTIONS[:-2]), "SigLIP", "cosine embedding"]
SHAPES = [(37, 53, 19), (5, 70, 8), (1, 1, 16)]  # rows, keys, dimensions
SLOW = pytest.mark.slow
QUICK = ("LogSumExp(leave_out='nothing', both=True)", "SigLIP")  # one of each kind of kernel


def each_reduction(*, of_all: list[Any], of_quick: list[Any]) -> list[Any]:
    """Parameters: some of all reductions, some of one of each kind; the others are slow."""
    named = list(zip(NAMES, REDUCTIONS, strict=True))
    return [
        pytest.param(
            *(reduction, x),
            id=f"{name}-{x}",
            marks=[] if x in of_all or name in QUICK else SLOW,
        )
        for name, reduction in named
        for x in [*of_all, *of_quick]
    ]


def interpret() -> None:
    """Make this process interpret kernels, in tiles small enough that there are several."""
    assert "triton" not in sys.modules or kernel_calls.is_interpreted(), "it could not know"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    for key in tile_shapes.TILES:
        rows = 16 if "gradient" in key[0] else 32
        tile_shapes.TILES[key] = TileShape(rows, 16, 16, 4, 1)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process that interprets kernels: in this one they are compiled."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, interpret) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def make_pairs(rows: Tensor, keys: Tensor, **more: Any) -> Pairs:
    return Pairs(rows, keys, (len(keys),), **more)


def results(reduction: pairwise.Reduction, pairs: Pairs, *how: Any) -> list[Tensor]:
    """Statistics, and gradients by rows and keys of a sum of them with random weights."""
    rows, keys = (x.detach().requires_grad_() for x in (pairs.rows, pairs.keys))
    found = sum(pairwise.reduce(reduction, replace(pairs, rows=rows, keys=keys), *how), ())
    torch.manual_seed(1)
    weighted = [x * torch.rand(len(x), dtype=torch.float64).to(x.dtype) for x in found]
    loss = sum(x[x.detach().isfinite()].sum() for x in weighted)
    return [*(x.detach() for x in found), *torch.autograd.grad(loss, [rows, keys])]


def check(
    reduction: pairwise.Reduction, pairs: Pairs, chunk_size: int | None = None, rtol: float = 1e-5
) -> None:
    """By kernels equals dense code in fp64 on the same numbers, up to rounding of fp32."""
    double = replace(pairs, rows=pairs.rows.double(), keys=pairs.keys.double())
    expected = results(reduction, double, "dense")
    found = results(reduction, pairs, "triton", chunk_size)
    for x, exact in zip(found, expected, strict=True):
        finite = exact[exact.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(x.double(), exact, rtol=rtol, atol=rtol * max(scale, 1e-30))


def random_pairs(num_rows: int, num_keys: int, dim: int, scale: float = 3.0) -> Pairs:
    torch.manual_seed(0)
    rows, keys = torch.randn(num_rows, dim), torch.randn(num_keys, dim)
    rows, keys = (torch.nn.functional.normalize(x, dim=1) for x in (rows, keys))
    return make_pairs(scale * rows, keys, tags=torch.randint(0, 4, (num_keys,)) * 2**40)


def check_random(reduction: pairwise.Reduction, shape: tuple[int, int, int]) -> None:
    check(reduction, random_pairs(*shape), 16)


@pytest.mark.parametrize(
    ("reduction", "shape"), each_reduction(of_all=SHAPES[:1], of_quick=SHAPES[1:])
)
def test_kernels_equal_the_specification(interpreted, reduction, shape):
    interpreted(check_random, reduction, shape)


def check_products(num_rows: int, num_keys: int, dim: int) -> None:
    torch.manual_seed(0)
    lines = torch.full((num_rows, -(-num_keys // 16) * 16), 1e30)  # what fills them up adds nothing
    lines[:, :num_keys] = torch.randn(num_rows, num_keys)
    g = lines[:, :num_keys]
    for a in (g, g.T):
        b, total = torch.randn(a.shape[1], dim), torch.randn(len(a), dim)
        exact = total.double() + a.double() @ b.double()
        kernel_calls.add_fp32_product(total, a, b)
        torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (32, 48, 16)])
def test_products_by_gradients_of_scores(interpreted, shape):
    interpreted(check_products, *shape)


def in_three_products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` as tensor cores make it of tf32x3: each operand is the sum of two numbers of eleven
    digits, the second of which is cut off; the product of the second ones is left out."""

    def cut(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    larger = [cut((x.view(torch.int32) + 0x1000).view(torch.float32)) for x in (a, b)]
    smaller = [cut(x - y) for x, y in zip((a, b), larger, strict=True)]
    return smaller[0] @ larger[1] + larger[0] @ smaller[1] + larger[0] @ larger[1]


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_three_products_in_tf32_are_as_exact_as_one_in_fp32(scale):
    """Softmaxes of scores times rows, all products made either way: errors against fp64 at most
    twice those of fp32, or than one rounding. The interpreter has no TF32."""

    def made(dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        x, y = rows.to(dtype), keys.to(dtype)
        scores = scale * product(x, y.T)
        grad = scores.softmax(0) + scores.softmax(1)
        return [product(grad, y).double(), product(grad.T.contiguous(), x).double()]

    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(768, 64), dim=1)
    keys = torch.nn.functional.normalize(rows + 0.1 * torch.randn(768, 64), dim=1)
    exact, plain = made(torch.float64, torch.matmul), made(torch.float32, torch.matmul)
    split = made(torch.float32, in_three_products)
    for right, x, y in zip(exact, plain, split, strict=True):
        assert (y - right).norm() <= 2 * max((x - right).norm(), 2**-24 * right.norm())


def check_extremes(reduction: pairwise.Reduction, kind: str) -> None:
    pairs = random_pairs(20, 33, 16, 100.0)
    rows, keys = pairs.rows, pairs.keys.clone()
    if kind == "opposite":  # of sums of exponentials around one shift, all vanish
        rows, keys = 100 * keys[:1].expand(20, -1), -keys[:1].expand(33, -1)
    elif kind == "equal":
        rows, keys = 100 * keys[:1].expand(20, -1), keys[:1].expand(33, -1)
    elif kind == "trained":
        keys[:20] = rows / 100
    elif kind == "one opposite row":
        rows = torch.cat([100 * keys[:19], -100 * keys[:1]])
        keys = keys[:1] + 1e-3 * keys
    elif kind == "lengths":  # of very different rows
        rows = rows * torch.logspace(-3, 1, 20)[:, None]
    check(reduction, replace(pairs, rows=rows, keys=keys), rtol=3e-5)


KINDS = ["opposite", "random", "equal", "trained", "one opposite row", "lengths"]


@pytest.mark.parametrize(
    ("reduction", "kind"), each_reduction(of_all=KINDS[:1], of_quick=KINDS[1:])
)
def test_kernels_at_scale_100(interpreted, reduction, kind):
    interpreted(check_extremes, reduction, kind)


def check_far_from_shift() -> None:
    """Log-sum-exps of rows lie 400 apart: no shift serves both, nor one exponential for both."""
    rows = torch.tensor([[-5.0], [1.0], [2.0]]).repeat(1, 16)
    keys = torch.tensor([[100.0], [99.0], [98.0]]).repeat(1, 16) / 16
    for reduction in (LogSumExp(both=True), LogSumExp("own", both=True), LogSumExp()):
        check(reduction, make_pairs(rows, keys), rtol=2e-6)


def test_rows_far_from_the_shift(interpreted):
    interpreted(check_far_from_shift)


def check_very_long_keys() -> None:
    """Exponentials times the factors of keys, the inverse lengths, would have few digits or none:
    rows are opposite to all keys."""
    torch.manual_seed(0)
    rows, keys = (torch.ones(n, 16) + 0.2 * torch.randn(n, 16) for n in (20, 33))
    check(LogSumExp(both=True), make_pairs(-rows, 2.0**61 * keys, scale=55.0), rtol=2e-5)


def test_very_long_keys(interpreted):
    interpreted(check_very_long_keys)


def check_nothing_counted() -> None:
    pairs = replace(random_pairs(6, 6, 8), tags=torch.zeros(6, dtype=torch.int64))
    for both in (False, True):
        check(LogSumExp("similar", both), pairs)
    for shape in ((0, 3, 8), (3, 0, 8)):
        rows, keys = random_pairs(*shape).rows, random_pairs(*shape).keys
        found = pairwise.reduce(LogSumExp(both=True), make_pairs(rows, keys), "triton")
        assert all((x == -torch.inf).all() for x in sum(found, ()))


def test_nothing_is_counted(interpreted):
    interpreted(check_nothing_counted)


def check_bad_number(number: float) -> None:
    for reduction in (LogSumExp(), LogSumExp(both=True), _Negatives()):
        pairs = random_pairs(37, 40, 8)
        pairs.rows[20, 3] = number
        with torch.no_grad():
            row_part = pairwise.reduce(reduction, pairs, "triton")[0][0]
        assert not row_part[20].isfinite()
        if not isinstance(reduction, LogSumExp):
            assert row_part[:20].isfinite().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_bad_number_is_not_skipped(interpreted, number):
    """A running maximum would drop a NaN, and the mean look healthy."""
    interpreted(check_bad_number, number)


def check_half(reduction: pairwise.Reduction, dtype: torch.dtype, scale: float) -> None:
    """Rows in half precision, normalised by factors, against fp64 on the same numbers."""
    torch.manual_seed(0)
    raw = [(torch.randn(n, 24) * torch.rand(n, 1).exp()).to(dtype) for n in (37, 45)]
    pairs = make_pairs(*raw, tags=torch.randint(0, 4, (45,)), scale=scale)
    double = replace(pairs, rows=pairs.rows.double(), keys=pairs.keys.double())
    expected = results(reduction, double, "dense")
    found = results(reduction, pairs, "triton", 16)
    for x, exact in zip(found[:-2], expected[:-2], strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=2e-6, atol=2e-6 * scale)
    for x, exact in zip(found[-2:], expected[-2:], strict=True):
        # Of every number of the sum one rounding, these fall to all sides, and one of the sum.
        assert (x.double() - exact).norm() < torch.finfo(dtype).eps * exact.norm()


FP16 = pytest.param(torch.float16, marks=pytest.mark.slow)


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=NAMES)
def test_half_precision_is_not_rounded_again(interpreted, reduction, dtype, scale):
    interpreted(check_half, reduction, dtype, scale)


SETTINGS: dict[str, tuple[type[losses.PairLoss], dict[str, Any]]] = {
    "InfoNCE": (losses.InfoNCE, {"learnable": True}),
    "InfoNCE, symmetric": (losses.InfoNCE, {"symmetric": True, "learnable": True}),
    "NT-Xent": (losses.NTXent, {"learnable": True}),
    "DCL": (losses.DCL, {}),
    "SigLIP": (losses.SigLIP, {"scale": 10.0, "bias": -10.3}),
    "SelfDiagonal": (losses.SelfDiagonal, {}),
    "SupCon": (losses.SupCon, {"learnable": True}),
    "cosine embedding": (losses.CosineEmbedding, {}),
    "KoLeo": (losses.KoLeo, {}),
    "triplet, hard": (losses.Triplet, {"mining": "hard", "margin": 5.0}),
}


def inputs_of(kind: type[losses.PairLoss], rows: int, dim: int) -> list[Tensor]:
    """Two views, features, or features and labels, without gradient."""
    given = [torch.randn(rows, dim) for _ in range(2 if kind.takes == "views" else 1)]
    return [*given, torch.arange(rows) % 5] if kind.takes == "labels" else given


def gradients(loss: losses.PairLoss, inputs: list[Tensor]) -> list[Tensor]:
    """Value, and gradients of inputs and parameters, all in fp64."""
    given = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value = loss(*given)
    wanted = [*(x for x in given if x.requires_grad), *loss.parameters()]
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, wanted))]


def check_loss(name: str, dtype: torch.dtype) -> None:
    kind, settings = SETTINGS[name]
    torch.manual_seed(0)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs_of(kind, 21, 16)]
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = gradients(kind(**settings, impl="dense").double(), exact)
    value, *found = gradients(kind(**settings, impl="triton", chunk_size=16), inputs)
    assert (value - expected[0]).abs() <= 2e-6 * (1 + expected[0].abs())
    rounding = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for x, right in zip(found, expected[1:], strict=True):
        assert (x - right).norm() <= rounding * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_by_kernels(interpreted, name, dtype):
    interpreted(check_loss, name, dtype)


def check_more_keys(size: int) -> None:
    """Negatives and a bank of more or fewer rows than the batch, which are no one's own."""
    torch.manual_seed(0)
    exact = [torch.randn(n, 16, dtype=torch.float64) for n in (21, 21, 9, size)]
    found = []
    for impl, dtype in (("dense", torch.float64), ("triton", torch.float32)):
        given = [x.to(dtype) for x in exact]
        loss = losses.InfoNCE(symmetric=True, impl=impl)
        value = loss(*(x.requires_grad_() for x in given[:3]), bank=given[3])
        grads = torch.autograd.grad(value, given[:3])
        found.append([x.detach().double() for x in (value, *grads)])
    for x, right in zip(*found, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [30, 5])
def test_negatives_and_bank(interpreted, size):
    interpreted(check_more_keys, size)


def on_rank(sizes: tuple[int, ...], keys_from: str) -> list[list[Tensor]]:
    """Gradients of this rank's rows by kernels, for every loss."""
    interpret()
    rank, found = torch.distributed.get_rank(), []
    for kind, settings in SETTINGS.values():
        torch.manual_seed(0)
        inputs = [x.split(sizes)[rank] for x in inputs_of(kind, sum(sizes), 8)]
        loss = kind(**settings, impl="triton", keys_from=keys_from, grad_reduction="sum")
        found.append(gradients(loss, inputs))
    return found


def check_ranks(keys_from: str) -> None:
    sizes = (20, 0, 7)
    ranks = run_ranks(on_rank, len(sizes), sizes, keys_from)
    for number, (kind, settings) in enumerate(SETTINGS.values()):
        torch.manual_seed(0)
        inputs = inputs_of(kind, sum(sizes), 8)
        exact = [x.double() if x.is_floating_point() else x for x in inputs]
        loss = kind(**settings, impl="dense").double()
        value, *expected = gradients(loss, exact)
        num_inputs = len(expected) - len(list(loss.parameters()))
        found = [results[number] for results in ranks]
        for of_rank in found:
            torch.testing.assert_close(of_rank[0], value, rtol=2e-6, atol=2e-6)
        for place, right in enumerate(expected, 1):
            of_ranks = [of_rank[place] for of_rank in found]
            total = torch.cat(of_ranks) if place <= num_inputs else sum(of_ranks)
            torch.testing.assert_close(total, right, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
def test_ranks_with_uneven_rows(interpreted, keys_from):
    interpreted(check_ranks, keys_from)


def test_kernels_where_they_cannot_run():
    pairs = random_pairs(3, 4, 8)
    with pytest.raises(ConfigError, match=r"'triton' cannot be used: rows are on cpu.*; use auto"):
        pairwise.reduce(LogSumExp(), pairs, "triton")
    with pytest.raises(ConfigError, match=r"VICReg has no kernels; use auto, dense or chunked"):
        losses.VICReg(impl="triton")


def check_unfit() -> None:
    pairs = random_pairs(3, 4, 8)
    double = replace(pairs, rows=pairs.rows.double(), keys=pairs.keys.double())
    limited = replace(pairs, thresholds=(torch.zeros(3), None))
    for reduction, unfit, reason in (
        (LogSumExp(), double, r"rows are torch.float64, and kernels take"),
        (LogSumExpAndPositives("own"), limited, r"positives are summed, and kernels"),
        (Unknown(), pairs, r"Unknown has no kernel"),
    ):
        with pytest.raises(ConfigError, match=reason):
            pairwise.reduce(reduction, unfit, "triton")
        pairwise.reduce(reduction, unfit)  # auto finds another way


class Unknown(pairwise.PairSum):
    def value(self, tile):
        return tile.scores

    derivative = value


def test_what_kernels_do_not_take(interpreted):
    interpreted(check_unfit)


Launches = list[tuple[str, tuple[int, ...]]]


@pytest.fixture
def recorded(monkeypatch) -> Launches:
    """Names and grids of the kernels that would be started."""
    started: Launches = []

    def record(name: str, grid: tuple[int, ...], *_: Any) -> None:
        started.append((name, grid))

    def product(total: Tensor, a: Tensor, b: Tensor) -> None:  # as on CUDA, where it is one kernel
        started.append(("product", ()))

    monkeypatch.setattr(kernel_calls, "start", record)
    monkeypatch.setattr(fused, "add_product", product)
    monkeypatch.setattr(kernel_calls, "_no_place", lambda device: None)
    monkeypatch.setattr(schema, "is_deferred", lambda x: x is not None)  # as of tensors on CUDA
    monkeypatch.setattr(deferred, "_WAITING", {})  # what has no data is never read
    return started


ROWS, DIM = 65536, 768
# At the most; fp32 takes no more launches, but twice the memory for gradients of scores.
LAUNCHES, MEMORY = 200, {torch.bfloat16: 1.5 * 2**30, torch.float32: 2 * 2**30}


def counted(name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> counts.Counts:
    """Forward and backward of a loss of so many rows, on tensors without data."""
    kind, settings = SETTINGS[name]
    loss = kind(**settings, impl="triton", **options)
    num_rows = ROWS // 2 if issubclass(kind, losses.NTXent) else ROWS  # its views are rows
    with FakeTensorMode(allow_non_fake_inputs=True):
        num_views = 2 if kind.takes == "views" else 1
        given = [torch.empty(num_rows, DIM, dtype=dtype) for _ in range(num_views)]
        labels = [torch.empty(num_rows, dtype=torch.int64)] if kind.takes == "labels" else []
        with counts.Counts() as found:
            loss(*(x.requires_grad_() for x in given), *labels).backward()
    deferred._WAITING.clear()
    return found


@pytest.mark.parametrize("dtype", MEMORY)
@pytest.mark.parametrize("name", SETTINGS)
def test_no_waits_few_launches_linear_memory_at_full_size(name, dtype, recorded):
    found = counted(name, dtype)
    assert not found.waits
    assert found.launches + len(recorded) <= LAUNCHES
    assert found.peak <= MEMORY[dtype]


def test_a_number_read_by_the_host_is_found(recorded, monkeypatch):
    """The planted fault: what is shifted by is asked for on the host."""
    shift = kernel_calls.Operands.shift
    monkeypatch.setattr(
        kernel_calls.Operands, "shift", lambda self: torch.tensor(shift(self).item())
    )
    with pytest.raises(DataDependentOutputException):
        counted("InfoNCE")


def test_memory_of_a_planted_allocation_is_counted(recorded, monkeypatch):
    before = counted("InfoNCE").peak
    kept = []
    grid = TileShape.row_grid

    def planted(self: TileShape, *sizes: int) -> tuple[int, int]:
        kept.append(torch.empty(2**32, dtype=torch.uint8))
        return grid(self, *sizes)

    monkeypatch.setattr(TileShape, "row_grid", planted)
    assert counted("InfoNCE").peak >= before + 2**32
