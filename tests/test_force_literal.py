"""The presets of the force against their equations, written out naively, in one process and on
ranks; scopes, weights and fixed negatives with them."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.testing import run_ranks

GROUPS, M, K, N, D = 3, 7, 4, 8, 5
TEMPERATURES = (0.05, 0.2)
WAYS = [("dense", None), ("chunked", 3), ("chunked", None)]


def naive_paper(
    gen: Tensor, fixed: Tensor, pos: Tensor, weights: list[Tensor], floor: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of arXiv 2602.04770 with the official normalisers: the loss, and its gradient.

    gen [B, M, D], fixed [B, K, D], pos [B, N, D]; weights of their columns, [B, M] and so on.
    """
    targets, w = torch.cat([gen, fixed, pos], 1), torch.cat(weights, 1)
    dist = torch.cdist(gen, targets, compute_mode="donot_use_mm_for_euclid_dist")
    scale = (dist * w[:, None]).mean() / w.mean()
    unit = scale / D**0.5
    logits = dist / scale
    logits[:, range(M), range(M)] = torch.inf
    total = torch.zeros_like(gen)
    for t in TEMPERATURES:
        row, column = (-logits / t).softmax(2), (-logits / t).softmax(1)
        affinity = (row * column).clamp(min=floor**2).sqrt() * w[:, None]
        push, pull = affinity[..., : M + K], affinity[..., M + K :]
        coefficient = torch.cat([-push * pull.sum(2, True), pull * push.sum(2, True)], 2)
        force = (coefficient @ targets - coefficient.sum(2, True) * gen) / unit
        total += force / force.square().mean().sqrt()
    return total.square().mean(), -2 * total / unit / total.numel()


def naive_square(
    gen: Tensor, fixed: Tensor, pos: Tensor, weights: list[Tensor], preset: str, scope: str
) -> tuple[Tensor, Tensor]:
    """The seed, and with the diagonal masked `drift`; scale and unit per group or for all. The
    gradient by gen is taken by autograd, for `seed` through the scale."""
    gen = gen.clone().requires_grad_()
    x, w = torch.cat([gen, fixed, pos], 1), torch.cat(weights, 1)
    over = (1, 2) if scope == "group" else (0, 1, 2)
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    ones = torch.ones_like(d)
    scale = (d * w[:, None]).sum(over, True) / (ones * w[:, None]).sum(over, True)
    scaled, d = x / scale, (d / scale).detach()
    target = torch.zeros_like(gen)
    for t in TEMPERATURES:
        scores = -d / t
        if preset == "drift":
            scores = scores.masked_fill(torch.eye(d.shape[1], dtype=torch.bool), -torch.inf)
        a = (scores.softmax(2) * scores.softmax(1)).sqrt() * w[:, None]
        unit = (d * a).square().mean(over, True).sqrt()
        a = a[:, :M].masked_fill(torch.eye(M, d.shape[1], dtype=torch.bool), 0.0)
        push, pull = a[..., : M + K], a[..., M + K :]
        points = scaled.detach()
        force = push.sum(2, True) * (pull @ points[:, M + K :])
        force = force - pull.sum(2, True) * (push @ points[:, : M + K])
        target += force / unit
    scale = scale if preset == "seed" else scale.detach()
    mine = gen / scale
    loss = (mine - (mine + target).detach()).square().mean()
    return loss.detach(), torch.autograd.grad(loss, gen)[0]


def batch(weighted: bool) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    make = {"generator": generator, "dtype": torch.float64}
    points = [torch.randn(GROUPS, n, D, **make) for n in (M, K, N)]
    points[2] += 0.5
    points[0] *= torch.tensor([0.5, 1.0, 2.0])[:, None, None]  # groups of different spread
    if not weighted:
        return points, [torch.ones(GROUPS, n, dtype=torch.float64) for n in (M, K, N)]
    return points, [torch.rand(GROUPS, n, **make) + 0.1 for n in (M, K, N)]


def expected(preset: str, scope: str, weighted: bool) -> tuple[Tensor, Tensor]:
    points, weights = batch(weighted)
    if preset.startswith("paper"):
        return naive_paper(*points, weights, 1e-3 if preset == "paper, floor" else 0.0)
    return naive_square(*points, weights, preset, scope)


CASES = [
    (preset, scope, weighted)
    for preset, scope in [*itertools.product(("seed", "drift"), ("group", "global")),
                          ("paper", "global"), ("paper, floor", "global")]
    for weighted in (False, True)
]  # fmt: skip


def build(preset: str, scope: str, **options) -> losses.ContrastiveForce:
    floor = 1e-3 if preset == "paper, floor" else 0.0
    return losses.ContrastiveForce(
        TEMPERATURES, preset.split(",")[0], scale_scope=scope, norm_scope=scope,
        affinity_floor=floor, **options,
    )  # fmt: skip


def value_and_gradient(
    loss: losses.ContrastiveForce, points: list[Tensor], weights: list[Tensor], weighted: bool
) -> tuple[Tensor, Tensor]:
    gen, fixed, pos = points
    gen = gen.clone().requires_grad_()
    names = ("negative_weights", "fixed_weights", "positive_weights")
    given = dict(zip(names, weights, strict=True)) if weighted else {}
    value = loss(gen, pos, fixed=fixed, **given)
    return value.detach(), torch.autograd.grad(value, gen)[0]


@pytest.mark.parametrize(("impl", "chunk_size"), WAYS)
@pytest.mark.parametrize(("preset", "scope", "weighted"), CASES)
def test_presets_are_their_equations(preset, scope, weighted, impl, chunk_size):
    for cache_mb in (0, 1e-3, 16):
        loss = build(preset, scope, impl=impl, chunk_size=chunk_size, cache_mb=cache_mb)
        found = value_and_gradient(loss, *batch(weighted), weighted)
        for mine, right in zip(found, expected(preset, scope, weighted), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


SPLITS = {1: [(7,), (4,), (8,)], 2: [(5, 2), (0, 4), (1, 7)], 3: [(3, 0, 4), (1, 3, 0), (0, 6, 2)],
          4: [(2, 2, 2, 1), (0, 0, 0, 4), (2, 2, 2, 2)]}  # fmt: skip


def on_ranks() -> dict:
    """Rows spread over ranks, and groups spread over ranks."""
    rank, found = dist.get_rank(), {}
    for case in CASES:
        preset, scope, weighted = case
        points, weights = batch(weighted)
        splits = SPLITS[dist.get_world_size()]
        for keys_from, impl in itertools.product(("gather", "ring"), ("dense", "chunked")):
            mine = [x.split(s, 1)[rank] for x, s in zip(points, splits, strict=True)]
            its_weights = [x.split(s, 1)[rank] for x, s in zip(weights, splits, strict=True)]
            loss = build(preset, scope, keys_from=keys_from, impl=impl, chunk_size=3)
            found[case, keys_from, impl] = value_and_gradient(loss, mine, its_weights, weighted)
        if dist.get_world_size() <= GROUPS:
            mine = [x.tensor_split(dist.get_world_size())[rank] for x in points]
            its_weights = [x.tensor_split(dist.get_world_size())[rank] for x in weights]
            loss = build(preset, scope, keys_from="local")
            found[case, "local", ""] = value_and_gradient(loss, mine, its_weights, weighted)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process(world_size):
    """Uneven rows, ranks without points of a kind; groups spread over ranks."""
    ranks = run_ranks(on_ranks, world_size)
    for case, keys_from, impl in ranks[0]:
        value, gradient = expected(*case)
        found = [rank[case, keys_from, impl] for rank in ranks]
        for its_value, _ in found:
            torch.testing.assert_close(its_value, value, rtol=1e-9, atol=1e-12)
        along = 0 if keys_from == "local" else 1
        mine = torch.cat([x for _, x in found], along) / world_size
        message = f"{case}, {keys_from}, {impl}"
        torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-12, msg=message)


@pytest.mark.parametrize("preset", ["seed", "drift", "paper"])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_total_force_has_unit_rms(preset, impl):
    points, weights = batch(False)
    value, _ = value_and_gradient(build(preset, "global", impl=impl, normalise_total=True), points,
                                  weights, False)  # fmt: skip
    assert value == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("preset", ["seed", "drift", "paper"])
def test_labels_with_scope_label_are_groups(preset):
    """Labels whose statistics are their own act as groups do."""
    points, weights = batch(True)
    labels = [torch.arange(GROUPS).repeat_interleave(x.shape[1]) for x in points]
    flat, flat_weights = ([x.flatten(0, 1) for x in y] for y in (points, weights))
    scopes = {"scale_scope": "label", "norm_scope": "label"}
    loss = losses.ContrastiveForce(TEMPERATURES, preset, chunk_size=4, **scopes)
    found = loss(
        flat[0], flat[2], labels[0], labels[2], flat[1], labels[1],
        flat_weights[0], flat_weights[2], flat_weights[1],
    )  # fmt: skip
    right, _ = value_and_gradient(build(preset, "group", impl="dense"), points, weights, True)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=0)


@pytest.mark.parametrize("preset", ["seed", "drift", "paper"])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_diagnostics(preset, impl):
    points, weights = batch(False)
    plain = value_and_gradient(build(preset, "global", impl=impl), points, weights, False)
    loss = build(preset, "global", impl=impl, diagnostics=True)
    found = value_and_gradient(loss, points, weights, False)
    torch.testing.assert_close(found[0], plain[0], rtol=1e-12, atol=0)
    gen, fixed, pos = points
    x = torch.cat([gen, fixed, pos], 1)
    rows = x if preset != "paper" else gen
    d = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")
    scale = d.mean()
    assert loss.metrics["scale"] == pytest.approx(scale.item())
    scores = -d[:, :M] / scale / 0.2
    if preset != "seed":
        scores[:, range(M), range(M)] = -torch.inf
    neighbours = (1 / scores.softmax(2).square().sum(2)).mean()
    assert loss.metrics["neighbours/0.2"] == pytest.approx(neighbours.item())
    assert loss.metrics["force_rms/0.2"] > 0


@pytest.mark.parametrize("preset", ["seed", "drift", "paper"])
@pytest.mark.parametrize("temperature", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize(
    "case", ["plain", "wide", "collapsed", "pairs", "outlier", "tiny", "zero weights"]
)
def test_fp32_is_near_fp64_and_finite(preset, temperature, case):
    generator = torch.Generator().manual_seed(1)
    dim = 4096 if case == "wide" else 6
    negative, positive = (torch.randn(n, dim, generator=generator) for n in (10, 12))
    given = {}
    if case == "collapsed":  # all generated points in one place, one data point
        negative, positive = negative[:1].repeat(10, 1), positive[:1]
    elif case == "pairs":  # every point has a twin
        negative, positive = negative[:5].repeat(2, 1), positive[:6].repeat(2, 1)
    elif case == "outlier":
        positive[0] = 1e6
    elif case == "tiny":
        negative, positive = negative * 1e-15, positive * 1e-15
    elif case == "zero weights":
        given["positive_weights"] = torch.arange(12.0) % 2
    exact = losses.ContrastiveForce((temperature,), preset, impl="dense")
    single = losses.ContrastiveForce((temperature,), preset, impl="chunked", chunk_size=4)
    results = []
    for loss, dtype in ((exact, torch.float64), (single, torch.float32)):
        x = negative.to(dtype).requires_grad_()
        weights = {name: w.to(dtype) for name, w in given.items()}
        value = loss(x, positive.to(dtype), **weights)
        results.append((value.detach().double(), torch.autograd.grad(value, x)[0].double()))
    (value, gradient), (mine, its_gradient) = results
    assert mine.isfinite()
    assert its_gradient.isfinite().all()
    # Distances in fp32 are off by 1e-7 of their size, which 1e-3 makes 1e-4 of every exponent.
    tolerance = 1e-4 if temperature >= 0.05 else 2e-3
    assert (mine - value).abs() <= tolerance * value + 1e-30
    assert (its_gradient - gradient).abs().max() <= tolerance * gradient.abs().max() + 1e-30


def refused() -> list[str]:
    """In the same words on both ranks, and nobody waits."""
    rank, three, words = dist.get_rank(), torch.ones(3, 2), []
    ones, force = torch.ones(3), losses.ContrastiveForce()
    for error, given in (
        (ConfigError, {"fixed": three if rank else None}),
        (ConfigError, {"fixed_weights": ones, "fixed": torch.ones(3, 2 + rank)}),
        (ConfigError, {"negative_weights": ones[: 3 - rank]}),
        (ConfigError, {"positive_weights": ones if rank else None}),
        (NonFiniteError, {"positive_weights": ones - 2 * rank}),
    ):
        with pytest.raises(error) as caught:
            force(three, three, **given)
        words.append(str(caught.value))
    return words


def test_bad_options_are_refused_on_all_ranks():
    first, second = run_ranks(refused, 2)
    assert first == second
    for message, wanted in zip(
        first,
        (
            "fixed are missing on ranks [0]",
            "(3, 2) and (3, 3) and (3, 2) on rank 1",
            "negative_weights of shape (2,)",
            "positive_weights are missing on ranks [0]",
            "positive_weights on rank 1 hold NaN, infinity or negative",
        ),
        strict=True,
    ):
        assert wanted in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperatures": (0.1, 0.0)}, "must be one or more positive numbers"),
        ({"preset": "other"}, "preset='other' is not known"),
        ({"norm_scope": "rank"}, "norm_scope='rank' is not known"),
        ({"affinity_floor": 1.0}, "affinity_floor=1.0 must be from 0 to below 1"),
        ({"cache_mb": -1.0}, "cache_mb=-1.0"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        losses.ContrastiveForce(**settings)
