"""Objectives in one process: measured values, formulas written out, gradcheck, invariances.

The formulas are those of formulas.py.
"""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import BATCHES, LABELLED, UNLABELLED, naive_infonce
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.losses import clamp_scales

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
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_negatives", [None, 4])
@pytest.mark.parametrize("size", [0, 1, 7])  # of the bank
def test_infonce_with_a_bank(size, num_negatives, symmetric, options):
    a, b = random_inputs(2, 5, 3)
    negatives = None if num_negatives is None else random_inputs(1, num_negatives, 3)[0]
    bank = torch.randn(size, 3, dtype=torch.float64)
    found = losses.InfoNCE(0.2, symmetric, **options)(a, b, negatives, bank)
    further = [x for x in (negatives, bank) if x is not None]
    inputs = [a, b] if negatives is None else [a, b, negatives]
    check(found, naive_infonce(a, b, further, symmetric=symmetric), inputs)


@pytest.mark.parametrize("options", IMPLS)
def test_gradcheck_with_a_bank(options):
    loss = losses.InfoNCE(0.2, symmetric=True, learnable=True, **options).double()
    bank = torch.randn(7, 3, dtype=torch.float64)

    def value(a, b, log_scale):
        parameters = {"scale.log_scale": log_scale}
        return torch.func.functional_call(loss, parameters, (a, b), {"bank": bank})

    assert torch.autograd.gradcheck(value, (*random_inputs(2, 5, 3), loss.scale.log_scale))


@pytest.mark.parametrize("options", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1e3])
def test_bank_in_single_precision(temperature, dtype, options):
    """The bank may have a dtype of its own; the loss keeps that of the rest."""
    a, b, bank = torch.randn(5, 8), torch.randn(5, 8), torch.randn(40, 8).to(dtype)
    bank[0] = a[0].to(dtype)  # a negative that is nearer than the positive
    a.requires_grad_()
    found = losses.InfoNCE(temperature, **options)(a, b, bank=bank)
    (grad,) = torch.autograd.grad(found, a)
    exact = a.detach().double().requires_grad_()
    expected = naive_infonce(exact, b.double(), [bank.double()], temperature)
    (right,) = torch.autograd.grad(expected, exact)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (grad - right).norm() <= 1e-4 * right.norm()


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
        (lambda: losses.DCL(-1.0), "temperature=-1.0"),
        (lambda: losses.SupCon(0.0), "temperature=0.0"),
        (lambda: losses.SelfDiagonal(math.nan), "temperature=nan"),
        (lambda: losses.SigLIP(scale=0.0), "scale=0.0"),
        (lambda: losses.SigLIP(scale=math.inf), "scale=inf"),
        (lambda: losses.SigLIP(bias=math.nan), "bias=nan"),
        (lambda: losses.Triplet(distance="x"), "distance=x: should be 'euclidean'"),
        (lambda: losses.Triplet(mining="x"), "mining=x: should be 'all'"),
        (lambda: losses.Triplet(margin=math.nan), "margin=nan"),
        (lambda: losses.CosineEmbedding(margin=2.0), "margin=2.0"),
        (lambda: losses.SupCon(max_delta=-1.0), "max_delta=-1.0"),
        (lambda: losses.VICReg(variance_weight=-1.0), "variance_weight=-1.0"),
        (lambda: losses.BarlowTwins(eps=math.nan), "eps=nan"),
        (lambda: losses.KoLeo(eps=0.0), "eps=0.0"),
        (lambda: losses.KoLeo(keys_from="moon"), "keys_from=moon: should be 'gather'"),
        (lambda: losses.KoLeo(epsilon=1.0), "epsilon is not a known setting; did you mean eps"),
        (lambda: losses.KoLeo(grad_reduction="max"), "grad_reduction='max'"),
        (lambda: losses.VICReg()(ROWS[:1], ROWS[:1]), "has 1 row"),
        (lambda: losses.DCL()(ROWS, ROWS[:2]), "4 rows of view_a, 2 rows of view_b"),
        (lambda: losses.BarlowTwins()(ROWS, ROWS[:, :2]), "different dimensions"),
        (lambda: losses.KoLeo()(ROWS[0]), "give floating embeddings"),
        (lambda: losses.SupCon()(ROWS, LABELS[:3]), "4 rows of features, 3 rows of labels"),
        (lambda: losses.SupCon()(ROWS, LABELS - 2), "-2"),
        (lambda: losses.SupCon()(ROWS, LABELS.double()), "set max_delta"),
        (lambda: losses.SupCon(max_delta=1.0)(ROWS, LABELS), "max_delta=1.0"),
        (lambda: losses.SupCon()(ROWS, LABELS[:, None]), "[rows, 1]"),
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


@pytest.mark.parametrize(("start", "end"), [(1e-4, 0.01), (0.01, 0.01), (0.3, 0.3), (7.0, 1.0)])
def test_a_learnable_scale_is_brought_back(start, end):
    kept, learned = losses.NTXent(start), losses.SigLIP(scale=1 / start)
    parameter = learned.scale.log_scale
    clamp_scales(nn.ModuleDict({"one": nn.ModuleList([kept]), "two": learned}))
    assert learned.scale.log_scale is parameter
    assert 1 / learned.scale().item() == pytest.approx(end, rel=1e-6)
    assert 1 / kept.scale().item() == pytest.approx(start, rel=1e-12)


def test_a_scale_at_its_limit_has_a_gradient():
    a, b = torch.randn(2, 6, 4)
    loss = losses.InfoNCE(1e-4, learnable=True)
    loss.scale.clamp_()
    loss(a, b).backward()
    assert loss.scale.log_scale.grad != 0


def test_a_config_names_every_loss():
    public = [getattr(losses, name) for name in losses.__all__]
    classes = {x for x in public if isinstance(x, type) and issubclass(x, losses.PairLoss)}
    assert {*losses.LOSSES.values()} == classes - {losses.PairLoss}
    adapter = TypeAdapter(losses.AnyLoss)
    for name, cls in losses.LOSSES.items():
        if cls is not losses.ContrastiveForce:  # a task's only loss
            chosen = adapter.validate_python({"name": name})
            assert type(losses.build_loss(chosen)) is cls
            assert chosen == cls().settings


def test_settings_are_arguments_in_the_order_of_declaration():
    signature = inspect.signature(losses.InfoNCE)
    names = ["temperature", "symmetric", "learnable", "keys_from", "impl", "chunk_size"]
    names += ["false_negative_margin", "false_negative_ratio"]
    assert [*signature.parameters] == [*names, "group", "grad_reduction"]
    assert signature.parameters["temperature"].default == 0.07
    loss = losses.InfoNCE(0.2, True, True, impl="dense")
    again = losses.InfoNCE(loss.settings)
    for x in (loss.settings, again.settings):
        assert (x.temperature, x.symmetric, x.learnable, x.impl) == (0.2, True, True, "dense")
    assert losses.SupCon(0.2, True, 0.5).settings.max_delta == 0.5
    assert losses.Triplet(0.1, "cosine", "hard", 0.5).settings.mining == "hard"
    for wrong in (lambda: losses.DCL(0.1, temperature=0.1), lambda: losses.KoLeo(*[1] * 9)):
        with pytest.raises(TypeError):
            wrong()


def test_local_keys_are_for_python_alone():
    assert losses.KoLeo(keys_from="local").keys_from == "local"
    with pytest.raises(ValidationError, match=r"keys_from=local.*gather or ring"):
        TypeAdapter(losses.AnyLoss).validate_python({"name": "koleo", "keys_from": "local"})


@pytest.mark.parametrize(
    ("union", "takes"),
    [
        (losses.ViewLoss, {"views", "features"}),
        (losses.LabelLoss, {"labels"}),
        (losses.AnyLoss, {"views", "features", "labels"}),
    ],
)
def test_unions_of_settings_hold_the_losses_that_take_the_same(union, takes):
    adapter = TypeAdapter(union)
    accepted = set()
    for name in losses.LOSSES:
        try:
            adapter.validate_python({"name": name})
        except ValidationError:
            continue
        accepted.add(name)
    assert accepted == {n for n, cls in losses.LOSSES.items() if cls.takes in takes}


@pytest.mark.parametrize(
    ("name", "setting", "refused", "accepted"),
    [
        ("supcon", "temperature", (0.0, -1.0), (1e-6, 100.0)),
        ("supcon", "max_delta", (-0.1,), (0.0, None)),
        ("triplet", "margin", (-0.1,), (0.0,)),
        ("triplet", "distance", ("manhattan",), ("cosine", "squared_euclidean", "euclidean")),
        ("triplet", "mining", ("easy",), ("hard", "semihard", "all")),
        ("cosine_embedding", "margin", (-1.1, 1.1, math.nan), (-1.0, 1.0)),
        ("cosine_embedding", "max_delta", (-1.0, math.inf), (2.0,)),
        ("self_diagonal", "temperature", (0.0,), (1e-6,)),
        ("koleo", "eps", (0.0, math.nan), (1e-12,)),
    ],
)
def test_limits_of_settings_are_those_of_the_classes(name, setting, refused, accepted):
    adapter = TypeAdapter(losses.AnyLoss)
    for value in refused:
        with pytest.raises(ValidationError):
            adapter.validate_python({"name": name, setting: value})
        with pytest.raises(ConfigError):
            losses.LOSSES[name](**{setting: value})
    for value in accepted:
        chosen = adapter.validate_python({"name": name, setting: value})
        assert getattr(chosen, setting) == value
        losses.build_loss(chosen)


@pytest.mark.parametrize("name", ["infonce", "ntxent", "dcl", "self_diagonal", "supcon", "siglip"])
def test_a_learnable_scale_starts_where_it_may_stay(name):
    setting, limits = ("scale", "1 to 100") if name == "siglip" else ("temperature", "0.01 to 1")
    adapter = TypeAdapter(losses.AnyLoss)
    for value in (0.9, 101.0) if name == "siglip" else (0.009, 1.1):
        start = {"name": name, setting: value}
        words = (
            f"{setting}={value:g} is learnable, hence kept from {limits}; start it there, or set "
            f"learnable to false"
        )
        with pytest.raises(ValidationError, match=words):
            adapter.validate_python({**start, "learnable": True})
        losses.build_loss(adapter.validate_python({**start, "learnable": False}))
        losses.LOSSES[name](**{setting: value, "learnable": True})
    for limit in (1.0, 100.0) if name == "siglip" else (0.01, 1.0):
        adapter.validate_python({"name": name, setting: limit, "learnable": True})
