"""Objectives in one process: measured values, formulas written out, gradcheck, invariances.

The formulas are those of formulas.py.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import BATCHES, LABELLED, UNLABELLED
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError

IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 3}]


def random_inputs(num_inputs: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(num_inputs)]


def check(found: Tensor, expected: Tensor, inputs: list[Tensor], merge=()) -> None:
    """Equal value and gradients; of the rows in merge the sum of gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(x, inputs, retain_graph=True) for x in (found, expected)]
    at = torch.tensor(merge, dtype=torch.int64)
    for pair in zip(*gradients, strict=True):
        found, expected = (g.index_copy(0, at, g[at].sum(0).expand_as(g[at])) for g in pair)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("shape", [(2, 3), (5, 4), (10, 2), (3, 12)])
@pytest.mark.parametrize("name", UNLABELLED)
def test_formula(name, shape, options):
    make, naive, num_inputs = UNLABELLED[name]
    inputs = random_inputs(num_inputs, *shape)
    check(make(**options)(*inputs), naive(*inputs), inputs)


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("which", BATCHES)
@pytest.mark.parametrize("name", LABELLED)
def test_formula_with_labels(name, which, options):
    make, naive = LABELLED[name]
    shape, labels, max_delta = BATCHES[which]
    (features,) = random_inputs(1, *shape)
    labels = None if labels is None else torch.tensor(labels)
    loss = make(max_delta=max_delta, **options)(features, labels)
    check(loss, naive(features, labels, max_delta), [features])


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("name", LABELLED)
def test_equal_rows(name, options):
    """d = 0 has gradient 0 and is not a rounded 0."""
    make, naive = LABELLED[name]
    rows = torch.randn(8, 4, dtype=torch.float64) + 3
    rows[1] = rows[0]
    rows.requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    # Mining may choose either of the two rows, so only their sum is defined.
    merge = (0, 1) if name.endswith("hard") else ()
    check(make(**options)(rows, labels), naive(rows, labels), [rows], merge)
    if not name.endswith("semihard"):  # where rounding decides which of the two is farther
        labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
        check(make(**options)(rows, labels), naive(rows, labels), [rows])


@pytest.fixture
def views() -> tuple[Tensor, Tensor]:
    """The fixture of test_losses, on which the code of papers and of packages was measured."""
    random = np.random.RandomState(0)
    return torch.tensor(random.randn(8, 16)), torch.tensor(random.randn(8, 16))


CLASSES = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("options", IMPLS)
def test_measured_values(views, options):
    a, b = views
    rows, labels = torch.cat([a, b]), CLASSES.repeat(2)
    supcon, triplet = losses.SupCon(**options), losses.Triplet(5.0, mining="hard", **options)
    siglip = losses.SigLIP(learnable=False, **options)
    for value, measured, error in [
        (supcon(torch.stack([a, b], 1), CLASSES), 4.0744709245, 1e-9),
        (supcon(rows, labels), 4.0744709245, 1e-9),
        (siglip(F.normalize(a), F.normalize(b)), 9.6933564210, 1e-9),
        (losses.VICReg(**options)(a, b), 54.6283695475, 1e-9),
        (losses.BarlowTwins(**options)(a, b), 17.7370377, 1e-5),
        (losses.KoLeo(**options)(a), -0.1681978149, 1e-9),
        (losses.DCL(**options)(a, b), 3.8569334079, 1e-9),
        (triplet(rows, labels), 6.8484285968, 1e-9),
    ]:
        assert value.item() == pytest.approx(measured, abs=error)


EVERY = {name: make for name, (make, *_) in {**UNLABELLED, **LABELLED}.items()}
LEARNABLE = {"dcl", "self diagonal", "siglip", "supcon"}


def arguments(name: str, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What the loss takes of features [b, 2, D] and labels."""
    if name in LABELLED:
        return features, labels
    return features.unbind(1)[: UNLABELLED[name][2]]


@pytest.mark.parametrize("name", EVERY)
def test_gradcheck(name):
    learnable = {"learnable": True} if name in LEARNABLE else {}
    loss = EVERY[name](impl="chunked", chunk_size=2, **learnable).double()
    names, parameters = zip(*loss.named_parameters(), strict=True) if learnable else ((), ())
    labels = torch.tensor([0, 0, 1, 1, -1])

    def value(features, *parameters):
        with_parameters = dict(zip(names, parameters, strict=True))
        inputs = arguments(name, features, labels)
        return torch.func.functional_call(loss, with_parameters, inputs)

    assert torch.autograd.gradcheck(value, (*random_inputs(1, 5, 2, 3), *parameters))


@pytest.mark.parametrize("keys_from", ["ring", "local"])
@pytest.mark.parametrize("name", EVERY)
def test_one_process_needs_no_group(name, keys_from):
    (features,) = random_inputs(1, 5, 2, 3)
    inputs = arguments(name, features, torch.tensor([0, 0, 1, 1, -1]))
    gathered = EVERY[name](impl="dense")(*inputs)
    for options in IMPLS:
        check(EVERY[name](keys_from=keys_from, **options)(*inputs), gathered, [features])


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.permutations(range(6)),
    st.lists(st.integers(-1, 2), min_size=6, max_size=6),
    st.integers(0, 1000),
)
def test_order_of_samples_does_not_matter(name, order, labels, seed):
    assume(len({*labels} - {-1}) > 1)
    torch.manual_seed(seed)
    labels = torch.tensor(labels)
    (features,) = random_inputs(1, 6, 2, 3)
    loss = EVERY[name](impl="chunked", chunk_size=4)
    values = [
        loss(*arguments(name, features[rows], labels[rows])) for rows in (list(range(6)), order)
    ]
    check(*values, [features])


@pytest.mark.parametrize("name", LABELLED)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.permutations([0, 1, 7, 2**40]), st.integers(0, 1000))
def test_names_of_classes_do_not_matter(name, names, seed):
    torch.manual_seed(seed)
    (features,) = random_inputs(1, 8, 3)
    labels = torch.tensor([0, 1, 2, 0, -1, 2, 0, 3])
    renamed = torch.where(labels < 0, -1, torch.tensor(names)[labels])
    loss = EVERY[name](impl="chunked", chunk_size=4)
    check(loss(features, renamed), loss(features, labels), [features])


SETTINGS = [(name, {}) for name in EVERY]
SETTINGS += [(name, {"temperature": t}) for name in LEARNABLE - {"siglip"} for t in (1e-3, 1e3)]
SETTINGS += [("siglip", {"scale": scale, "learnable": True}) for scale in (100.0, 1000.0)]


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("rows", ["random", "large", "collapsed"])
@pytest.mark.parametrize(("name", "setting"), sorted(SETTINGS, key=str))
def test_limits_in_single_precision(name, setting, rows, options):
    features = torch.randn(6, 2, 5)
    if rows == "large":
        features *= 1000
    if rows == "collapsed":
        features[:] = features[0, 0]
    features.requires_grad_()
    loss = EVERY[name](**setting, **options)
    value = loss(*arguments(name, features, torch.tensor([0, 1, 0, 2, -1, 2])))
    value.backward()
    assert value.isfinite()
    for x in (features, *loss.parameters()):
        assert x.grad.isfinite().all()
    if rows == "collapsed" and name.startswith("triplet"):
        assert value.item() == pytest.approx(0.6, abs=1e-6)
        torch.testing.assert_close(features.grad, torch.zeros_like(features), rtol=0, atol=1e-6)


ROWS, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.DCL(-1.0), "temperature=-1.0 must be positive"),
        (lambda: losses.SupCon(0.0), "temperature=0.0 must be positive"),
        (lambda: losses.SelfDiagonal(math.nan), "temperature=nan must be positive"),
        (lambda: losses.SigLIP(scale=0.0), "scale=0.0 must be"),
        (lambda: losses.SigLIP(scale=math.inf), "scale=inf must be"),
        (lambda: losses.SigLIP(bias=math.nan), "bias=nan finite"),
        (lambda: losses.Triplet(distance="x"), "distance='x' is not known; use one of euclidean"),
        (lambda: losses.Triplet(mining="x"), "mining='x' is not known; use one of all"),
        (lambda: losses.Triplet(margin=math.nan), "margin=nan must be"),
        (lambda: losses.CosineEmbedding(margin=2.0), "margin=2.0"),
        (lambda: losses.SupCon(max_delta=-1.0), "max_delta=-1.0 must be"),
        (lambda: losses.VICReg(variance_weight=-1.0), "variance_weight=-1.0 must be"),
        (lambda: losses.BarlowTwins(eps=math.nan), "eps=nan must be"),
        (lambda: losses.KoLeo(eps=0.0), "eps=0.0 must be"),
        (lambda: losses.KoLeo(keys_from="moon"), "keys_from='moon' is not known; use one of"),
        (lambda: losses.VICReg()(ROWS[:1], ROWS[:1]), "has 1 row"),
        (lambda: losses.DCL()(ROWS, ROWS[:2]), "4 rows of view_a, 2 rows of view_b"),
        (lambda: losses.BarlowTwins()(ROWS, ROWS[:, :2]), "different dimensions"),
        (lambda: losses.KoLeo()(ROWS[0]), "give floating embeddings"),
        (lambda: losses.SupCon()(ROWS, LABELS[:3]), "4 rows of features, 3 rows of labels"),
        (lambda: losses.SupCon()(ROWS, LABELS - 2), "-2"),
        (lambda: losses.SupCon()(ROWS, LABELS.double()), "set max_delta"),
        (lambda: losses.SupCon(max_delta=1.0)(ROWS, LABELS), "max_delta=1.0"),
        (lambda: losses.SupCon()(ROWS, LABELS[:, None]), "give one number a row"),
        (lambda: losses.Triplet()(ROWS, 0 * LABELS), "class"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_non_finite_embeddings_are_named(name):
    features = torch.randn(6, 2, 3)
    features[1, 0], features[4, 0, 2] = math.nan, math.inf
    inputs = arguments(name, features, torch.tensor([0, 1, 0, 2, -1, 2]))
    with pytest.raises(NonFiniteError, match=r" 2 of 6 rows of (features|view_a|a) on rank 0; "):
        EVERY[name]()(*inputs)
