"""The contrastive force of one process: the specification against its sources and against loops,
the loss against the specification, and settings that are refused."""

import itertools
import math
import random

import pytest
import torch
from force_formulas import FIVE, literal, official_loss, seed_force, seed_loss, specified
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError

PRESETS = ("seed", "drift", "paper")
SCOPES = ("label", "group", "global")
WARM = (0.1, 0.3, 1.0)  # where nothing underflows in a naive form
IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 4}, {"impl": "chunked"}]
SIZES = {"negative": 6, "fixed": 4, "positive": 7}
LABELS = {
    "negative": [0, 5, 5, 0, 2, 5],
    "fixed": [0, 5, 5, 3],
    "positive": [5, 0, 0, 5, -1, 0, -1],
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def points(
    leading: tuple[int, ...] = (), *, fixed: bool = False, labels: bool = False, weights: str = ""
) -> dict[str, Tensor]:
    """Arguments of the loss, in groups of different extent; weights a "point" or "group"."""
    width = torch.rand(*leading, 1, 1, dtype=torch.float64) + 0.5
    given = {}
    for name, size in SIZES.items():
        if name == "fixed" and not fixed:
            continue
        given[name] = width * randn(*leading, size, 5)
        if labels:
            given[f"{name}_labels"] = torch.tensor(LABELS[name])
        if weights:
            shape = (*leading, size) if weights == "group" else (size,)
            given[f"{name}_weights"] = torch.rand(shape, dtype=torch.float64)
    given["negative"] += 0.3
    return given


def check(given: dict[str, Tensor], preset: str, how: dict, **options) -> None:
    """Value and gradients by all points are those of the specification."""
    kinds = [x.requires_grad_() for name, x in given.items() if name in SIZES]
    right = specified(preset, **given, **options).loss
    value = losses.ContrastiveForce(preset=preset, **options, **how)(**given)
    close(value, right)
    found, expected = gradients(value, kinds), gradients(right, kinds)
    assert expected[-1].any() == (preset == "seed")  # data has a gradient through the scale alone
    for mine, correct in zip(found, expected, strict=True):
        close(mine, correct)


def gradients(value: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Beside the largest number."""
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 5.0])
def test_force_is_the_seed(options, temperature):
    positive, negative = randn(7, 4), randn(6, 4) + 0.5
    expected = seed_force(positive, negative, temperature)
    found = losses.contrastive_force(positive, negative, temperature, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("options", IMPLS)
def test_seed_loss_and_gradient_through_the_scale(options):
    positive, negative = (x.requires_grad_() for x in (randn(7, 4), randn(6, 4) + 0.5))
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


@pytest.mark.parametrize("how", IMPLS)
@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize("with_fixed", [True, False])
def test_paper_is_the_published_code(how, floor, with_fixed):
    """Normalised over all groups; with a floor of 1e-3 as it is, without one Algorithm 2."""
    gen, pos, neg = randn(3, 6, 5) + 0.5, randn(3, 7, 5), randn(3, 4 * with_fixed, 5) - 0.5
    gen *= torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    weights = tuple(torch.rand(x.shape[:2], dtype=torch.float64) for x in (gen, pos, neg))
    gen.requires_grad_()
    expected = official_loss(gen, pos, neg, weights, (0.02, 0.05, 0.2), floor)
    loss = losses.ContrastiveForce(preset="paper", affinity_floor=floor, **how)
    fixed = {"fixed": neg, "fixed_weights": weights[2]} if with_fixed else {}
    value = loss(gen, pos, negative_weights=weights[0], positive_weights=weights[1], **fixed)
    close(value, expected)
    close(*(torch.autograd.grad(v, gen)[0] for v in (value, expected)))


def drawn() -> list[tuple]:
    """Some of all combinations of inputs and settings."""
    # A unit of several scales has a test of its own.
    scopes = [(a, b) for a in SCOPES for b in SCOPES if SCOPES.index(b) <= SCOPES.index(a)]
    inputs = itertools.product(((), (2, 3)), (True, False), (True, False), ("", "point", "group"))
    every = itertools.product(inputs, scopes, (0.0, 1e-3, 0.3), (True, False))
    return random.Random(0).sample(list(every), 24)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", drawn(), ids=str)
def test_the_specification_is_the_literal_form(preset, case):
    """Value, force, diagnostics, and gradients by all points."""
    (leading, fixed, labels, weights), (scale_scope, norm_scope), floor, total = case
    given = points(leading[:1], fixed=fixed, labels=labels, weights=weights)
    kinds = [x.requires_grad_() for name, x in given.items() if name in SIZES]
    options = {
        "temperatures": WARM,
        "scale_scope": scale_scope,
        "norm_scope": norm_scope,
        "affinity_floor": floor,
        "normalise_total": total,
    }
    expected = literal(preset, **given, **options)
    found = specified(preset, **given, **options)
    close(found.loss, expected.loss)
    close(found.force, expected.force)
    for key, number in expected.metrics.items():
        close(found.metrics[key], number)
    both = gradients(found.loss, kinds), gradients(expected.loss, kinds)
    for mine, correct in zip(*both, strict=True):
        close(mine, correct)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", drawn(), ids=str)
def test_options(preset, case):
    """Every way to compute the loss is the specification."""
    (leading, fixed, labels, weights), (scale_scope, norm_scope), floor, total = case
    for how in IMPLS:
        check(
            points(leading, fixed=fixed, labels=labels, weights=weights),
            preset,
            how,
            temperatures=WARM,
            scale_scope=scale_scope,
            norm_scope=norm_scope,
            affinity_floor=floor,
            normalise_total=total,
        )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scopes", [("group", "global"), ("label", "group"), ("label", "global")])
def test_a_unit_of_several_scales_is_that_of_the_scaled_points(preset, scopes):
    """Lengths and forces of points that have been divided by their scales are what it averages."""
    for how, total in itertools.product(IMPLS, (False, True)):
        options = {"scale_scope": scopes[0], "norm_scope": scopes[1], "normalise_total": total}
        check(points((3,), labels=True), preset, how, temperatures=WARM, **options)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fixed", [True, False])
def test_scopes_and_temperatures_of_a_preset(preset, fixed):
    for how in IMPLS:
        check(points((2,), fixed=fixed), preset, how)


@pytest.mark.parametrize("preset", ["drift", "paper"])
def test_gradient_is_minus_twice_the_force(preset):
    """-2 F / unit of the coordinates, averaged over elements: the scale is a constant."""
    given = points(fixed=True, weights="point")
    negative = given["negative"].requires_grad_()
    right = specified(preset, **given)
    unit = right.metrics["scale"] / (math.sqrt(5) if preset == "paper" else 1)
    for how in IMPLS:
        value = losses.ContrastiveForce(preset=preset, **how)(**given)
        expected = -2 * right.force / unit / negative.numel()
        close(torch.autograd.grad(value, negative)[0], expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_force_with_fixed_negatives(preset):
    """`force` and `contrastive_force` take the coordinates as they are: a scale of 1."""
    given = points((2, 3), fixed=True)
    for how in IMPLS:
        options = {"temperatures": WARM, "scale_scope": "global", "norm_scope": "global"}
        scale = specified(preset, **given, **options).metrics["scale"]
        options["temperatures"] = tuple(t / scale.item() for t in WARM)
        expected = specified(preset, **given, **options).force
        loss = losses.ContrastiveForce(WARM, preset, norm_scope="global", **how)
        close(loss.force(given["negative"], given["positive"], given["fixed"]), expected)
    one = {name: x[1, 2] for name, x in given.items()}
    found = losses.contrastive_force(
        one["positive"], one["negative"], 0.5, preset, fixed=one["fixed"]
    )
    close(
        found,
        losses.ContrastiveForce((0.5,), preset).force(
            one["negative"], one["positive"], one["fixed"]
        ),
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("labels", [True, False])
def test_neither_cache_nor_tiles_change_the_numbers(preset, labels):
    """No distances kept, some, all; small tiles, uneven ones, one for everything."""
    given = points((2,), fixed=True, labels=labels, weights="group")
    negative = given["negative"].requires_grad_()
    found = []
    for cache_mb, chunk_size in ((0, 3), (2e-3, 3), (64, 3), (64, 2), (2e-3, 100)):
        loss = losses.ContrastiveForce(
            WARM, preset, impl="chunked", cache_mb=cache_mb, chunk_size=chunk_size
        )
        value = loss(**given)
        found.append((value.detach(), torch.autograd.grad(value, negative)[0]))
    for value, gradient in found:
        close(value, found[0][0], 1e-12)
        close(gradient, found[0][1], 1e-12)


@pytest.mark.parametrize("how", IMPLS)
@pytest.mark.parametrize("preset", PRESETS)
def test_diagnostics_change_no_bit_of_the_force(preset, how):
    """Logged steps have them, and a run that logs more often ends with the same weights."""
    given = {name: x.float() for name, x in points(fixed=True).items()}
    plain, told = (
        losses.ContrastiveForce(WARM, preset, diagnostics=diagnostics, **how).force(**given)
        for diagnostics in (False, True)
    )
    assert torch.equal(plain, told)


@pytest.mark.parametrize("how", IMPLS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("labels", [True, False])
def test_diagnostics(preset, how, labels):
    """With labels one generated point has no other in its label: it sees none."""
    given = points((2, 3), fixed=True, labels=labels, weights="group")
    options = {"temperatures": WARM, "norm_scope": "group", "affinity_floor": 1e-3}
    loss = losses.ContrastiveForce(preset=preset, diagnostics=True, **options, **how)
    value = loss(**given)
    expected = specified(preset, **given, **options).metrics
    assert loss.metrics.keys() == expected.keys()
    for name, number in expected.items():
        close(loss.metrics[name], number)
    silent = losses.ContrastiveForce(preset=preset, **options, **how)
    close(silent(**given), value, 1e-12)
    assert silent.metrics == {}


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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("how", IMPLS)
def test_total_force_has_unit_rms(preset, how):
    loss = losses.ContrastiveForce(preset=preset, norm_scope="global", normalise_total=True, **how)
    assert loss(**points((3,), fixed=True)).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_with_scope_label_are_groups(preset):
    """Labels whose statistics are their own act as groups do."""
    given = points((3,), fixed=True, weights="group")
    flat = {}
    for name, x in given.items():
        flat[name] = x.flatten(0, 1)
        if name in SIZES:
            flat[f"{name}_labels"] = torch.arange(3).repeat_interleave(SIZES[name])
    scopes = [{"scale_scope": x, "norm_scope": x} for x in ("label", "group")]
    labels, groups = (losses.ContrastiveForce(WARM, preset, **x, chunk_size=4) for x in scopes)
    close(labels(**flat), groups(**given))


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_and_mixed_dtypes_keep_fp32(options, preset):
    positive, negative = torch.randn(7, 4), torch.randn(6, 4).bfloat16()
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


@pytest.mark.parametrize(
    ("setting", "value", "limit"),
    [
        ("temperatures", (), "1 or more"),
        ("temperatures", (0.1, 0.0), "greater than 0"),
        ("temperatures", (-0.1,), "greater than 0"),
        ("temperatures", (math.nan,), "finite"),
        ("temperatures", (math.inf,), "finite"),
        ("temperatures", 0.1, "list"),
        ("temperatures", ("warm",), "number"),
        ("preset", "paint", "'seed', 'drift' or 'paper'"),
        ("scale_scope", "rank", "'label', 'group' or 'global'"),
        ("norm_scope", "groups", "'label', 'group' or 'global'"),
        ("affinity_floor", 1.0, "less than 1"),
        ("affinity_floor", -0.1, "0.0 or more"),
        ("affinity_floor", math.nan, "finite"),
        ("cache_mb", -1.0, "0.0 or more"),
        ("cache_mb", math.inf, "finite"),
    ],
)
def test_bad_settings_are_refused(setting, value, limit):
    last = value[-1:] if isinstance(value, tuple) else (value,)
    with pytest.raises(ConfigError, match=setting) as caught:
        losses.ContrastiveForce(**{setting: value})
    assert all(str(x) in str(caught.value) for x in (*last, limit))
