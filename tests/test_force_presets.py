"""The presets against the equations of their sources, and every option against a naive form."""

import itertools
import math
import random

import pytest
import torch
from force_formulas import (
    drift_force,
    naive,
    official_loss,
    paper_drift,
    paper_loss,
    seed_force,
    seed_loss,
)
from torch import Tensor

from dist_contrastive import losses

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
    """Value and gradients by all points are those of the naive form."""
    kinds = [x.requires_grad_() for name, x in given.items() if name in SIZES]
    right = naive(preset, **given, **options).loss
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


@pytest.mark.parametrize("how", IMPLS)
def test_paper_force_is_algorithm_2(how):
    x, y = randn(6, 5) + 0.3, randn(7, 5)
    for t in (0.3, 1.0, 5.0):
        v = paper_drift(x, y, t)
        expected = v / v.square().mean().sqrt()
        close(losses.contrastive_force(y, x, t, "paper", **how), expected)


@pytest.mark.parametrize("how", IMPLS)
def test_paper_loss_is_normalised_over_all_groups(how):
    x, y = randn(3, 6, 5), randn(3, 7, 5) * torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    x.requires_grad_()
    expected = paper_loss(list(zip(x, y, strict=True)), (0.02, 0.05, 0.2))
    value = losses.ContrastiveForce(preset="paper", **how)(x, y)
    close(value, expected)
    close(*(torch.autograd.grad(v, x)[0] for v in (value, expected)))


@pytest.mark.parametrize("how", IMPLS)
@pytest.mark.parametrize("with_fixed", [True, False])
def test_paper_with_floor_is_the_official_loss(how, with_fixed):
    gen, pos, neg = randn(3, 6, 5) + 0.5, randn(3, 7, 5), randn(3, 4 * with_fixed, 5) - 0.5
    weights = tuple(torch.rand(x.shape[:2], dtype=torch.float64) for x in (gen, pos, neg))
    gen.requires_grad_()
    expected = official_loss(gen, pos, neg, weights, (0.02, 0.05, 0.2))
    loss = losses.ContrastiveForce(preset="paper", affinity_floor=1e-3, **how)
    fixed = {"fixed": neg, "fixed_weights": weights[2]} if with_fixed else {}
    value = loss(gen, pos, negative_weights=weights[0], positive_weights=weights[1], **fixed)
    close(value, expected)
    close(*(torch.autograd.grad(v, gen)[0] for v in (value, expected)))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_naive_form_is_each_source_without_options(preset):
    x, y = (given := points())["negative"], given["positive"]
    if preset == "seed":
        close(naive(preset, x, y).loss, seed_loss(y, x))
    if preset == "paper":
        close(naive(preset, x, y).loss, paper_loss([(x, y)], (0.02, 0.05, 0.2)))
        return
    scale = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).mean()
    force = {"seed": seed_force, "drift": drift_force}[preset](y / scale, x / scale, 0.3)
    close(naive(preset, x, y, temperatures=(0.3,)).force, force)


def drawn() -> list[tuple]:
    """Some of all combinations of inputs and settings."""
    # A unit of several scales has a test of its own.
    scopes = [(a, b) for a in SCOPES for b in SCOPES if SCOPES.index(b) <= SCOPES.index(a)]
    inputs = itertools.product(((), (2, 3)), (True, False), (True, False), ("", "point", "group"))
    every = itertools.product(inputs, scopes, (0.0, 1e-3, 0.3), (True, False))
    return random.Random(0).sample(list(every), 24)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", drawn(), ids=str)
def test_options(preset, case):
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
    right = naive(preset, **given)
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
        scale = naive(preset, **given, **options).metrics["scale"]
        options["temperatures"] = tuple(t / scale.item() for t in WARM)
        expected = naive(preset, **given, **options).force
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
@pytest.mark.parametrize("labels", [True, False])
def test_diagnostics(preset, how, labels):
    """With labels one generated point has no other in its label: it sees none."""
    given = points((2, 3), fixed=True, labels=labels, weights="group")
    options = {"temperatures": WARM, "norm_scope": "group", "affinity_floor": 1e-3}
    loss = losses.ContrastiveForce(preset=preset, diagnostics=True, **options, **how)
    value = loss(**given)
    expected = naive(preset, **given, **options).metrics
    assert loss.metrics.keys() == expected.keys()
    for name, number in expected.items():
        close(loss.metrics[name], number)
    silent = losses.ContrastiveForce(preset=preset, **options, **how)
    close(silent(**given), value, 1e-12)
    assert silent.metrics == {}
