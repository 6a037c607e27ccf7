"""The contrastive force against the seed, written out literally."""

import pytest
import torch
from torch import Tensor

from dist_contrastive import losses

TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)
IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 4}, {"impl": "chunked"}]


def seed_force(positive: Tensor, negative: Tensor, temp: float) -> Tensor:
    """Seed 001, with its triple loop."""
    num_positive, num_negative = positive.shape[0], negative.shape[0]
    concat = torch.cat([negative, positive], dim=0)
    dist = torch.cdist(concat, concat, p=2)
    affinity = torch.softmax(-dist / temp, dim=1).pow(0.5)
    affinity = affinity * torch.softmax(-dist / temp, dim=0).pow(0.5)
    force = torch.zeros_like(negative)
    for j in range(num_negative):
        for i in range(num_positive):
            for k in range(num_negative):
                if k != j:
                    weight = affinity[j, i + num_negative] * affinity[j, k]
                    force[j] += weight * (positive[i] - negative[k])
    return force / ((dist * affinity) ** 2).mean().sqrt()


def seed_loss(positive: Tensor, negative: Tensor) -> Tensor:
    concat = torch.cat([positive, negative], dim=0)
    scale = torch.cdist(concat, concat, p=2).mean()
    positive, negative = positive / scale, negative / scale
    total = sum(seed_force(positive.detach(), negative.detach(), t) for t in TEMPERATURES)
    return ((negative - (negative + total).detach()) ** 2).mean()


def drift_force(positive: Tensor, negative: Tensor, temp: float) -> Tensor:
    """The masked form: a point is left out of its own softmax."""
    concat = torch.cat([negative, positive])
    dist = torch.cdist(concat, concat)
    scores = (-dist / temp).fill_diagonal_(-torch.inf)
    affinity = (scores.softmax(1) * scores.softmax(0)).sqrt()
    norm = ((dist * affinity) ** 2).mean().sqrt()
    m = len(negative)
    pull, push = affinity[:m, m:], affinity[:m, :m]
    force = push.sum(1, keepdim=True) * (pull @ positive)
    return (force - pull.sum(1, keepdim=True) * (push @ negative)) / norm


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    positive = torch.randn(7, 4, dtype=torch.float64)
    negative = torch.randn(6, 4, dtype=torch.float64) + 0.5
    return positive, negative


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 5.0])
def test_force_is_the_seed(points, options, temperature):
    expected = seed_force(*points, temperature)
    found = losses.contrastive_force(*points, temperature, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("options", IMPLS)
def test_seed_loss_and_gradient_through_the_scale(points, options):
    positive, negative = (x.requires_grad_() for x in points)
    expected = seed_loss(positive, negative)
    found = losses.ContrastiveForce(TEMPERATURES, preset="seed", **options)(negative, positive)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for mine, correct in zip(
        torch.autograd.grad(found, [positive, negative]),
        torch.autograd.grad(expected, [positive, negative]),
        strict=True,
    ):
        assert correct.norm() > 0  # positives too: through the scale
        torch.testing.assert_close(mine, correct, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("options", IMPLS)
def test_drift_preset(points, options):
    positive, negative = points
    concat = torch.cat(points)
    scale = torch.cdist(concat, concat).mean()
    force = sum(drift_force(positive / scale, negative / scale, t) for t in TEMPERATURES)
    negative.requires_grad_()
    loss = losses.ContrastiveForce(TEMPERATURES, preset="drift", **options)(negative, positive)
    torch.testing.assert_close(loss, force.square().mean(), rtol=1e-9, atol=0)
    # The scale is a constant here: the gradient is -2 F / scale, averaged over elements.
    expected = -2 * force / scale / force.numel()
    torch.testing.assert_close(torch.autograd.grad(loss, negative)[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", ["seed", "drift"])
def test_leading_dimensions_are_independent_groups(options, preset):
    positive = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    negative = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    found = losses.contrastive_force(positive, negative, 0.3, preset, **options)
    for i in range(2):
        for j in range(3):
            alone = losses.contrastive_force(positive[i, j], negative[i, j], 0.3, preset)
            torch.testing.assert_close(found[i, j], alone, rtol=1e-9, atol=1e-12)
    loss = losses.ContrastiveForce(preset=preset, **options)
    separate = [loss(negative[i, j], positive[i, j]) for i in range(2) for j in range(3)]
    torch.testing.assert_close(loss(negative, positive), sum(separate) / 6, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", ["seed", "drift"])
def test_labels_make_ragged_groups(points, options, preset):
    """Points of another label act as if infinitely far; one scale and normaliser for all."""
    positive, negative = points
    n_labels, p_labels = torch.tensor([0, 1, 1, 2, 0, 1]), torch.tensor([1, 0, 1, 1, 0, 0, 1])
    labels = torch.cat([n_labels, p_labels])
    concat = torch.cat([negative, positive])
    dist = torch.cdist(concat, concat)
    same = labels[:, None] == labels
    dist = dist / dist[same].mean()
    total = torch.zeros_like(negative)
    for t in TEMPERATURES:
        scores = (-dist / t).masked_fill(~same, -torch.inf)
        if preset == "drift":
            scores.fill_diagonal_(-torch.inf)
        affinity = (scores.softmax(1) * scores.softmax(0)).sqrt().nan_to_num(0.0)
        norm = (dist * affinity)[same].square().mean().sqrt()
        a = affinity.fill_diagonal_(0)[:6]
        scaled = concat / torch.cdist(concat, concat)[same].mean()
        pull = a[:, :6].sum(1, keepdim=True) * (a[:, 6:] @ scaled[6:])
        total += (pull - a[:, 6:].sum(1, keepdim=True) * (a[:, :6] @ scaled[:6])) / norm
    loss = losses.ContrastiveForce(TEMPERATURES, preset=preset, **options)
    found = loss(negative, positive, n_labels, p_labels)
    torch.testing.assert_close(found, total.square().mean(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", ["seed", "drift"])
@pytest.mark.parametrize("temperatures", [(0.01,), (0.02,), TEMPERATURES])
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
@pytest.mark.parametrize("preset", ["seed", "drift"])
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


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", ["seed", "drift"])
def test_autocast_and_mixed_dtypes_keep_fp32(points, options, preset):
    positive, negative = points[0].float(), points[1].bfloat16()
    loss = losses.ContrastiveForce(preset=preset, **options)
    expected = loss(negative.float(), positive)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(negative, positive), expected)
        force = losses.contrastive_force(positive, negative, 0.3, preset, **options)
    assert torch.equal(
        force, losses.contrastive_force(positive, negative.float(), 0.3, preset, **options)
    )


def test_points_move_towards_the_data():
    """A gradient step on the loss itself, no network: a misplaced cloud ends on the data."""
    data = torch.randn(64, 2) + 4
    points = torch.randn(64, 2).requires_grad_()
    loss = losses.ContrastiveForce()
    optimizer = torch.optim.Adam([points], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(points, data).backward()
        optimizer.step()
    assert (points.mean(0) - data.mean(0)).norm() < 0.3
    assert points.std() > 0.6 * data.std()  # repulsion keeps it from collapsing
