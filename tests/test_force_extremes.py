"""The contrastive force where numbers get large, small or equal: never NaN, and fp32 is enough;
and the exponentials that it is made of."""

import pytest
import torch
import torch.distributed as dist
from force_formulas import FIVE, seed_force
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.losses.force.affinity import Powers, Scratch
from dist_contrastive.testing import run_ranks

PRESETS = ("seed", "drift", "paper")
IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 16}, {"impl": "chunked"}]
ALONE_AND_TOGETHER = [(0.001,), (0.02,), (0.2,), (0.001, *FIVE)]
M, N = 24, 32
SMALLEST = 1e-20  # a force that moves nothing; somewhere below, fp32 has 0


def normal(num_points: int, dim: int, seed: int) -> Tensor:
    return torch.randn(num_points, dim, generator=torch.Generator().manual_seed(seed))


def clouds(name: str, dim: int) -> tuple[Tensor, Tensor]:
    """Generated points and data."""
    x, y = 0.8 * normal(M, dim, 3) + 0.1, normal(N, dim, 4)
    near = 1e-3 * normal(M, dim, 5)
    first = slice(0, 1)
    return {
        "plain": (x, y),
        "away from the origin": (x + 100, y + 100),
        "all equal": (torch.ones(M, dim), torch.ones(N, dim)),
        "collapsed": (x[first] + near, y),
        "collapsed, one positive": (x[first] + near, y[first]),
        "collapsed to a point": (x[first].repeat(M, 1), y),
        "collapsed to a point, one positive": (x[first].repeat(M, 1), y[first]),
        "exact pairs": (x[: M // 2].repeat(2, 1), y[: N // 2].repeat(2, 1)),
        "on the data": (y[:M].clone(), y),
        "close pairs": (torch.cat([x, x + near]), y),
        "one alone": (torch.cat([y[:1].repeat(M, 1), x[:1]]), y[:1].repeat(N, 1)),
        "one of each": (x[:1], y[:1]),
        "two and one": (x[:2], y[:1]),
        "tight modes": tuple(
            4 * z[:8].repeat(-(-len(z) // 8), 1)[: len(z)] + 1e-2 * z for z in (x, y)
        ),
        "outlier in the data": (x, torch.cat([y, torch.full((1, dim), 1e6)])),
        "outlier generated": (torch.cat([x, torch.full((1, dim), 1e6)]), y),
        "tiny": (1e-15 * x, 1e-15 * y),
        "huge": (1e15 * x, 1e15 * y),
    }[name]


NAMES = (
    "plain", "away from the origin", "all equal", "collapsed", "collapsed, one positive",
    "collapsed to a point", "collapsed to a point, one positive", "exact pairs", "on the data",
    "close pairs", "tight modes", "one alone", "one of each", "two and one", "outlier in the data",
    "outlier generated", "tiny", "huge",
)  # fmt: skip


def moved(loss: losses.ContrastiveForce, negative: Tensor, positive: Tensor, **given) -> Tensor:
    """What the gradient tells of the force, in units of the coordinates' extent; all is finite."""
    negative = negative.clone().requires_grad_()
    value = loss(negative, positive, **given)
    gradient = torch.autograd.grad(value, negative)[0]
    assert value.isfinite()
    assert gradient.isfinite().all()
    extent = torch.cat([negative.detach(), positive]).double().std(0).norm().item() or 1.0
    return gradient.double() * extent * negative.numel()


def tolerance(temperatures: tuple, *points: Tensor) -> float:
    """1e-4, or what rounding distances to fp32 makes of the exponent of a nearest neighbour."""
    x = torch.cat(points).double()
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = d.masked_fill(d == 0, torch.inf).amin(1)
    exponent = nearest.nan_to_num(posinf=0.0).max() / (d.mean() * min(temperatures))
    return max(1e-4, 2 * torch.finfo(torch.float32).eps * exponent.nan_to_num().item())


def check(
    preset: str, temperatures: tuple, *points: Tensor, chunk_size: int | None = None, **given
) -> None:
    """fp32 in tiles is near dense fp64, relative to the largest force."""
    exact = losses.ContrastiveForce(temperatures, preset, impl="dense")
    single = losses.ContrastiveForce(temperatures, preset, impl="chunked", chunk_size=chunk_size)
    doubled = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    right = moved(exact, *(x.double() for x in points), **doubled)
    error = (moved(single, *points, **given) - right).abs().max().item()
    size = right.abs().max().item()
    assert error <= tolerance(temperatures, *points) * max(size, SMALLEST), f"{error} of {size}"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperatures", ALONE_AND_TOGETHER, ids=str)
def test_fp32_is_near_fp64(preset, name, temperatures):
    for dim, chunk_size in ((2, None), (64, 16)):
        check(preset, temperatures, *clouds(name, dim), chunk_size=chunk_size)


def test_sums_of_close_points_keep_their_digits():
    """Sums of keys, less sums of rows nearby, cancel: in fp32 they would be off by 2e-5."""
    points = clouds("collapsed", 64)
    exact = losses.ContrastiveForce(FIVE, "seed", impl="dense")
    single = losses.ContrastiveForce(FIVE, "seed", impl="chunked")
    right, found = moved(exact, *(x.double() for x in points)), moved(single, *points)
    assert (found - right).abs().max() <= 5e-6 * right.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
def test_fp32_is_near_fp64_in_many_dimensions(preset):
    """Enough points that few close pairs are not worth exact differences of all."""
    points = 0.8 * normal(100, 4096, 3) + 0.1, normal(110, 4096, 4)
    exact = losses.ContrastiveForce((0.001, 0.05), preset, impl="dense")
    single = losses.ContrastiveForce((0.001, 0.05), preset, impl="chunked")
    right, found = moved(exact, *(x.double() for x in points)), moved(single, *points)
    assert (found - right).abs().max() <= 2e-4 * right.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "name", ["plain", "collapsed to a point", "exact pairs", "outlier generated"]
)
@pytest.mark.parametrize("temperatures", [(0.001,), (0.02,), FIVE], ids=str)
def test_weights_of_many_sizes(preset, name, temperatures):
    """Some are 0, and some so far apart that their tiles need the exponential of each pair."""
    x, y = clouds(name, 8)
    weights = torch.ones(len(x)), torch.ones(len(y)), torch.ones(5)
    weights[0][::3], weights[1][:16], weights[2][1] = 0.0, 0.0, 0.0  # a tile without any
    weights[0][1], weights[1][-1], weights[2][2] = 1e-15, 1e15, 1e-30
    given = dict(
        zip(("negative_weights", "positive_weights", "fixed_weights"), weights, strict=True)
    )
    check(preset, temperatures, x, y, chunk_size=16, fixed=normal(5, 8, 6), **given)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["negative", "positive", "fixed"])
def test_kinds_whose_weights_are_all_0_count_for_nothing(preset, kind):
    given = {"fixed": normal(5, 8, 6), f"{kind}_weights": torch.zeros(24)}
    x, y = clouds("plain", 8)
    given[f"{kind}_weights"] = torch.zeros(len({"negative": x, "positive": y, **given}[kind]))
    check(preset, FIVE, x, y, **given)
    loss = losses.ContrastiveForce(FIVE, preset)
    assert (loss(x, y, **given) == 0) == (kind == "positive")
    everything = {f"{k}_weights": torch.zeros(n) for k, n in (("negative", 24), ("positive", 32))}
    assert loss(x, y, **everything) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_without_weight_are_nothing_beside_points_that_coincide(preset):
    """Coinciding points have the largest weights, and add nothing to a small unit."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 1.5]])
    y = torch.tensor([[0.0, 1.5], [-3.0, 1.0]])
    for weights in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])):
        for temperatures in ((0.001,), (0.001, 0.3)):
            check(preset, temperatures, x, y, chunk_size=1, positive_weights=weights)


@pytest.mark.parametrize("preset", PRESETS)
def test_forces_about_to_underflow(preset):
    """At some temperature the forces beside the largest weight are subnormal numbers."""
    x, y = clouds("one alone", 2)
    for i in range(60):
        loss = losses.ContrastiveForce((0.08 * 1.01**i,), preset, impl="chunked")
        moved(loss, x, y)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_bf16_points_are_computed_with_in_fp32(preset, impl):
    given = [x.bfloat16() for x in (*clouds("plain", 64), normal(5, 64, 6), torch.rand(M))]
    loss = losses.ContrastiveForce(preset=preset, impl=impl)
    values = []
    for x, y, fixed, weights in (given, [x.float() for x in given]):
        x.requires_grad_()
        value = loss(x, y, fixed=fixed, negative_weights=weights)
        values.append((value.detach(), torch.autograd.grad(value, x)[0]))
    (value, gradient), (right, right_gradient) = values
    assert torch.equal(value, right)
    assert torch.equal(gradient, right_gradient.bfloat16())


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("temperatures", [(0.01,), (0.02,), FIVE])
def test_fp32_where_naive_fp32_fails(options, preset, temperatures):
    """D = 256 and temperature 0.01: affinities underflow in fp32, the force must not."""
    positive = torch.randn(48, 256, dtype=torch.float64)
    negative = 0.8 * torch.randn(40, 256, dtype=torch.float64) + 0.1
    concat = torch.cat([positive, negative])
    scale = torch.cdist(concat, concat).mean()
    exact = losses.ContrastiveForce(temperatures, preset, impl="dense")
    single = losses.ContrastiveForce(temperatures, preset, **options)
    expected = exact.force(negative / scale, positive / scale)
    found = single.force((negative / scale).float(), (positive / scale).float())
    assert found.isfinite().all()
    # Relative to the largest force; below 1e-38 fp32 has no number left and 0 is right.
    error = (found - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max() + 1e-38
    loss = single(negative.float(), positive.float())
    torch.testing.assert_close(loss.double(), exact(negative, positive), rtol=1e-4, atol=1e-38)


def test_naive_fp32_does_fail_there():
    """The reason for the logarithms; should this ever pass, the test above proves nothing."""
    positive, negative = torch.randn(6, 256) / 22, torch.randn(5, 256) / 22
    assert not seed_force(positive, negative, 0.01).isfinite().all()


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("temperature", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("case", ["all equal", "duplicates", "one of each", "far outlier"])
def test_never_nan(options, preset, temperature, case):
    positive, negative = torch.randn(9, 8), torch.randn(8, 8)
    if case == "all equal":
        positive, negative = torch.ones(9, 8), torch.ones(8, 8)
    elif case == "duplicates":
        negative[:4] = negative[0]
        positive[:3] = negative[0]
    elif case == "one of each":
        positive, negative = positive[:1], negative[:1]
    else:
        positive[0] = 1e6
    negative.requires_grad_()
    loss = losses.ContrastiveForce((temperature,), preset, **options)(negative, positive)
    loss.backward()
    assert loss.isfinite()
    assert negative.grad.isfinite().all()
    if case in ("all equal", "one of each"):  # no other negative, or nowhere to go
        assert loss == 0


def far_points() -> list[Tensor]:
    return [0.8 * normal(11, 256, 6) + 0.1, normal(13, 256, 7)]


def beside_an_outlier() -> Tensor:
    """Rank 0 has a far point and nothing else; slopes of the points that are not far."""
    negative, positive = far_points()
    if dist.get_rank() == 0:
        negative, positive = torch.full((1, 256), -1e5), positive[:0]
    negative.requires_grad_()
    losses.ContrastiveForce(impl="chunked")(negative, positive).backward()
    return negative.grad


def test_the_outlier_of_one_rank_costs_no_digits():
    _, found = run_ranks(beside_an_outlier, 2)
    negative, positive = (x.double() for x in far_points())
    negative = torch.cat([torch.full((1, 256), -1e5).double(), negative]).requires_grad_()
    losses.ContrastiveForce(impl="dense")(negative, positive).backward()
    right = 2 * negative.grad[1:]
    assert (found.double() - right).norm() <= 1e-5 * right.norm()


RING = [(preset, t) for preset in PRESETS for t in ((0.001,), (0.01,), FIVE)]


def fp32_on_ranks() -> list[Tensor]:
    """In a ring; ranks 0 and 1 have points of one kind alone."""
    sizes = ((3, 0, 8), (0, 11, 2))
    shares = (x.split(n)[dist.get_rank()] for x, n in zip(far_points(), sizes, strict=True))
    negative, positive = shares
    ring = {"keys_from": "ring", "impl": "chunked"}
    return [losses.ContrastiveForce(t, preset, **ring)(negative, positive) for preset, t in RING]


def test_fp32_in_a_ring_where_naive_fp32_fails():
    found = run_ranks(fp32_on_ranks, 3)
    for (preset, t), values in zip(RING, zip(*found, strict=True), strict=True):
        exact = losses.ContrastiveForce(t, preset, impl="dense")
        expected = exact(*(x.double() for x in far_points()))
        for value in values:
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-38)


SETS = [
    (0.2,),
    (0.01, 0.02, 0.05, 0.1, 0.2),  # powers 2, 4, 10, 20
    (0.02, 0.05, 0.2),
    (0.2, 0.01, 0.05, 0.1, 0.02),  # in any order
    (0.1, 0.1, 0.05, 0.05),  # some twice
    (0.3, 0.07, 0.05),  # the last is a sixth of the first
    (0.05, 0.3, 1.0),  # 0.3 is no power of any
    (64.0, 1.0, 0.5),  # 64 is the largest power; 0.5 would be the 128th
    (1.0, 1 / 3, 1 / 7, 1 / 49, 1 / 63),
    (0.1, 0.1 * (1 + 1e-7)),  # nearly the same is not the same
]


def exponentials(
    powers: Powers, temperatures: tuple, x: Tensor, scale: Tensor
) -> dict[int, Tensor]:
    """By number of the temperature; each is looked at before the next is asked for."""
    factor = -1 / (x.new_tensor(temperatures)[:, None] * scale)
    # What is given may be overwritten, and so may what is yielded.
    return {t: y.clone() for t, y in powers.exponentials(x.clone(), factor)}


def check_powers(powers: Powers, temperatures: tuple, x: Tensor, scale: Tensor) -> None:
    numbers = exponentials(powers, temperatures, x, scale)
    assert sorted(numbers) == list(range(len(temperatures)))
    for t, y in numbers.items():
        exponent = -x.double() / (temperatures[t] * scale.double()[:, None, None])
        # The exponent is rounded, and a power has the error of its base as often.
        bound = torch.finfo(x.dtype).eps * (2 * exponent.abs() + 140) * exponent.exp()
        error = (y.double() - exponent.exp()).abs()
        at_zero = exponent == -torch.inf
        assert (y[at_zero] == 0).all()
        assert (error <= bound + torch.finfo(x.dtype).tiny)[~at_zero].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperatures", SETS, ids=str)
def test_exponentials(temperatures, dtype):
    """From 0 to infinity, in groups of their own scales."""
    x = torch.rand(3, 5, 7, dtype=dtype) * torch.logspace(-3, 2, 7, dtype=dtype)
    x[:, 0, 0], x[:, 1, 1] = 0.0, torch.inf
    check_powers(Powers(temperatures), temperatures, x, torch.tensor([0.5, 1.0, 3.0], dtype=dtype))


@drawn(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.floats(1e-3, 10))
@settings(max_examples=60, deadline=None)
def test_exponentials_at_any_temperatures(divisors, largest):
    temperatures = tuple(largest / n for n in divisors)
    x = torch.linspace(0, 3, 24, dtype=torch.float64).view(2, 3, 4)
    check_powers(
        Powers(temperatures), temperatures, x, torch.tensor([1.0, 2.0], dtype=torch.float64)
    )


def test_one_after_the_other_with_the_same_memory():
    """Of other shapes and dtypes, smaller and larger: what was left in memory does not show."""
    temperatures = (0.01, 0.02, 0.07, 0.2)
    powers = Powers(temperatures)
    for shape, dtype in (
        ((2, 3, 4), torch.float32),
        ((1, 2, 2), torch.float32),
        ((2, 9, 9), torch.float64),
        ((2, 3, 4), torch.float32),
    ):
        check_powers(
            powers, temperatures, torch.rand(shape, dtype=dtype), torch.ones(shape[0], dtype=dtype)
        )


def test_few_exponentials_are_taken(monkeypatch):
    """One for all temperatures that divide the largest, and one for each of the others."""
    taken = []
    exp_ = Tensor.exp_
    monkeypatch.setattr(Tensor, "exp_", lambda x: taken.append(x.shape) or exp_(x))
    for temperatures, expected in (((0.01, 0.02, 0.05, 0.1, 0.2), 1), ((0.3, 0.2, 0.1), 2)):
        taken.clear()
        exponentials(Powers(temperatures), temperatures, torch.rand(1, 2, 3), torch.ones(1))
        assert len(taken) == expected


def test_scratch_is_kept_by_name_and_grows():
    scratch = Scratch()
    first = scratch.like("a", torch.empty(2, 3))
    assert scratch.like("a", torch.empty(3, 2)).data_ptr() == first.data_ptr()
    assert scratch.like("b", torch.empty(2, 3)).data_ptr() != first.data_ptr()
    larger = scratch.like("a", torch.empty(4, 5))
    assert larger.shape == (4, 5)
    assert scratch.like("a", torch.empty(2, 3)).data_ptr() == larger.data_ptr()
    assert scratch.like("a", torch.empty(2, dtype=torch.float64)).dtype == torch.float64
