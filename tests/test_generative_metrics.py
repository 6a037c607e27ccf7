"""Measures of generated samples against POT, torchmetrics, scikit-learn, scipy and closed forms."""

import itertools
import math
from collections.abc import Callable
from statistics import fmean

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.evaluation import (
    Classifier,
    class_agreement,
    density_coverage,
    energy_distance,
    frechet_distance,
    memorisation,
    mmd,
    precision_recall,
    sliced_wasserstein,
)
from dist_contrastive.evaluation.distances import MEDIAN_POINTS

SYMMETRIC = (energy_distance, mmd, sliced_wasserstein, frechet_distance)


def line(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without_labels(measure: Callable) -> Callable:
    return lambda x, y, **options: measure(x, None, y, None, **options)


MEASURES: dict[str, Callable] = {
    **{measure.__name__: measure for measure in SYMMETRIC},
    "precision_recall": without_labels(precision_recall),
    "density_coverage": without_labels(density_coverage),
    "memorisation": lambda x, y, **options: memorisation(x, y, y.flip(0).double() + 0.1, **options),
}


def numbers(result: object) -> list[float]:
    return [result] if isinstance(result, float) else list(vars(result).values())


def close_on_average(values: list[float], expected: float) -> bool:
    """Within four standard errors, with values that tell something."""
    error = torch.tensor(values).std().item() / math.sqrt(len(values))
    return error > 0 and abs(fmean(values) - expected) < 4 * error


@pytest.mark.parametrize("name", MEASURES)
def test_order_chunks_and_shape_do_not_matter(name: str) -> None:
    measure = MEASURES[name]
    x, y = normal(40, 12) + 100, normal(25, 12, seed=1) * 0.8 + 100.1
    x[:5] = y[:5]  # copies, which distances by products would not see
    expected = pytest.approx(numbers(measure(x, y)), rel=1e-9, abs=1e-9)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert numbers(measure(x[order], y.flip(0))) == expected
    assert numbers(measure(x.view(40, 3, 2, 2), y.view(25, 3, 2, 2))) == expected
    if name != "frechet_distance":
        for chunk in (1, 7, 40):
            assert numbers(measure(x, y, chunk=chunk)) == expected
    in_fp64 = pytest.approx(numbers(measure(x.float().double(), y.float().double())), rel=1e-12)
    assert numbers(measure(x.float(), y.float())) == in_fp64


@pytest.mark.parametrize("measure", SYMMETRIC)
def test_distances_are_symmetric_and_see_shift_and_spread(measure: Callable) -> None:
    x, y = normal(300, 3), normal(200, 3, seed=1)
    assert measure(x, y) == pytest.approx(measure(y, x), rel=1e-9)
    same = abs(measure(x, y))
    assert same < 0.1
    assert measure(x, y + 1) > 5 * same
    assert measure(x, y * 2) > 5 * same


@pytest.mark.parametrize("measure", [energy_distance, mmd])
def test_unbiased_distances_of_one_distribution_are_zero_on_average(measure: Callable) -> None:
    values = [measure(normal(20, 3, seed=i), normal(30, 3, seed=1000 + i)) for i in range(200)]
    assert close_on_average(values, 0.0)


@pytest.mark.parametrize("measure", [sliced_wasserstein, frechet_distance])
def test_biased_distances_of_one_distribution_go_to_zero(measure: Callable) -> None:
    few = measure(normal(100, 3), normal(100, 3, seed=1))
    many = measure(normal(10_000, 3), normal(10_000, 3, seed=1))
    assert 0 < many < few / 5


def test_energy_distance_by_hand() -> None:
    # 2 * mean(|0-1|, |0-5|, |2-1|, |2-5|) - |0-2| - |1-5| = 2 * 2.5 - 2 - 4
    assert energy_distance(line(0.0, 2.0), line(1.0, 5.0)) == pytest.approx(-1.0, abs=1e-6)
    # 2 * 10 - 1 - 2: every pair across is 10 apart on average
    assert energy_distance(line(0.0, 1.0), line(9.5, 11.5)) == pytest.approx(17.0, abs=1e-6)


def naive_u_statistic(kernel: Callable[[float], float], x: Tensor, y: Tensor) -> float:
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y) by loops over pairs of different points."""
    within = [
        fmean(kernel(math.dist(*pair)) for pair in itertools.permutations(z, 2)) for z in (x, y)
    ]
    return sum(within) - 2 * fmean(kernel(math.dist(*pair)) for pair in itertools.product(x, y))


def test_energy_distance_is_the_naive_one() -> None:
    x, y = normal(9, 4), normal(13, 4, seed=1) * 1.5
    expected = naive_u_statistic(lambda distance: -distance, x, y)
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [0.3, 1.0, 20.0])
def test_mmd_is_the_naive_one(width: float) -> None:
    x, y = normal(9, 4), normal(13, 4, seed=1) * 1.5
    expected = naive_u_statistic(lambda distance: math.exp(-((distance / width) ** 2) / 2), x, y)
    assert mmd(x, y, bandwidth=width) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_that_of_the_kernel_inception_distance(torchmetrics) -> None:
    """torchmetrics' estimator, with scikit-learn's Gaussian kernel; it takes as many of both."""
    x, y, width = normal(30, 4), normal(30, 4, seed=1) * 1.5, 1.3
    kernels = (rbf_kernel(a, b, gamma=1 / (2 * width**2)) for a, b in ((x, x), (x, y), (y, y)))
    expected = torchmetrics.image.kid.maximum_mean_discrepancy(*map(torch.from_numpy, kernels))
    assert mmd(x, y, bandwidth=width) == pytest.approx(expected.item(), rel=1e-9)


def test_mmd_of_gaussians_is_the_closed_form() -> None:
    # With X ~ N(a, 1), Y ~ N(b, 1): X - Y ~ N(a - b, 2), and E k is a Gaussian integral.
    dim, width, shift = 3, 1.5, 1.2

    def kernel(apart: float) -> float:
        return (width**2 / (width**2 + 2)) ** (dim / 2) * math.exp(-(apart**2) / 2 / (width**2 + 2))

    expected = 2 * kernel(0) - 2 * kernel(shift)
    move = torch.tensor([shift, 0, 0])
    values = [
        mmd(normal(40, dim, seed=i), normal(60, dim, seed=1000 + i) + move, bandwidth=width)
        for i in range(200)
    ]
    assert close_on_average(values, expected)
    assert expected > 0.1


def test_mmd_takes_the_median_distance() -> None:
    x, y = normal(8, 2), 2 * normal(11, 2, seed=1)  # 171 pairs: one in the middle
    median = float(np.median(pdist(torch.cat([x, y]).numpy())))
    assert mmd(x, y) == pytest.approx(mmd(x, y, bandwidth=median), rel=1e-12)
    assert mmd(1000 * x, 1000 * y) == pytest.approx(mmd(x, y), rel=1e-9)  # so no unit


def test_mmd_takes_the_median_of_some_where_there_are_many() -> None:
    # Every second point lies at 0: of every second point, the median distance would be tiny.
    half = MEDIAN_POINTS // 2 + 300
    x, y = normal(half, 1), normal(half, 1, seed=1) + 0.3
    x[::2] *= 1e-3
    y[::2] *= 1e-3
    median = float(np.median(pdist(torch.cat([x, y]).numpy())))
    assert mmd(x, y) == pytest.approx(mmd(x, y, bandwidth=median), rel=0.1)
    assert mmd(x, y) == mmd(x, y)


def test_mmd_of_copies() -> None:
    one_point, real = torch.ones(30, 2), normal(6, 2)
    assert 0.4 < mmd(one_point, real) <= 2  # most pairs are at distance 0
    assert mmd(one_point, one_point) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError, match=r"bandwidth of MMD is 0\.0: give a positive number"):
        mmd(one_point, real, bandwidth=0.0)
    with pytest.raises(ConfigError, match="bandwidth of MMD is nan"):
        mmd(one_point, real, bandwidth=math.nan)


integers = st.lists(st.integers(-5, 5), min_size=1, max_size=12)  # ties are common


@given(integers, integers)
@settings(max_examples=60, deadline=None)
def test_sliced_wasserstein_on_a_line_is_scipys(x: list[int], y: list[int]) -> None:
    ours = sliced_wasserstein(line(*x), line(*y), num_projections=3)
    assert ours == pytest.approx(wasserstein_distance(x, y), abs=1e-12)


def test_sliced_wasserstein_of_a_shift_is_the_closed_form() -> None:
    # |v . direction| on average: |v| times 2 / pi on the circle, and 1 / 2 on the sphere.
    for dim, factor in ((2, 2 / math.pi), (3, 0.5)):
        x, shift = normal(10, dim), torch.tensor([3.0, 4.0, 0.0])[:dim]
        value = sliced_wasserstein(x, x + shift, num_projections=4000, seed=1)
        assert value == pytest.approx(5 * factor, rel=0.03)
        repeated = (x + shift).repeat(3, 1)  # the same distribution, in other numbers
        again = sliced_wasserstein(x, repeated, num_projections=4000, seed=1)
        assert again == pytest.approx(value, rel=1e-9)


def test_sliced_wasserstein_averages_scipys_over_directions() -> None:
    x, y = normal(12, 3).float(), normal(17, 3, seed=1).float()
    angles = normal(4000, 3, seed=2).float()
    directions = angles / angles.norm(dim=1, keepdim=True)
    expected = fmean(wasserstein_distance(x @ d, y @ d) for d in directions)
    assert sliced_wasserstein(x, y, num_projections=4000) == pytest.approx(expected, rel=0.03)
    values = {sliced_wasserstein(x, y, seed=seed) for seed in (0, 0, 1)}
    assert len(values) == 2
    with pytest.raises(ConfigError, match="num_projections is 0: set 1 or more"):
        sliced_wasserstein(x, y, num_projections=0)


@pytest.mark.parametrize("sizes", [(12, 12), (12, 17)])
def test_sliced_wasserstein_is_that_of_pot(sizes: tuple[int, int]) -> None:
    """Along the same directions."""
    x, y = normal(sizes[0], 3), normal(sizes[1], 3, seed=1) + 0.3
    directions = torch.nn.functional.normalize(normal(50, 3, seed=7), dim=1)
    expected = ot.sliced_wasserstein_distance(
        x.numpy(), y.numpy(), projections=directions.T.numpy(), p=1
    )
    assert sliced_wasserstein(x, y, num_projections=50, seed=7) == pytest.approx(expected, rel=1e-9)


def with_moments(n: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Points whose mean and covariance are exactly `mean` and root^T root."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    return white @ root + mean


def test_frechet_distance_of_known_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 0.25]).double()
    mean = torch.tensor([1.0, -2.0, 2.0]).double()
    x = with_moments(20, 0 * mean, a.sqrt().diag(), seed=0)
    y = with_moments(30, mean, b.sqrt().diag(), seed=1)
    # Diagonal covariances: squares of the differences of deviations, (1 - 3)^2 + (2 - 1)^2.
    assert frechet_distance(x, y) == pytest.approx(9 + 4 + 1, rel=1e-12)


def fid(x: np.ndarray, y: np.ndarray) -> float:
    """As it is usually written."""
    apart = x.mean(axis=0) - y.mean(axis=0)
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    return float(apart @ apart + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real))


def test_frechet_distance_is_the_usual_fid() -> None:
    x, y = normal(50, 6) @ normal(6, 6, seed=2) + 30, normal(40, 6, seed=1) @ normal(6, 6, seed=3)
    assert frechet_distance(x, y) == pytest.approx(fid(x.numpy(), y.numpy()), rel=1e-10)


class _Flattened(torch.nn.Module):
    """Features of torchmetrics' FID: the first six values; it tries its features on one image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6].double()


def test_frechet_distance_is_that_of_torchmetrics(torchmetrics) -> None:
    x, y = normal(200, 6), normal(150, 6, seed=1) @ normal(6, 6, seed=2) + 1
    theirs = torchmetrics.image.fid.FrechetInceptionDistance(feature=_Flattened()).set_dtype(
        torch.float64
    )
    theirs.update(x[:, :, None, None], real=True)
    theirs.update(y[:, :, None, None], real=False)
    assert frechet_distance(x, y) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_frechet_distance_of_fewer_points_than_dimensions() -> None:
    x, y = normal(10, 3) + 1, 2 * normal(12, 3, seed=1)
    turned = torch.linalg.qr(normal(50, 3, seed=2)).Q.T  # three orthonormal directions of 50
    expected = fid(x.numpy(), y.numpy())
    assert frechet_distance(x @ turned + 7, y @ turned + 7) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, 0 * x[:2]) == pytest.approx(
        (x.mean(dim=0).square() + x.var(dim=0)).sum().item(), rel=1e-12
    )


@pytest.mark.parametrize(("n", "dim"), [(40, 5), (10, 60)])
def test_frechet_distance_of_equal_sets_is_zero(n: int, dim: int) -> None:
    x = normal(n, dim)
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-12 * dim
    assert 0 <= frechet_distance(x.repeat(2, 1), x.repeat(2, 1)) < 1e-12 * dim


def test_precision_recall_by_hand() -> None:
    # k = 1. Real radii: 1, 1, 2 (balls [-1, 1], [0, 2], [1, 5]); generated radii: 0.5, 0.5, 96.
    real, generated = line(0.0, 1.0, 3.0), line(3.5, 4.0, 100.0)
    zeros = torch.zeros(3, dtype=torch.int64)
    result = precision_recall(real, zeros, generated, zeros, k=1)
    assert result.precision == pytest.approx(2 / 3)
    assert result.recall == pytest.approx(1 / 3)  # 3.0 only: [3, 4], [3.5, 4.5], [4, 196]
    assert precision_recall(real, None, generated, None, k=1) == result


def test_density_coverage_by_hand() -> None:
    # k = 1. Real balls as above; 0.5 lies in two of them, 4 in one, 9 in none.
    real, generated = line(0.0, 1.0, 3.0), line(0.5, 4.0, 9.0, 9.0)
    result = density_coverage(real, None, generated, None, k=1)
    assert result.density == pytest.approx((2 + 1 + 0 + 0) / 4)
    assert result.coverage == 1
    result = density_coverage(real, None, generated[1:], None, k=1)
    assert result.density == pytest.approx(1 / 3)
    assert result.coverage == pytest.approx(1 / 3)
    # k = 2: radii 3, 2, 3. 0.5 lies in all three balls, 4 in [0, 6] alone.
    result = density_coverage(real, None, generated, None, k=2)
    assert result.density == pytest.approx((3 + 1) / 2 / 4)


def naive_manifold(real: list, generated: list, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage of points on a line."""

    def radius(points: list, i: int) -> float:
        return sorted(abs(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(point: float, points: list, i: int) -> bool:
        return abs(point - points[i]) <= radius(points, i)

    in_real = [[inside(g, real, i) for i in range(len(real))] for g in generated]
    in_generated = [[inside(r, generated, j) for j in range(len(generated))] for r in real]
    return (
        fmean(map(any, in_real)),
        fmean(map(any, in_generated)),
        fmean(map(sum, in_real)) / k,
        fmean(map(any, zip(*in_real, strict=True))),
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_manifold_measures_are_the_naive_ones(data: st.DataObject) -> None:
    k, chunk = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    points = st.lists(st.integers(-6, 6), min_size=k + 1, max_size=8)
    classes = [(data.draw(points), data.draw(points)) for _ in range(data.draw(st.integers(1, 3)))]
    by_class = [naive_manifold(*both, k) for both in classes]
    expected = [fmean(values) for values in zip(*by_class, strict=True)]
    sides = []
    for side in (0, 1):
        pairs = [(point, 7 * i) for i, both in enumerate(classes) for point in both[side]]
        pairs = data.draw(st.permutations(pairs))
        sides += [line(*(p for p, _ in pairs)), torch.tensor([label for _, label in pairs])]
    ours = precision_recall(*sides, k=k, chunk=chunk)
    assert (ours.precision, ours.recall) == pytest.approx(expected[:2])
    theirs = density_coverage(*sides, k=k, chunk=chunk)
    assert (theirs.density, theirs.coverage) == pytest.approx(expected[2:])


def test_manifold_and_memorisation_by_neighbours_of_scikit_learn() -> None:
    real, generated, k = normal(80, 3), normal(60, 3, seed=1) * 1.3, 3

    def radii(points: Tensor) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k).fit(points.numpy()).kneighbors()[0][:, -1]

    apart = cdist(generated.numpy(), real.numpy())
    in_real, in_generated = apart <= radii(real), radii(generated) >= apart.T
    ours = precision_recall(real, None, generated, None, k)
    assert ours.precision == pytest.approx(in_real.any(axis=1).mean())
    assert ours.recall == pytest.approx(in_generated.any(axis=1).mean())
    theirs = density_coverage(real, None, generated, None, k)
    assert theirs.density == pytest.approx(in_real.sum(axis=1).mean() / k)
    assert theirs.coverage == pytest.approx(in_real.any(axis=0).mean())
    nearest = NearestNeighbors(n_neighbors=1).fit(real.numpy()).kneighbors(generated.numpy())[0]
    found = memorisation(generated, real, generated)
    assert found.generated_median == pytest.approx(np.median(nearest))
    assert found.generated_low == pytest.approx(np.quantile(nearest, 0.05))


def test_density_and_coverage_of_real_samples_are_the_closed_form() -> None:
    # Naeem et al., section 3.3; the rank of a new point among n is uniform.
    n, m, k = 25, 20, 3
    pairs = [(normal(n, 2, seed=i), normal(m, 2, seed=1000 + i)) for i in range(300)]
    results = [density_coverage(x, None, y, None, k=k) for x, y in pairs]
    assert close_on_average([result.density for result in results], 1.0)
    missed = math.prod((n - i) / (m + n - i) for i in range(1, k + 1))
    assert close_on_average([result.coverage for result in results], 1 - missed)


def modes(n: int, seed: int, count: int = 4) -> Tensor:
    """Points around the first `count` of four well separated corners, taken in turn."""
    corners = 20 * torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return corners[torch.arange(n) % count] + normal(n, 2, seed=seed)


def test_a_dropped_mode_lowers_recall_and_coverage_alone() -> None:
    real, complete, dropped = modes(400, 0), modes(400, 1), modes(400, 2, count=3)
    whole = precision_recall(real, None, complete, None)
    part = precision_recall(real, None, dropped, None)
    assert part.precision == pytest.approx(whole.precision, abs=0.05)
    assert part.recall == pytest.approx(0.75 * whole.recall, abs=0.05)
    whole_cover = density_coverage(real, None, complete, None)
    part_cover = density_coverage(real, None, dropped, None)
    assert part_cover.density > 0.9
    assert part_cover.coverage == pytest.approx(0.75 * whole_cover.coverage, abs=0.05)
    off = precision_recall(real, None, complete + 10, None)
    assert (off.precision, off.recall) == (0, 0)


def test_an_outlier_raises_recall_but_not_coverage() -> None:
    # One mode of four, and k + 1 points so far out that their balls hold all of the data.
    real, generated = modes(400, 0), modes(100, 1, count=1)
    generated[:6] = 1000 * normal(6, 2, seed=2)
    assert precision_recall(real, None, generated, None, k=5).recall > 0.99
    assert density_coverage(real, None, generated, None, k=5).coverage < 0.3


def test_precision_recall_stays_within_classes() -> None:
    points = line(0.0, 1.0, 10.0, 11.0)
    labels = torch.tensor([0, 0, 1, 1])
    right = precision_recall(points, labels, points, labels, k=1)
    wrong = precision_recall(points, labels, points, labels.flip(0), k=1)
    assert (right.precision, right.recall) == (1.0, 1.0)
    assert (wrong.precision, wrong.recall) == (0.0, 0.0)
    wrong_cover = density_coverage(points, labels, points, labels.flip(0), k=1)
    assert (wrong_cover.density, wrong_cover.coverage) == (0.0, 0.0)


def test_manifold_errors() -> None:
    points, labels = line(0.0, 1.0, 10.0, 11.0), torch.tensor([0, 0, 1, 1])
    with pytest.raises(
        ConfigError,
        match="k = 3 need 4 real and 4 generated samples of each class, but class 0 has 2 real and "
        "2 generated: take more or lower k",
    ):
        precision_recall(points, labels, points, labels, k=3)
    with pytest.raises(
        ConfigError, match=r"need 2 real and 1 generated .* class 1 has 2 real and 0"
    ):
        density_coverage(points, labels, points, 0 * labels, k=1)
    with pytest.raises(
        ConfigError, match=r"need 3 real and 1 generated .* class 0 has 2 real and 4"
    ):
        density_coverage(points, labels, torch.cat([points, points]), labels.repeat(2), k=2)
    with pytest.raises(ConfigError, match="but k is 0: set 1 or more"):
        density_coverage(points, labels, points, labels, k=0)
    with pytest.raises(
        DataError, match="the generated samples have no labels, but the others have"
    ):
        precision_recall(points, labels, points, None, k=1)
    with pytest.raises(DataError, match="the real samples have no labels, but the others have"):
        precision_recall(points, None, points, labels, k=1)
    with pytest.raises(DataError, match=r"4 samples in generated, but .* shape \[3\]: give one"):
        precision_recall(points, labels, points, labels[:3], k=1)


def test_memorisation_by_hand() -> None:
    train, held_out = line(0.0, 10.0, 20.0), line(1.0, 12.0, 20.0, 25.0)  # 1, 2, 0 and 5 away
    generated = line(0.0, 10.02, 23.0, 40.0, 21.0)  # 0, 0.02, 3, 20 and 1 away
    result = memorisation(generated, train, held_out)
    assert (result.generated_median, result.held_out_median) == pytest.approx((1, 1.5))
    # Quantiles by numpy's definition: 5 % of 4 steps from 0 to 0.02, of 3 steps from 0 to 1.
    assert result.generated_low == pytest.approx(0.2 * 0.02, rel=1e-4)
    assert result.held_out_low == pytest.approx(0.15)
    assert result.suspicious == pytest.approx(2 / 5)  # 1 % of 3 steps: up to 0.03
    assert (result.copies, result.held_out_copies) == (1, 1)
    # Where even held-out samples are copies, a copy is as near as they are.
    assert memorisation(generated, train, train).suspicious == pytest.approx(1 / 5)


def test_memorisation_tells_copies_from_honest_samples() -> None:
    train, held_out, honest = (normal(500, 8, seed=i) + 1000 for i in range(3))
    train, held_out, honest = train.float(), held_out.float(), honest.float()
    result = memorisation(honest, train, held_out)
    assert result.generated_median == pytest.approx(result.held_out_median, rel=0.05)
    assert result.generated_low == pytest.approx(result.held_out_low, rel=0.1)
    assert result.suspicious < 0.04
    assert result.copies == 0
    copies = torch.cat([honest[:400], train[:60], train[:40] + 1e-3])
    result = memorisation(copies, train, held_out)
    assert result.copies == 60
    assert result.suspicious == pytest.approx(0.2, abs=0.04)
    assert result.generated_low < 0.01 < result.held_out_low
    assert result.held_out_copies == 0


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images = torch.from_numpy(data.data).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return images[train], labels[train], images[test], labels[test]


def test_classifier_knows_real_digits(digits: tuple[Tensor, ...]) -> None:
    train, train_labels, test, test_labels = digits
    classifier = Classifier(train, train_labels)
    accuracy = classifier.accuracy(test, test_labels)
    assert accuracy > 0.98
    assert classifier.accuracy(test, (test_labels + 1) % 10) < 0.02
    predicted = classifier.predict(test.flip(0))  # asked again: each sample for itself
    assert (predicted == test_labels.flip(0)).double().mean().item() == accuracy
    assert predicted.dtype == torch.int64
    # Neither scale and shift of the values nor the names of classes matter.
    other = Classifier(100 * train + 7, 3 * train_labels + 5)
    assert torch.equal(other.predict(100 * test.flip(0) + 7), 3 * predicted + 5)


def test_classifier_errors(digits: tuple[Tensor, ...]) -> None:
    train, train_labels, test, test_labels = (part[:50] for part in digits)
    classifier = Classifier(train, train_labels)
    with pytest.raises(DataError, match=r"rows of one width .* but there are 63 in x and 64 in tr"):
        classifier.predict(test.flatten(1)[:, 1:])
    with pytest.raises(DataError, match=r"50 samples in x, but their labels have the shape \[49\]"):
        classifier.accuracy(test, test_labels[1:])
    with pytest.raises(DataError, match=r"50 samples in train, but .* shape \[50, 1\]"):
        Classifier(train, train_labels[:, None])
    with pytest.raises(ConfigError, match="2 classes or more, but its 50 have 1: take more"):
        Classifier(train, 0 * train_labels)
    with pytest.raises(DataError, match="finite numbers are wanted for the classifier, but 50 of"):
        Classifier(train * math.nan, train_labels)


def test_class_agreement() -> None:
    real, labels = line(0.0, 1.0, 10.0, 11.0), torch.tensor([0, 0, 1, 1])
    generated, asked = line(0.4, 9.0, 12.0, 2.0), torch.tensor([0, 1, 0, 0])
    assert class_agreement(real, labels, generated, asked, k=1) == 0.75


@pytest.mark.parametrize("name", MEASURES)
def test_bad_samples_are_refused_in_one_sentence(name: str) -> None:
    measure, x, y = MEASURES[name], normal(20, 4), normal(20, 4, seed=1)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[7, 2] = broken[9, 0] = bad
        with pytest.raises(DataError, match=r"2 of the 20 samples in \w+ hold NaN .* row 7: leave"):
            measure(broken, y)
        with pytest.raises(DataError, match=r"2 of the 20 samples in \w+ hold NaN .* row 7: leave"):
            measure(x, broken)
    with pytest.raises(DataError, match=r"one width are wanted .* there are 4 in \w+ and 3 in \w+"):
        measure(x, y[:, :3])
    with pytest.raises(DataError, match=r"rows \[n, D\] are wanted .* has the shape \[20\]: give"):
        measure(x, y[:, 0])
    with pytest.raises(DataError, match=r"has the shape \[20, 0\]: give each sample a row of 1"):
        measure(x[:, :0], y[:, :0])
    with pytest.raises(ConfigError, match=r"or more samples are wanted .* but \w+ has 0: generate"):
        measure(x, y[:0])


@pytest.mark.parametrize("measure", [energy_distance, mmd, frechet_distance])
def test_one_sample_is_too_few(measure: Callable) -> None:
    with pytest.raises(ConfigError, match=r"2 or more samples are wanted .* but y has 1: generate"):
        measure(normal(5, 2), normal(1, 2))
