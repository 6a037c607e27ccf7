"""The contrastive force against the seed, written out literally."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError
from dist_contrastive.testing import run_ranks

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


SPLITS = {2: ((4, 7), (9, 4)), 3: ((3, 0, 8), (0, 11, 2))}  # of 11 negatives, of 13 positives
BATCHES = ("plain", "labels", "groups", "coinciding")
WAYS = [("gather", 4), ("ring", 4), ("ring", None)]


def batch(name: str) -> list[Tensor]:
    """Negatives [11, D] and positives [13, D], of groups [2, 3, ...], and labels if it has some."""
    generator = torch.Generator().manual_seed(5)
    leading = (2, 3) if name == "groups" else ()
    points = [
        torch.randn(*leading, size, 4, generator=generator, dtype=torch.float64)
        for size in (11, 13)
    ]
    if name == "coinciding":  # on the same and on different ranks
        points[0][::3] = points[1][::4] = points[1][-1]
    if name == "labels":  # 9 has no positives, and -5 is on one rank alone
        points.append(torch.tensor([0, 7, 7, 0, 9, 9, 7, 0, 0, 9, 7]))
        points.append(torch.tensor([0, 0, 7, 7, 0, -5, -5, 7, 0, 0, 7, 0, 7]))
    return points


def share(inputs: list[Tensor]) -> list[Tensor]:
    """This rank's part."""
    sizes = SPLITS[dist.get_world_size()] * 2
    cuts = zip(inputs, sizes[: len(inputs)], strict=True)
    return [x.split(s, -2 if x.dim() > 1 else 0)[dist.get_rank()].clone() for x, s in cuts]


def value_and_gradients(loss: losses.ContrastiveForce, inputs: list[Tensor]) -> list[Tensor]:
    value = loss(*(x.requires_grad_(x.is_floating_point()) for x in inputs))
    positive = {"seed": [inputs[1]], "drift": []}[loss.preset]
    return [value.detach(), *torch.autograd.grad(value, [inputs[0], *positive])]


def on_ranks() -> dict:
    found = {}
    for name in BATCHES:
        for preset in ("seed", "drift"):
            for keys_from, chunk_size in WAYS:
                impl = "chunked" if chunk_size else "dense"
                options = {"keys_from": keys_from, "impl": impl, "chunk_size": chunk_size}
                loss = losses.ContrastiveForce((0.05, 0.3), preset, **options)
                inputs = share(batch(name))
                negative, positive = inputs[:2]
                force = losses.contrastive_force(positive, negative, 0.3, preset, **options)
                way = (name, preset, keys_from, chunk_size)
                found[way] = [force, *value_and_gradients(loss, inputs)]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_feel_the_force_of_one_process(world_size):
    """Uneven ranks, some without points of a kind; gathered and in a ring."""
    found = run_ranks(on_ranks, world_size)
    for way in found[0]:
        name, preset, *_ = way
        negative, positive, *labels = batch(name)
        expected = [losses.contrastive_force(positive, negative, 0.3, preset, impl="dense")]
        loss = losses.ContrastiveForce((0.05, 0.3), preset, impl="dense")
        expected += value_and_gradients(loss, [negative, positive, *labels])
        forces, values, *gradients = zip(*(rank[way] for rank in found), strict=True)
        for value in values:  # the same on all ranks
            torch.testing.assert_close(value, expected[1], rtol=1e-9, atol=0)
        # Gradients are W times a rank's share: the mean that DDP takes is exact.
        parts = [torch.cat(forces, -2), *(torch.cat(x, -2) / world_size for x in gradients)]
        for part, correct in zip(parts, [expected[0], *expected[2:]], strict=True):
            torch.testing.assert_close(part, correct, rtol=1e-9, atol=1e-12, msg=f"{way}")


EXTREMES = [(preset, t) for preset in ("seed", "drift") for t in ((0.001,), (0.01,), TEMPERATURES)]


def far_points() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    negative, positive = (torch.randn(n, 256, generator=generator) for n in (11, 13))
    return [0.8 * negative + 0.1, positive]


def fp32_on_ranks() -> list[Tensor]:
    inputs = share(far_points())
    ring = {"keys_from": "ring", "impl": "chunked"}
    return [losses.ContrastiveForce(t, preset, **ring)(*inputs) for preset, t in EXTREMES]


def test_fp32_in_a_ring_where_naive_fp32_fails():
    found = run_ranks(fp32_on_ranks, 3)
    for (preset, t), values in zip(EXTREMES, zip(*found, strict=True), strict=True):
        exact = losses.ContrastiveForce(t, preset, impl="dense")
        expected = exact(*(x.double() for x in far_points()))
        for value in values:
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-38)


TWO, THREE = torch.ones(2, 4), torch.ones(3, 4)
NUMBERS = [torch.arange(n) for n in range(4)]
BAD = {  # what two ranks give, and words of the refusal
    "labels on one rank": (
        [(TWO, THREE), (TWO, THREE, NUMBERS[2], NUMBERS[3])],
        "labels are missing on ranks [0]; give them on all ranks or none",
    ),
    "labels of the wrong length": (
        [(TWO, THREE, NUMBERS[2], NUMBERS[3]), (TWO, THREE, NUMBERS[3], NUMBERS[2])],
        "rank 1 has to give 2 negative_labels and 3 positive_labels",
    ),
    "labels of one kind": (
        [(TWO, THREE, NUMBERS[2], None), (TWO, THREE, NUMBERS[2], NUMBERS[3])],
        "rank 0 has to give 2 negative_labels and 3 positive_labels",
    ),
    "floating labels": (
        [(TWO, TWO, NUMBERS[2], NUMBERS[2]), (TWO, TWO, TWO[:, 0], NUMBERS[2])],
        "labels must be integers",
    ),
    "shapes": (
        [(TWO, THREE), (TWO, THREE[:, :3])],
        "negative and positive have shapes (2, 4) and (3, 3) on rank 1",
    ),
    "integers": ([(TWO, TWO), (TWO, TWO.long())], "torch.float32 and torch.int64 as on rank 1"),
    "no dimension": ([(TWO[:, :0],) * 2] * 2, "(2, 0) on rank 0 hold no group or no dimension"),
    "one kind": ([(TWO, TWO[:0])] * 2, "ranks together hold 4 negative (generated) and 0 positive"),
}


def refused() -> list[str]:
    words = []
    for keys_from in ("gather", "ring"):
        for inputs, _ in BAD.values():
            with pytest.raises(ConfigError) as caught:
                losses.ContrastiveForce(keys_from=keys_from)(*inputs[dist.get_rank()])
            words.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        losses.ContrastiveForce(keys_from="local")(TWO, TWO[: 2 - 2 * dist.get_rank()])
    return [*words, str(caught.value)]


def test_bad_points_are_refused_on_all_ranks_in_the_same_words():
    first, second = run_ranks(refused, 2)
    assert first == second
    expected = [words for _, words in BAD.values()] * 2
    for words, message in zip([*expected, "rank 1 holds 2 negative"], first, strict=True):
        assert words in message
