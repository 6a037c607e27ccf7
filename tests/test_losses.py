"""Losses in one process: published values, plain torch written out, invariances, bad input."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss, normalised
from dist_contrastive.losses.classification import PathCrossEntropy
from dist_contrastive.losses.hierarchy import Hierarchy
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


# ------------------------------------------------------- second derivatives, rows near zero

LABELS_OF_8 = torch.arange(8) // 2
EVERY = {  # loss of features [8, 16] and of a second view
    "NTXent": lambda x, y, **options: losses.NTXent(0.3, **options)(x, y),
    "InfoNCE": lambda x, y, **options: losses.InfoNCE(0.3, symmetric=True, **options)(x, y),
    "InfoNCE with a bank": lambda x, y, **o: losses.InfoNCE(0.3, **o)(x, y, bank=y.flip(1)),
    "DCL": lambda x, y, **options: losses.DCL(0.3, **options)(x, y),
    "SigLIP": lambda x, y, **options: losses.SigLIP(**options)(x, y),
    "SelfDiagonal": lambda x, y, **options: losses.SelfDiagonal(0.3, **options)(x),
    "SupCon": lambda x, y, **options: losses.SupCon(0.3, **options)(x, LABELS_OF_8),
    "CosineEmbedding": lambda x, y, **o: losses.CosineEmbedding(0.0, **o)(x, LABELS_OF_8),
    "VICReg": lambda x, y, **options: losses.VICReg(**options)(x, y),
    "BarlowTwins": lambda x, y, **options: losses.BarlowTwins(**options)(x, y),
    "KoLeo": lambda x, y, **options: losses.KoLeo(**options)(x),
    "force with a gradient of its scale": lambda x, y, **options: losses.ContrastiveForce(
        (0.3,), "seed", **options
    )(x, y),
    "force of one preset": lambda x, y, **options: losses.ContrastiveForce((0.3,), **options)(x, y),
}
for _distance in ("cosine", "euclidean"):
    for _mining in ("all", "hard", "semihard"):
        EVERY[f"Triplet {_distance} {_mining}"] = lambda x, y, d=_distance, m=_mining, **options: (
            losses.Triplet(0.5, d, m, **options)(x, LABELS_OF_8)
        )


def slope(loss, x: torch.Tensor, **graph: bool) -> torch.Tensor:
    return torch.autograd.grad(loss(x), x, **graph)[0]


@pytest.mark.parametrize("options", [*IMPLS, {"keys_from": "ring"}])
@pytest.mark.parametrize("name", EVERY)
def test_a_second_derivative_is_right_or_refused(views, name, options):
    """By differences of the gradient."""
    x, y = views
    direction = torch.randn(8, 16, dtype=torch.float64)

    def loss(rows):
        return EVERY[name](rows, y, **options)

    ends = [(x + h * direction).requires_grad_() for h in (1e-5, -1e-5)]
    expected = (slope(loss, ends[0]) - slope(loss, ends[1])) / 2e-5
    moved, refused = x.clone().requires_grad_(), ""
    try:
        along = (slope(loss, moved, create_graph=True) * direction).sum()
        found = torch.autograd.grad(along, moved)[0]
    except NotImplementedError as error:
        refused = str(error)
    if refused:
        assert "impl='dense'" in refused or "cdist" in refused  # torch's own
        assert options != IMPLS[0] or "force" in name or "euclidean" in name
    else:
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_of_a_row_near_zero_is_bounded(views, name, options, length):
    x, y = (view.float() for view in views)
    x[3] *= length
    norms = slope(lambda rows: EVERY[name](rows, y, **options), x.requires_grad_()).norm(dim=1)
    others = torch.cat([norms[:3], norms[4:]]).max()
    assert norms.isfinite().all()
    assert norms[3] <= 1e4 * others


@pytest.mark.parametrize("name", ["InfoNCE", "SupCon", "Triplet cosine all", "KoLeo"])
def test_a_graph_of_a_gradient_that_is_made_to_shrink_is_refused(views, name):
    """Its second derivative would be off by its own size, or NaN."""
    x, y = views
    for length in (0.0, 5e-4):
        x[3] *= length
        moved = x.clone().requires_grad_()
        with pytest.raises(NotImplementedError, match=r"than 0\.001 have none; scale"):
            slope(lambda rows: EVERY[name](rows, y, impl="dense"), moved, create_graph=True)


def test_rows_of_usual_lengths_have_the_gradient_of_the_formula(views):
    x, y = views
    for length in (1e-3, 1.0, 1e6):
        short = (length * x).requires_grad_()
        expected = slope(lambda rows: naive_infonce(rows, y, y[:0], 0.3), short)
        found = slope(lambda rows: losses.InfoNCE(0.3)(rows, y), short)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-7, 1e-5])
def test_koleo_of_equal_rows_is_bounded(views, apart):
    x = views[0].float()
    x[4] = x[5] + apart
    norms = slope(losses.KoLeo(), x.requires_grad_()).norm(dim=1)
    assert norms.isfinite().all()
    assert norms[4:6].max() <= 1e4 * norms[:4].max()


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1e-4])
def test_a_cross_entropy_is_never_below_zero(options, temperature):
    """Of embeddings that are all told apart; rounding alone would decide."""
    x = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q * 3.7
    for loss, inputs in (
        (losses.SelfDiagonal, (x,)),
        (losses.InfoNCE, (x, x * 1.1)),
        (losses.NTXent, (x, x * 1.1)),
        (losses.SupCon, (torch.stack([x, x * 1.1], dim=1),)),
    ):
        assert 0 <= loss(temperature, **options)(*inputs).item() < 1
    same, labels = x[:1].expand(48, -1), torch.zeros(48, dtype=torch.int64)
    assert losses.CosineEmbedding(**options)(same, labels).item() >= 0


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("of_module", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_rows", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_module_and_rows_of_different_dtypes(views, of_module, of_rows, options):
    a, b = (x.to(of_rows).requires_grad_() for x in views)
    for make in (
        losses.SigLIP,
        lambda **o: losses.InfoNCE(0.1, symmetric=True, learnable=True, **o),
        lambda **o: losses.NTXent(0.1, learnable=True, **o),
    ):
        loss = make(**options).to(of_module)
        value = loss(a, b)
        assert value.dtype == torch.promote_types(of_rows, torch.float32)
        assert value.item() == pytest.approx(make(**options)(a, b).item(), rel=2e-2)
        value.backward()
        assert all(p.grad.dtype == of_module for p in loss.parameters())
        assert a.grad.dtype == of_rows


LABEL_LISTS = [
    [0, 0, 1, 1, 2, 2, -1, 5],
    (0, 0, 1, 1, 2, 2, -1, 5),
    np.array([0, 0, 1, 1, 2, 2, -1, 5], dtype=np.int16),
    np.array([0, 0, 1, 1, 2, 2, -1, 5], dtype=">i4"),
    [np.int64(x) for x in (0, 0, 1, 1, 2, 2, -1, 5)],
    [torch.tensor(x) for x in (0, 0, 1, 1, 2, 2, -1, 5)],
]


@pytest.mark.parametrize("labels", LABEL_LISTS)
def test_labels_are_taken_as_lists_and_arrays(views, labels):
    x, expected = views[0], torch.tensor(LABEL_LISTS[0])
    for loss in (losses.SupCon(), losses.Triplet(), losses.CosineEmbedding()):
        assert loss(x, labels) == loss(x, expected)
        assert losses.compare_views(loss, views, labels) == losses.compare_views(
            loss, views, expected
        )
    classifier = PathCrossEntropy(Hierarchy.flat(16))
    assert classifier(x, labels) == classifier(x, expected)
    force = losses.ContrastiveForce()
    assert force(*views, labels, labels) == force(*views, expected, expected)


def test_other_kinds_of_labels(views):
    x = views[0]
    close = [0.0, 0.1, 1.0, 1.1, math.nan, 3.0, 3.05, 9.0]
    loss = losses.SupCon(max_delta=0.2)
    for labels in (close, np.array(close, dtype=np.float32), np.array(close, dtype=np.float16)):
        assert loss(x, labels).item() == pytest.approx(loss(x, torch.tensor(close)).item())
    unsigned = LABELS_OF_8.to(torch.uint16)
    assert losses.SupCon()(x, unsigned) == losses.SupCon()(x, LABELS_OF_8)
    assert losses.SupCon()(x, [True, False] * 4) == losses.SupCon()(x, [1, 0] * 4)
    for labels, words in (
        (["cat", "dog"] * 4, "labels: texts"),
        ([[0], [0, 1]], "labels: something that is no dense tensor"),
        ([None] * 8, "labels: something that is no dense tensor"),
        ([0.5] * 8, "set max_delta"),
        (np.array([2**64 - 1] * 8), "labels: a NumPy array"),  # which int64 would call missing
        ([0] * 7, "8 rows of features, 7 rows of labels"),
    ):
        with pytest.raises(ConfigError, match=words):
            losses.SupCon()(x, labels)
    with pytest.raises(ConfigError, match="features: a NumPy array, no dense tensor"):
        losses.SupCon()(x.numpy(), LABELS_OF_8)


def test_a_parameter_is_no_setting():
    """It would be read once, and never learn."""
    for make in (losses.InfoNCE, lambda x: losses.SigLIP(bias=x)):
        with pytest.raises(ConfigError, match="learnable=True"):
            make(torch.nn.Parameter(torch.tensor(0.1)))


def test_a_learnable_temperature_in_a_loop_of_ones_own():
    """Embeddings that are easy to tell apart drive it to CLIP's limit, and no further."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    module = torch.nn.ModuleDict(
        {"loss": losses.InfoNCE(0.07, learnable=True), "s": losses.SigLIP()}
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=1e4)
    for _ in range(3):
        optimizer.zero_grad()
        (module["loss"](x, x) + module["s"](x, x)).backward()
        optimizer.step()
        losses.clamp_scales(module)
        assert module["loss"].scale().item() <= 100 * (1 + 1e-6)
    assert module["loss"].scale().item() == pytest.approx(100)
    losses.clamp_scales(losses.NTXent(0.001))  # a constant one is left alone


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
