"""Objectives in one process: measured values, formulas written out, gradcheck, invariances.

The formulas are written in the most literal way (loops over triplets): to be read, not to be fast.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError

IMPLS = [{"impl": "dense"}, {"impl": "chunked", "chunk_size": 3}]
NAN = math.nan


def naive_dcl(a, b, temperature=0.2):
    z, size = F.normalize(torch.cat([a, b])), len(a)
    scores, terms = z @ z.T / temperature, []
    for i in range(2 * size):
        positive = (i + size) % (2 * size)
        others = [j for j in range(2 * size) if j not in (i, positive)]
        terms.append(scores[i, others].exp().sum().log() - scores[i, positive])
    return torch.stack(terms).mean()


def naive_self_diagonal(x, temperature=0.2):
    z = F.normalize(x)
    return F.cross_entropy(z @ z.T / temperature, torch.arange(len(z)))


def naive_siglip(a, b, scale=10.0, bias=-10.0):
    a, b = F.normalize(a), F.normalize(b)
    total = a.new_zeros(())
    for i in range(len(a)):
        for j in range(len(b)):
            sign = 1 if i == j else -1
            total = total - F.logsigmoid(sign * (scale * (a[i] @ b[j]) + bias))
    return total / len(a)


def naive_vicreg(a, b, weights=(25, 25, 1), eps=1e-4):
    def variance(x):
        return (1 - (x.var(0, unbiased=True) + eps).sqrt()).relu().mean() / 2

    def covariance(x):
        matrix = torch.cov(x.T)
        return (matrix - matrix.diagonal().diag()).square().sum() / x.shape[1]

    terms = F.mse_loss(a, b), variance(a) + variance(b), covariance(a) + covariance(b)
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def naive_barlow(a, b, weight=5e-3, eps=1e-5):
    a, b = (F.batch_norm(x, None, None, training=True, eps=eps) for x in (a, b))
    matrix = a.T @ b / len(a)
    diagonal = matrix.diagonal()
    return (diagonal - 1).square().sum() + weight * (matrix - diagonal.diag()).square().sum()


def naive_koleo(x, eps=1e-8):
    """As in DINOv2: pairwise_distance adds eps to each component of the difference."""
    z = F.normalize(x)
    nearest = (z @ z.T).detach().fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=eps) + eps).log().mean()


SIGLIP, WEIGHTS = {"scale": 3.0, "bias": -1.0}, (3.0, 5.0, 7.0)
UNLABELLED = {  # class with its settings, formula, number of inputs
    "dcl": (partial(losses.DCL, temperature=0.2), naive_dcl, 2),
    "self diagonal": (partial(losses.SelfDiagonal, temperature=0.2), naive_self_diagonal, 1),
    "siglip": (
        partial(losses.SigLIP, **SIGLIP, learnable=False),
        partial(naive_siglip, **SIGLIP),
        2,
    ),
    "vicreg": (
        partial(losses.VICReg, *WEIGHTS, eps=1e-2),
        partial(naive_vicreg, weights=WEIGHTS, eps=1e-2),
        2,
    ),
    "barlow": (
        partial(losses.BarlowTwins, 0.5, eps=1e-2),
        partial(naive_barlow, weight=0.5, eps=1e-2),
        2,
    ),
    "koleo": (losses.KoLeo, naive_koleo, 1),
}


def mean(terms: list[Tensor], rows: Tensor) -> Tensor:
    """Mean of the terms; 0 with zero gradient where there are none."""
    return torch.stack(terms).mean() if terms else 0 * rows.sum()


def flat(features: Tensor) -> Tensor:
    """[b, D] or [b, V, D] -> a row for every view of a sample."""
    return features.reshape(-1, features.shape[-1])


def similar(features: Tensor, labels: Tensor | None, max_delta: float | None) -> Tensor:
    """[rows, rows]: views of one sample, or samples whose labels are there and agree."""
    num_views = 1 if features.dim() == 2 else features.shape[1]
    num_rows = len(flat(features))
    table = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for i in range(num_rows):
        for j in range(num_rows):
            s, t = i // num_views, j // num_views
            table[i, j] = s == t
            if labels is not None and max_delta is not None:
                table[i, j] |= abs(labels[s] - labels[t]) <= max_delta  # never with NaN
            elif labels is not None and labels[s] != -1:
                table[i, j] |= labels[s] == labels[t]
    return table


def around(i: int, same: Tensor) -> tuple[list[int], list[int]]:
    """Rows that should be near row i, and rows that should not."""
    others = [j for j in range(len(same)) if j != i]
    return [j for j in others if same[i, j]], [j for j in others if not same[i, j]]


def naive_supcon(features, labels=None, max_delta=None, temperature=0.2):
    z, same = F.normalize(flat(features)), similar(features, labels, max_delta)
    scores, terms = z @ z.T / temperature, []
    for i in range(len(z)):
        positives, negatives = around(i, same)
        if positives:
            log_sum = scores[i, positives + negatives].exp().sum().log()
            terms.append((log_sum - scores[i, positives]).mean())
    return mean(terms, z)


def distance_between(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(x, y, dim=0)
    square = (x - y).square().sum()
    if kind == "squared_euclidean":
        return square
    return square.sqrt() if square > 0 else square  # the gradient of d = 0 is 0


def naive_triplet(features, labels=None, max_delta=None, *, distance, mining, margin=0.2):
    x, same = flat(features), similar(features, labels, max_delta)
    terms = []
    for i in range(len(x)):
        d = [distance_between(x[i], y, distance) for y in x]
        positives, negatives = around(i, same)
        if not positives or not negatives:
            continue
        if mining == "all":
            pairs = [(d[p], d[n]) for p in positives for n in negatives]
        elif mining == "hard":
            pairs = [(max(d[p] for p in positives), min(d[n] for n in negatives))]
        else:
            pairs = []
            for p in positives:
                farther = [d[n] for n in negatives if d[n] > d[p]]
                pairs.append((d[p], min(farther) if farther else max(d[n] for n in negatives)))
        terms += [(near - far + margin).relu() for near, far in pairs]
    return mean(terms, x)


def naive_cosine(features, labels=None, max_delta=None, margin=0.5):
    x, same = flat(features), similar(features, labels, max_delta)
    terms = []
    for i in range(len(x)):
        for j in range(len(x)):
            s = F.cosine_similarity(x[i], x[j], dim=0)
            if i != j:
                terms.append(1 - s if same[i, j] else (s - margin).relu())
    return mean(terms, x)


LABELLED = {  # class with its settings, formula
    "supcon": (partial(losses.SupCon, temperature=0.2), naive_supcon),
    "cosine embedding": (partial(losses.CosineEmbedding, 0.1), partial(naive_cosine, margin=0.1)),
}
for _distance in ("euclidean", "squared_euclidean", "cosine"):
    for _mining in ("all", "hard", "semihard"):
        _options = {"margin": 0.6, "distance": _distance, "mining": _mining}
        LABELLED[f"triplet {_distance} {_mining}"] = (
            partial(losses.Triplet, **_options),
            partial(naive_triplet, **_options),
        )

BATCHES = {  # shape of the features, labels, max_delta
    "classes": ((9, 4), [3, 0, 0, 1, 3, 1, 1, 0, 7], None),  # 7 has one member
    "missing": ((8, 3), [-1, 0, 0, 1, -1, 1, 2, -1], None),
    "views": ((5, 3, 4), [0, 2, 0, -1, -1], None),
    "one view": ((5, 1, 4), [0, 0, 1, 1, 1], None),
    "views without labels": ((4, 2, 6), None, None),
    # 0 is similar to 0.5 and 0.5 to 1, but not 0 to 1; and a delta of exactly 0.5 is similar.
    "continuous": ((8, 4), [0.0, 0.5, 1.0, -2.25, -2.5, NAN, NAN, 9.0], 0.5),
    "continuous views": ((5, 2, 3), [0.0, NAN, 0.25, 3.0, NAN], 0.5),
    "no positive": ((4, 3), [0, 1, -1, -1], None),
}


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
        (lambda: losses.SelfDiagonal(NAN), "temperature=nan must be positive"),
        (lambda: losses.SigLIP(scale=0.0), "scale=0.0 must be"),
        (lambda: losses.SigLIP(scale=math.inf), "scale=inf must be"),
        (lambda: losses.SigLIP(bias=NAN), "bias=nan finite"),
        (lambda: losses.Triplet(distance="x"), "distance='x' is not known; use one of euclidean"),
        (lambda: losses.Triplet(mining="x"), "mining='x' is not known; use one of all"),
        (lambda: losses.Triplet(margin=NAN), "margin=nan must be"),
        (lambda: losses.CosineEmbedding(margin=2.0), "margin=2.0"),
        (lambda: losses.SupCon(max_delta=-1.0), "max_delta=-1.0 must be"),
        (lambda: losses.VICReg(variance_weight=-1.0), "variance_weight=-1.0 must be"),
        (lambda: losses.BarlowTwins(eps=NAN), "eps=nan must be"),
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
    features[1, 0], features[4, 0, 2] = NAN, math.inf
    inputs = arguments(name, features, torch.tensor([0, 1, 0, 2, -1, 2]))
    with pytest.raises(NonFiniteError, match=r" 2 of 6 rows of (features|view_a|a) on rank 0$"):
        EVERY[name]()(*inputs)
