"""Losses in one process: published values, plain torch written out, invariances, bad input."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss, normalised
from dist_contrastive.pairwise import PairSum

LABELS = torch.tensor([0, 1])
IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 3}]


@pytest.fixture
def views() -> tuple[torch.Tensor, torch.Tensor]:
    """The fixture that lightly, pytorch-metric-learning, open_clip and others were measured on."""
    random = np.random.RandomState(0)
    return torch.tensor(random.randn(8, 16)), torch.tensor(random.randn(8, 16))


@pytest.mark.parametrize("options", IMPLS)
def test_published_values(views, options):
    a, b = views
    assert losses.NTXent(0.5, **options)(a, b).item() == pytest.approx(2.6814845240, abs=1e-9)
    assert losses.NTXent(0.1, **options)(a, b).item() == pytest.approx(3.9455674819, abs=1e-9)
    clip = losses.InfoNCE(0.1, symmetric=True, **options)
    normalised = F.normalize(a), F.normalize(b)
    assert clip(*normalised).item() == pytest.approx(3.1994522323, abs=1e-9)


def naive_infonce(q, k, negatives, temperature):
    q, k = F.normalize(q), F.normalize(torch.cat([k, negatives]))
    return F.cross_entropy(q @ k.T / temperature, torch.arange(len(q)))


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("num_negatives", [0, 5])
def test_infonce_is_cross_entropy(views, options, num_negatives):
    a, b = (x.requires_grad_() for x in views)
    extra = torch.randn(num_negatives, 16, dtype=torch.float64, requires_grad=True)
    expected = naive_infonce(a, b, extra, 0.2)
    loss = losses.InfoNCE(0.2, **options)(a, b, extra)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, correct in zip(
        torch.autograd.grad(loss, [a, b, extra]),
        torch.autograd.grad(expected, [a, b, extra]),
        strict=True,
    ):
        torch.testing.assert_close(found, correct, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", IMPLS)
def test_learnable_temperature(views, options):
    loss = losses.InfoNCE(0.1, symmetric=True, learnable=True, **options).double()
    loss(*views).backward()
    shifted = [losses.InfoNCE(0.1 * np.exp(-h), symmetric=True)(*views) for h in (1e-5, -1e-5)]
    slope = (shifted[0] - shifted[1]).item() / 2e-5
    assert loss.scale.log_scale.grad.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.InfoNCE(0.1, symmetric=True), losses.NTXent(0.1)])
def test_order_of_rows_does_not_matter(views, loss):
    order = torch.randperm(8)
    a, b = views
    torch.testing.assert_close(loss(a[order], b[order]), loss(a, b), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [losses.InfoNCE, losses.NTXent])
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_limits_of_the_temperature(views, loss, temperature):
    a, b = (x.float().requires_grad_() for x in views)
    value = loss(temperature)(a, b)
    value.backward()
    assert value.isfinite()
    assert a.grad.isfinite().all()
    if temperature > 1:  # every key is equally likely
        keys = 8 if loss is losses.InfoNCE else 15
        assert value.item() == pytest.approx(np.log(keys), abs=1e-2)


def test_constant_temperature_survives_a_change_of_dtype(views):
    a, b = (x.float() for x in views)
    loss = losses.NTXent(0.07)
    assert loss.bfloat16()(a, b) == losses.NTXent(0.07)(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_fp32_losses(views, dtype):
    a, b = (x.to(dtype).requires_grad_() for x in views)
    loss = losses.NTXent(0.01)(a, b)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad.dtype == dtype
    exact = losses.NTXent(0.01)(a.detach().double(), b.detach().double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.InfoNCE(0.0), "temperature=0.0"),
        (lambda: losses.NTXent(impl="magic"), "impl=magic: should be 'auto', 'dense'"),
        (lambda: losses.NTXent(keys_from="moon"), "keys_from=moon: should be 'gather'"),
        (lambda: losses.NTXent(chunk_size=0), "chunk_size=0"),
        (lambda: losses.NTXent()(torch.zeros(1, 3), torch.zeros(1, 3)), "has 1 row"),
        (
            lambda: losses.InfoNCE()(torch.zeros(3, 3), torch.zeros(2, 3)),
            "2 rows of keys",
        ),
        (lambda: losses.InfoNCE()(torch.zeros(3), torch.zeros(3)), "floating embeddings"),
        (lambda: losses.ContrastiveForce(()), "temperatures=()"),
        (lambda: losses.ContrastiveForce((0.1, -1)), "temperatures.1=-1"),
        (lambda: losses.ContrastiveForce(preset="x"), "preset=x: should be 'seed'"),
        (
            lambda: losses.ContrastiveForce()(torch.zeros(0, 3), torch.zeros(4, 3)),
            "hold 0 negative",
        ),
        (
            lambda: losses.ContrastiveForce()(torch.zeros(2, 3), torch.zeros(2, 4)),
            "'negative': 3, 'positive': 4",
        ),
        (
            lambda: losses.ContrastiveForce()(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)),
            "negative_labels: [rows] torch.float32",
        ),
        (
            lambda: losses.ContrastiveForce()(torch.zeros(2, 3), torch.zeros(2, 3), LABELS),
            "positive_labels are missing",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_new_loss_in_ten_lines(views):
    """The example of docs/losses.md, word for word."""
    readme = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "PairSum" in c)
    names = {"PairSum": PairSum, "PairLoss": PairLoss, "normalised": normalised}
    exec(code, names)
    x = views[0].requires_grad_()
    z = F.normalize(x)
    expected = (-torch.cdist(z, z).square()).exp().sum(1).mean()
    for options in IMPLS:
        loss = names["Potential"](**options)(x)
        torch.testing.assert_close(loss, expected)
        grads = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(*grads)
