"""The contrastive force against the seed, written out literally; and what it refuses."""

import pytest
import torch
import torch.distributed as dist
from force_formulas import TEMPERATURES, drift_force, seed_force, seed_loss
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError, UserError
from dist_contrastive.testing import run_ranks

FIVE = TEMPERATURES["seed"]
IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 4}, {"impl": "chunked"}]


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
    found = losses.ContrastiveForce(FIVE, preset="seed", **options)(negative, positive)
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
    force = sum(drift_force(positive / scale, negative / scale, t) for t in FIVE)
    negative.requires_grad_()
    loss = losses.ContrastiveForce(FIVE, preset="drift", **options)(negative, positive)
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
    for t in FIVE:
        scores = (-dist / t).masked_fill(~same, -torch.inf)
        if preset == "drift":
            scores.fill_diagonal_(-torch.inf)
        affinity = (scores.softmax(1) * scores.softmax(0)).sqrt().nan_to_num(0.0)
        norm = (dist * affinity)[same].square().mean().sqrt()
        a = affinity.fill_diagonal_(0)[:6]
        scaled = concat / torch.cdist(concat, concat)[same].mean()
        pull = a[:, :6].sum(1, keepdim=True) * (a[:, 6:] @ scaled[6:])
        total += (pull - a[:, 6:].sum(1, keepdim=True) * (a[:, :6] @ scaled[:6])) / norm
    loss = losses.ContrastiveForce(FIVE, preset=preset, **options)
    found = loss(negative, positive, n_labels, p_labels)
    torch.testing.assert_close(found, total.square().mean(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", ["seed", "drift", "paper"])
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


TWO, THREE = torch.ones(2, 4), torch.ones(3, 4)
NUMBERS = [torch.arange(n) for n in range(4)]
POINTS = {"negative": TWO, "positive": THREE}
LABELLED = {**POINTS, "negative_labels": NUMBERS[2], "positive_labels": NUMBERS[3]}
NAN = torch.tensor([1.0, torch.nan])
BAD = {  # what two ranks give, and words of the refusal
    "labels on one rank": (
        [POINTS, LABELLED],
        "labels are missing on ranks [0]; give them on all ranks or none",
    ),
    "labels of the wrong length": (
        [LABELLED, {**POINTS, "negative_labels": NUMBERS[3], "positive_labels": NUMBERS[2]}],
        "rank 1 has to give 2 negative_labels and 3 positive_labels",
    ),
    "labels of one kind": (
        [{**POINTS, "negative_labels": NUMBERS[2]}, LABELLED],
        "rank 0 has to give 2 negative_labels and 3 positive_labels",
    ),
    "no labels of fixed": (
        [{**LABELLED, "fixed": THREE, "fixed_labels": NUMBERS[3]}, {**LABELLED, "fixed": TWO}],
        "rank 1 has to give 2 negative_labels and 2 fixed_labels and 3 positive_labels",
    ),
    "floating labels": (
        [LABELLED, {**LABELLED, "negative_labels": TWO[:, 0]}],
        "labels must be integers",
    ),
    "shapes": (
        [POINTS, {"negative": TWO, "positive": THREE[:, :3]}],
        "negative and positive have shapes (2, 4) and (3, 3) on rank 1",
    ),
    "shape of fixed": (
        [{**POINTS, "fixed": TWO}, {**POINTS, "fixed": TWO[:, :3]}],
        "negative and fixed and positive have shapes (2, 4) and (2, 3) and (3, 4) on rank 1",
    ),
    "groups of data": (
        [{"negative": torch.ones(2, 3, 4), "positive": torch.ones(3, 3, 4)}] * 2,
        "shapes (2, 3, 4) and (3, 3, 4) on rank 0; give [..., m, dim] and [..., n, dim] with equal",
    ),
    "groups of a rank": (
        [{"negative": x, "positive": x} for x in (torch.ones(2, 3, 4), torch.ones(3, 3, 4))],
        "points differ between ranks: [rows, 2, 4] torch.float32 without gradient on rank 0; "
        "[rows, 3, 4]",
    ),
    "integers": (
        [POINTS, {"negative": TWO, "positive": TWO.long()}],
        "rank 1 gives torch.float32 and torch.int64",
    ),
    "no dimension": (
        [{"negative": TWO[:, :0], "positive": TWO[:, :0]}] * 2,
        "(2, 0) on rank 0 hold no group or no dimension",
    ),
    "no group": (
        [{"negative": x, "positive": x} for x in (TWO[None], TWO[None][:0])],
        "(0, 2, 4) on rank 1 hold no group or no dimension",
    ),
    "no data": (
        [{"negative": TWO, "positive": TWO[:0]}] * 2,
        "ranks together hold 4 negative (generated) and 0 positive",
    ),
    "nothing generated": (
        [{"negative": TWO[:0], "positive": TWO, "fixed": TWO}] * 2,
        "ranks together hold 0 negative (generated) and 4 positive",
    ),
    "no positive on one rank": (
        [POINTS, {"negative": TWO, "positive": None}],
        "positive are missing on ranks [1]; give them on all ranks",
    ),
    "points that are no tensor": (
        [POINTS, {"negative": TWO.numpy(), "positive": THREE}],
        "points must be floating tensors of at most 6 dimensions; rank 1 gives no such tensor and",
    ),
    "weights that overflow": (
        [{**POINTS, "negative_weights": x} for x in (TWO[:, 0], TWO[:, 0].double() * 1e100)],
        "negative_weights on rank 1 hold NaN, infinity or negative numbers",
    ),
    "fixed on one rank": (
        [{**POINTS, "fixed": TWO}, POINTS],
        "fixed are missing on ranks [1]; give them on all ranks or none",
    ),
    "weights on one rank": (
        [POINTS, {**POINTS, "positive_weights": THREE[:, 0]}],
        "positive_weights are missing on ranks [0]; give them on all ranks or none",
    ),
    "too few weights": (
        [{**POINTS, "positive_weights": THREE[:, 0]}, {**POINTS, "positive_weights": TWO[:, 0]}],
        "positive_weights of shape (2,) and torch.float32 on rank 1 do not fit points of shape "
        "(3, 4); give floating numbers (3,)",
    ),
    "weights of other groups": (
        [{"negative": TWO[None], "positive": THREE[None], "negative_weights": TWO}] * 2,
        "negative_weights of shape (2, 4) and torch.float32 on rank 0 do not fit points of shape "
        "(1, 2, 4); give floating numbers (2,) or (1, 2)",
    ),
    "weights that are integers": (
        [POINTS | {"negative_weights": TWO[:, 0]}, POINTS | {"negative_weights": NUMBERS[2]}],
        "negative_weights of shape (2,) and torch.int64 on rank 1 do not fit",
    ),
    "weights that are no tensor": (
        [POINTS | {"negative_weights": TWO[:, 0]}, POINTS | {"negative_weights": [1.0, 2.0]}],
        "negative_weights of shape",
    ),
    "NaN in points": (
        [POINTS, {"negative": TWO, "positive": THREE * torch.nan}],
        "NaN, infinity or squares that overflow in 3 of 5 rows of points on rank 1",
    ),
    **{
        f"weights {what}": (
            [{**given, "negative_weights": TWO[:, 0]}, {**given, "negative_weights": weights}],
            "negative_weights on rank 1 hold NaN, infinity or negative numbers; weights must be 0 "
            "or more",
        )
        for what, given, weights in (
            ("below 0", POINTS, torch.tensor([1.0, -1.0])),
            ("that are NaN", POINTS, NAN),
            ("that are infinite", POINTS, torch.tensor([1.0, torch.inf])),
            ("of groups that are NaN", {k: x[None] for k, x in POINTS.items()}, NAN[None]),
        )
    },
}


def refused() -> list[str]:
    words = []
    for keys_from in ("gather", "ring"):
        for inputs, _ in BAD.values():
            with pytest.raises((ConfigError, NonFiniteError)) as caught:
                losses.ContrastiveForce(keys_from=keys_from)(**inputs[dist.get_rank()])
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
        assert message.count(". ") == 0  # one sentence


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(
            ({"temperatures": t}, f"temperatures={t} must be one or more positive numbers")
            for t in ((), (0.1, 0.0), (-0.1,), (torch.nan,), (torch.inf,))
        ),
        ({"temperatures": 0.1}, "temperatures=0.1 must be one or more positive numbers"),
        ({"temperatures": ["0.1"]}, "temperatures=['0.1'] must be one or more positive numbers"),
        ({"preset": "paint"}, "preset='paint' is not known; use one of seed, drift, paper"),
        ({"scale_scope": "rank"}, "scale_scope='rank' is not known; use one of label, group"),
        ({"norm_scope": "groups"}, "norm_scope='groups' is not known"),
        ({"affinity_floor": 1.0}, "affinity_floor=1.0 must be from 0 to below 1"),
        ({"affinity_floor": -0.1}, "affinity_floor=-0.1 must be from 0 to below 1"),
        ({"affinity_floor": torch.nan}, "affinity_floor=nan must be from 0 to below 1"),
        ({"cache_mb": -1.0}, "cache_mb=-1.0 must be a finite number of at least 0"),
        ({"cache_mb": torch.inf}, "cache_mb=inf must be a finite number of at least 0"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(UserError) as caught:
        losses.ContrastiveForce(**settings)
    assert words in str(caught.value)
