"""The contrastive force by Triton kernels on a machine without a GPU: interpreted, against the
specification in fp64, and counted at full size, on tensors without data."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from force_formulas import FIVE, specified
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import counts
import test_force_extremes as extremes
import test_force_ranks as on_many_ranks

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.force import fused, kernel_calls, panels, segments, softmaxes
from dist_contrastive.pairwise import kernel_calls as pair_kernel_calls
from dist_contrastive.pairwise import tile_shapes
from dist_contrastive.pairwise.tile_shapes import TileShape
from dist_contrastive.testing import run_ranks

PRESETS = ("seed", "drift", "paper")
SLOW = pytest.mark.slow
WARM = (0.05, 0.3, 1.0)
Given = dict[str, Tensor]


def interpret() -> None:
    """Make this process interpret kernels, in tiles small enough that there are several."""
    assert "triton" not in sys.modules or pair_kernel_calls.is_interpreted(), "it could not know"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    for key in tile_shapes.TILES:
        tile_shapes.TILES[key] = TileShape(32, 32, 32, 4, 1)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process that interprets kernels: in this one they are compiled."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, interpret) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given_points(
    *,
    leading: tuple[int, ...] = (),
    dim: int = 19,
    fixed: bool = False,
    labels: bool = False,
    weights: bool = False,
) -> Given:
    """Arguments of the loss, of ragged sizes."""
    sizes = {"negative": 21, "positive": 37} | ({"fixed": 5} if fixed else {})
    given = {x: normal(*leading, n, dim, seed=n) for x, n in sizes.items()}
    given["negative"] = 0.8 * given["negative"] + 0.3
    for name, size in sizes.items():
        if labels:
            given[f"{name}_labels"] = (7 * torch.arange(size) % 5 - 2) * 2**40
        if weights:
            given[f"{name}_weights"] = normal(*leading, size, seed=1).abs()
    return given


def derived(value: Tensor, given: Given) -> list[Tensor]:
    """Value and gradients by all points, in fp64."""
    points = [given[x] for x in ("negative", "positive", "fixed") if x in given]
    found = torch.autograd.grad(value, points, allow_unused=True, materialize_grads=True)
    return [x.detach().double() for x in (value, *found)]


def leaves(given: Given, dtype: torch.dtype = torch.float32) -> Given:
    return {
        name: x.to(dtype).requires_grad_("_" not in name) if x.is_floating_point() else x
        for name, x in given.items()
    }


def closely(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Beside the largest number."""
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def check(given: Given, preset: str, rtol: float = 1e-5, how: Any = None, **options: Any) -> None:
    """By kernels, in fp32, equals the specification in fp64 on the same numbers."""
    single = leaves(given)
    exact = leaves(
        {k: x.float() if x.is_floating_point() else x for k, x in given.items()}, torch.float64
    )
    found = derived(
        losses.ContrastiveForce(preset=preset, impl="triton", **options, **(how or {}))(**single),
        single,
    )
    for x, right in zip(
        found, derived(specified(preset, **exact, **options).loss, exact), strict=True
    ):
        closely(x, right, rtol)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"leading": (2,), "fixed": True, "labels": True, "weights": True},
    "few dimensions": {"dim": 3, "fixed": True},
    "groups": {"leading": (2, 2), "dim": 8},
    "labels": {"labels": True},
}


def check_case(name: str, preset: str, options: dict[str, Any], how: dict[str, Any]) -> None:
    check(given_points(**CASES[name]), preset, temperatures=WARM, how=how, **options)


QUICK_CASES = {("plain", x) for x in PRESETS} | {("everything", "seed"), ("groups", "paper")}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(*x, marks=[] if x in QUICK_CASES else SLOW)
        for x in ((name, preset) for name in CASES for preset in PRESETS)
    ],
)
def test_kernels_equal_the_specification(interpreted, name, preset):
    interpreted(check_case, name, preset, {}, {})


def check_one_part(preset: str) -> None:
    """Programs that visit several tiles of keys, as where rows are many."""
    before, kernel_calls._PROGRAMS = kernel_calls._PROGRAMS, 1
    try:
        check(given_points(), preset, temperatures=WARM)
    finally:
        kernel_calls._PROGRAMS = before


@pytest.mark.parametrize("preset", [pytest.param("seed", marks=SLOW), "drift"])
def test_tiles_one_after_the_other(interpreted, preset):
    interpreted(check_one_part, preset)


OPTIONS = [
    {"affinity_floor": 1e-3},
    {"affinity_floor": 0.3, "normalise_total": True, "scale_scope": "label"},
    {"scale_scope": "label", "norm_scope": "label"},
    {"scale_scope": "label", "norm_scope": "global", "normalise_total": True},
    {"scale_scope": "global", "norm_scope": "group"},
]
QUICK_OPTIONS = {("paper", 0), ("drift", 1), ("drift", 3)}


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        pytest.param(
            preset, x, id=f"{preset}-{x}", marks=[] if (preset, i) in QUICK_OPTIONS else SLOW
        )
        for preset in PRESETS
        for i, x in enumerate(OPTIONS)
    ],
)
def test_options(interpreted, preset, options):
    interpreted(check_case, "everything", preset, options, {})


def check_cloud(name: str, preset: str, temperatures: tuple[float, ...], dim: int) -> None:
    """As near to dense fp64 as tiles are, relative to the largest force."""
    points = extremes.clouds(name, dim)
    exact = losses.ContrastiveForce(temperatures, preset, impl="dense")
    single = losses.ContrastiveForce(temperatures, preset, impl="triton")
    right = extremes.moved(exact, *(x.double() for x in points))
    error = (extremes.moved(single, *points) - right).abs().max().item()
    size = max(right.abs().max().item(), extremes.SMALLEST)
    assert error <= extremes.tolerance(temperatures, *points) * size, f"{error} of {size}"


QUICK_CLOUDS = {
    ("exact pairs", "drift", (0.001, *FIVE)),
    ("one alone", "paper", (0.001, *FIVE)),
    ("outlier generated", "drift", (0.001,)),
    ("two and one", "paper", (0.2,)),
}
CLOUDS = [
    pytest.param(*x, marks=[] if x in QUICK_CLOUDS else SLOW)
    for x in (
        (name, preset, t)
        for name in extremes.NAMES
        for preset in PRESETS
        for t in ((0.001,), (0.2,), (0.001, *FIVE))
    )
]


@pytest.mark.parametrize(("name", "preset", "temperatures"), CLOUDS, ids=str)
def test_points_that_coincide_are_close_or_far(interpreted, name, preset, temperatures):
    for dim in (2, 64):
        interpreted(check_cloud, name, preset, temperatures, dim)


def check_close_sums() -> None:
    """Sums of keys, less sums of rows nearby, cancel: in fp32 they would be off by 2e-5."""
    points = extremes.clouds("collapsed", 64)
    exact = losses.ContrastiveForce(FIVE, "seed", impl="dense")
    single = losses.ContrastiveForce(FIVE, "seed", impl="triton")
    right, found = (
        extremes.moved(exact, *(x.double() for x in points)),
        extremes.moved(single, *points),
    )
    assert (found - right).abs().max() <= 5e-6 * right.abs().max()


def test_sums_of_close_points_keep_their_digits(interpreted):
    interpreted(check_close_sums)


def check_nan(preset: str) -> None:
    given = leaves(given_points(dim=8))
    with torch.no_grad():
        given["negative"][3, 1] = torch.nan
    loss = losses.ContrastiveForce(preset=preset, impl="triton", affinity_floor=1e-3)
    assert loss(**given, counts=[(21, 0, 37)]).isnan()


@pytest.mark.parametrize("preset", [pytest.param("seed", marks=SLOW), "drift", "paper"])
def test_a_nan_is_not_skipped(interpreted, preset):
    interpreted(check_nan, preset)


def check_same_bits() -> None:
    """Whatever memory there is: panels of any size, kept or not."""
    given = leaves(given_points(fixed=True, labels=True))
    found = []
    for cache_mb, chunk_size in ((0.0, 16), (1e-2, 40), (1.0, None)):
        how = {"impl": "triton", "cache_mb": cache_mb, "chunk_size": chunk_size}
        loss = losses.ContrastiveForce(WARM, "seed", **how)
        found.append(derived(loss(**given), given))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_results_do_not_depend_on_memory(interpreted):
    interpreted(check_same_bits)


def check_precision() -> None:
    """Torch's setting for fp32 products is that of weights, never that of distances."""
    assert kernel_calls.product_precision() == kernel_calls.PRECISION == "tf32x3"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert kernel_calls.product_precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_precision_of_products_is_by_choice(interpreted):
    interpreted(check_precision)


def tf32(x: Any) -> Any:
    """Numbers of numpy in fp32 with the 10 bits of TF32."""
    return ((x.view("int32") + 0x1000) & ~0x1FFF).view("float32")


def check_products() -> None:
    """Products of weights as tensor cores make them, which the interpreter does not."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(_: Any, a: Any, b: Any, d: Any, precision: Any, __: Any) -> Any:
        x, y = tf32(a.data), tf32(b.data)
        total = x @ y
        if "x3" in str(precision).lower():
            total = tf32(a.data - x) @ y + x @ tf32(b.data - y) + total
        return TensorHandle(total + d.data, d.dtype.scalar)

    points = normal(40, 64, seed=1).float() * 0.8, normal(48, 64, seed=2).float() + 0.3
    exact = losses.ContrastiveForce(FIVE, "drift", impl="dense")
    right = exact.force(*(x.double() for x in points))
    exact_dot, errors = InterpreterBuilder.create_dot, []
    InterpreterBuilder.create_dot = create_dot
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found = losses.ContrastiveForce(FIVE, "drift", impl="triton").force(*points)
            errors.append(((found - right).abs().max() / right.abs().max()).item())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        InterpreterBuilder.create_dot = exact_dot
    assert errors[0] <= THREE_TF32, errors
    assert THREE_TF32 < errors[1] <= ONE_TF32, errors


THREE_TF32, ONE_TF32 = 5e-6, 2e-3  # errors of a force beside the largest


def test_errors_of_products_are_bounded(interpreted):
    interpreted(check_products)


def check_diagnostics(preset: str) -> None:
    given = given_points(**CASES["everything"])
    single = losses.ContrastiveForce(WARM, preset, impl="triton", diagnostics=True)
    single(**leaves(given))
    right = specified(preset, **leaves(given, torch.float64), temperatures=WARM)
    for name, number in right.metrics.items():
        closely(single.metrics[name].double(), number, 1e-5)


@pytest.mark.parametrize("preset", [pytest.param("drift", marks=SLOW), "paper"])
def test_diagnostics(interpreted, preset):
    interpreted(check_diagnostics, preset)


def on_rank(preset: str, name: str, keys_from: str) -> list[Tensor]:
    """Value and gradients by this rank's points."""
    interpret()
    given = leaves(on_many_ranks.share(on_many_ranks.batch(name)))
    how = {"impl": "triton", "keys_from": keys_from, "grad_reduction": "sum"}
    loss = losses.ContrastiveForce(on_many_ranks.TEMPERATURES, preset, **how)
    return derived(loss(**given), given)


def check_ranks(preset: str, name: str, keys_from: str) -> None:
    """Three ranks, some without points of a kind, and one without any positives."""
    ranks = run_ranks(on_rank, 3, preset, name, keys_from)
    given = on_many_ranks.leaves(on_many_ranks.batch(name))
    right = specified(preset, **given, temperatures=on_many_ranks.TEMPERATURES).loss
    value, *gradients = derived(right, given)
    for found, *_ in ranks:
        closely(found, value, 1e-5)
    for number, correct in enumerate(gradients, 1):
        closely(torch.cat([x[number] for x in ranks], -2), correct, 2e-5)


@pytest.mark.parametrize(
    ("preset", "name", "keys_from"),
    [
        ("seed", "everything", "ring"),
        ("paper", "coinciding", "gather"),
        pytest.param("seed", "everything", "gather", marks=SLOW),
        pytest.param("paper", "everything", "gather", marks=SLOW),
        pytest.param("paper", "everything", "ring", marks=SLOW),
        pytest.param("drift", "coinciding", "ring", marks=SLOW),
        pytest.param("drift", "groups", "gather", marks=SLOW),
    ],
)
def test_ranks_with_uneven_points(interpreted, preset, name, keys_from):
    interpreted(check_ranks, preset, name, keys_from)


def test_points_that_kernels_do_not_take():
    given = given_points()
    loss = losses.ContrastiveForce(impl="triton")
    with pytest.raises(ConfigError, match=r"'triton' cannot be used: rows are on cpu.*; use auto"):
        loss(**leaves(given))


def check_unfit() -> None:
    given = given_points()
    with pytest.raises(ConfigError, match=r"points are torch.float64, and kernels take float32"):
        losses.ContrastiveForce(impl="triton")(**given)
    losses.ContrastiveForce()(**given)  # auto finds another way


def test_what_kernels_do_not_take(interpreted):
    interpreted(check_unfit)


def check_far_addresses(file: str) -> None:
    """Rows of a panel 2^31 numbers from its first, of which a sparse file has the memory."""
    stride = 2**29
    panel = torch.from_file(file, shared=True, size=5 * stride).view(1, 5, stride)
    panel[..., :16] = torch.inf
    panel[0, :, :3] = 1.0 + torch.arange(5.0)[:, None]
    sums, tile = torch.zeros(1, 1, 5), TileShape(16, 16, 0, 4, 1)
    numbers = [5, 5, 3, 5, 1, 0, stride, 1]  # M, P, N, R, G, first, stride, parts
    kernel_calls.launch(
        *("distance_sum", 1, tile, [panel, panel, sums], numbers),
        {"HAS_WEIGHTS": False, "BM": 16, "BN": 16},
    )
    assert sums.tolist() == [[[3.0, 6.0, 9.0, 12.0, 15.0]]]


def test_addresses_have_64_bits(interpreted, tmp_path):
    file = tmp_path / "panel"
    with open(file, "wb") as panel:
        panel.truncate(5 * 2**31)
    interpreted(check_far_addresses, str(file))


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """Names of the kernels that would be started."""
    started: list[str] = []

    def record(name: str, *_: Any, **__: Any) -> None:
        started.append(name)

    for module in (fused, panels, segments, softmaxes):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(pair_kernel_calls, "_no_place", lambda device: None)
    return started


DIM = 1024
LAUNCHES = 320  # of 32,768 points of each kind; 400 are allowed
PANELS = 2 * 2**31  # of distances, and of weights


def counted(
    preset: str, points: int = 16384, labels: bool = False, cache_mb: float = 0.0
) -> counts.Counts:
    """Forward and backward of a loss of so many points of each kind, without data; with labels
    they have weights, too."""
    loss = losses.ContrastiveForce(FIVE, preset, impl="triton", cache_mb=cache_mb)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = {x: torch.empty(points, DIM) for x in ("negative", "positive")}
        given["negative"].requires_grad_()
        if labels:
            kinds = [*given]
            given |= {f"{x}_labels": torch.empty(points, dtype=torch.int64) for x in kinds}
            given |= {f"{x}_weights": torch.empty(points) for x in kinds}
        with counts.Counts() as found:
            loss(**given, counts=[(points, 0, points)]).backward()
    return found


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_waits_and_few_launches_at_full_size(preset, labels, recorded):
    """Whether distances are computed again or kept."""
    for cache_mb in (0.0, 2.0**15):
        recorded.clear()
        found = counted(preset, 32768, labels, cache_mb)
        assert not found.waits
        assert found.launches + len(recorded) <= LAUNCHES


@pytest.fixture
def fake_ranks() -> Iterator[list[tuple[int, int, int]]]:
    """Points of eight ranks, of which this process is one and the others do not exist."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    yield [(2048, 0, 2048)] * 6 + [(0, 0, 0), (0, 64, 5)]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("keys_from", ["gather", "ring", "local"])
def test_no_waits_on_many_ranks(keys_from, recorded, fake_ranks):
    """With labels and diagnostics; a ring holds the points of two ranks."""
    how = {"impl": "triton", "keys_from": keys_from, "cache_mb": 0.0, "diagnostics": True}
    loss = losses.ContrastiveForce(FIVE, "seed", **how)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = {x: torch.empty(2048, DIM) for x in ("negative", "positive")}
        given["negative"].requires_grad_()
        given |= {f"{x}_labels": torch.empty(2048, dtype=torch.int64) for x in [*given]}
        with counts.Counts() as found:
            loss(**given, counts=fake_ranks).backward()
    assert not found.waits
    assert "near" in recorded
    of_ranks = {"gather": 6, "ring": 2, "local": 1}[keys_from]
    of_points = 4096 * DIM * 4
    panels_of_rank = 3 * 4096 * (4096 if keys_from != "gather" else 6 * 4096 + 69) * 4
    assert found.peak <= panels_of_rank + (11 + 4 * of_ranks) * of_points


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_is_linear_and_that_of_panels(preset, recorded):
    """Beside panels, some copies of the points."""
    copies = {"seed": 8, "drift": 7, "paper": 10}[preset]
    for points in (16384, 32768):
        peak = counted(preset, points).peak
        assert peak <= PANELS + copies * 2 * points * DIM * 4


def test_a_number_read_by_the_host_is_found(recorded, monkeypatch):
    """The planted fault: norms are asked for on the host."""
    sort = panels.Panels._sorted

    def planted(self: panels.Panels, *arguments: Any) -> Any:
        self.norms.amax().item()
        return sort(self, *arguments)

    monkeypatch.setattr(panels.Panels, "_sorted", planted)
    with pytest.raises(DataDependentOutputException):
        counted("drift")


def test_memory_of_a_planted_allocation_is_counted(recorded, monkeypatch):
    before, kept = counted("drift").peak, []
    fill = panels.Panels._fill

    def planted(self: panels.Panels, *arguments: Any) -> None:
        kept.append(torch.empty(2**32, dtype=torch.uint8))
        fill(self, *arguments)

    monkeypatch.setattr(panels.Panels, "_fill", planted)
    assert counted("drift").peak >= before + 2**32
