"""Negatives that are left out, by equal ids and by limits on their scores: against plain torch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formulas import naive_siglip
from torch import Tensor

from dist_contrastive import losses, pairwise
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import false_negatives
from dist_contrastive.pairwise import LogSumExp, Pairs
from dist_contrastive.testing import run_ranks

TEMPERATURE = 0.2
IDS = torch.tensor([0, 1, 0, -1, -1, 2, 2])
FURTHER_IDS, BANK_IDS = torch.tensor([0, -1, 2, 5]), torch.tensor([2, -1, 0, 0, 9])
WAYS = [("dense", "gather"), ("chunked", "gather"), ("chunked", "ring"), ("chunked", "local")]


def false(
    scores: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    margin: float | None,
    ratio: float | None,
) -> Tensor:
    """Which pairs are false negatives, one by one; row i's positive is key i."""
    table = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for j, score in enumerate(row):
            if ids is not None and key_ids is not None:
                table[i, j] |= i != j and bool(ids[i] == key_ids[j] != -1)
            if margin is not None:
                table[i, j] |= i != j and score > row[i] + margin
            if ratio is not None:
                table[i, j] |= i != j and score > row[i] * ratio
    return table


def naive(
    q: Tensor,
    keys: list[Tensor],
    ids: list[Tensor] | None = None,
    symmetric: bool = False,
    margin: float | None = None,
    ratio: float | None = None,
) -> Tensor:
    """InfoNCE of keys, further ones and a bank."""
    scores = F.normalize(q) @ F.normalize(torch.cat(keys)).T
    row_ids, key_ids = (None, None) if ids is None else (ids[0], torch.cat(ids))
    out, target = false(scores, row_ids, key_ids, margin, ratio), torch.arange(len(q))
    loss = F.cross_entropy((scores / TEMPERATURE).masked_fill(out, -torch.inf), target)
    if symmetric:
        scores = scores[:, : len(q)].T
        out = false(scores, row_ids, row_ids, margin, ratio)
        of_keys = F.cross_entropy((scores / TEMPERATURE).masked_fill(out, -torch.inf), target)
        loss = (loss + of_keys) / 2
    return loss


def made(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in sizes]


def equal(found: Tensor, right: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-13)
    grads = (torch.autograd.grad(x, inputs) for x in (found, right))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


LIMITS: list[dict[str, float]] = [
    {},
    {"margin": 0.1},
    {"margin": -0.2, "ratio": 0.9},
    {"margin": -10.0},  # all negatives are above it
    {"margin": 10.0},  # none is
    {"ratio": 0.5},
]


@pytest.mark.parametrize(("impl", "keys_from"), WAYS)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_formula(with_ids, limits, impl, keys_from):
    q, k, further = made(7, 7, 4)
    bank = torch.randn(5, 3, dtype=torch.float64)
    settings: dict[str, Any] = {"impl": impl, "keys_from": keys_from, "chunk_size": 3}
    settings |= {f"false_negative_{name}": x for name, x in limits.items()}
    given = {"ids": IDS, "negative_ids": FURTHER_IDS, "bank_ids": BANK_IDS} if with_ids else {}
    ids = [*given.values()] or None
    for symmetric in (False, True):
        loss = losses.InfoNCE(TEMPERATURE, symmetric, **settings)
        right = naive(q, [k, further, bank], ids, symmetric, **limits)
        equal(loss(q, k, further, bank, **given), right, [q, k, further])
    ids = [IDS] if with_ids else None
    equal(loss(q, k, ids=ids and IDS), naive(q, [k], ids, True, **limits), [q, k])


def test_further_keys_without_ids_are_negatives_of_all():
    q, k, further = made(7, 7, 4)
    bank, no_ids = torch.randn(5, 3, dtype=torch.float64), torch.full((9,), -1)
    found = losses.InfoNCE(TEMPERATURE)(q, k, further, bank, ids=IDS.tolist())
    equal(found, naive(q, [k, further, bank], [IDS, no_ids]), [q, k, further])


@pytest.mark.parametrize(("impl", "keys_from"), WAYS)
def test_siglip(impl, keys_from):
    a, b = made(7, 7)
    loss = losses.SigLIP(3.0, -1.0, impl=impl, keys_from=keys_from, chunk_size=3)
    logits = 3 * F.normalize(a) @ F.normalize(b).T - 1
    out = false(logits, IDS, IDS, None, None)
    terms = -F.logsigmoid((2 * torch.eye(7, dtype=torch.float64) - 1) * logits)
    equal(loss(a, b, ids=IDS), terms.masked_fill(out, 0.0).sum() / 7, [a, b])
    equal(loss(a, b, ids=torch.arange(7)), naive_siglip(a, b, 3.0, -1.0), [a, b])


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_but_the_positive(dtype, impl):
    """The loss is 0, and so is its gradient: no NaN comes of sums of nothing."""
    inputs = [torch.randn(6, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    bank, ids = torch.randn(5, 4, dtype=dtype), torch.zeros(6, dtype=torch.int64)
    options: dict[str, Any] = {"impl": impl, "chunk_size": 4, "symmetric": True}
    options["learnable"] = True
    ways = [
        (losses.InfoNCE(**options), {"ids": ids, "negative_ids": ids, "bank_ids": ids[:5]}),
        (losses.InfoNCE(**options, false_negative_margin=-10), {}),
    ]
    for loss, given in ways:
        found = loss(*inputs, bank, **given)
        grads = torch.autograd.grad(found, [*inputs, *loss.parameters()])
        assert found == 0
        assert all((x == 0).all() for x in grads)


def scores_and_thresholds() -> tuple[Pairs, list[Tensor]]:
    """Rows and keys whose thresholds are infinite, or just above one of their scores."""
    rows, keys = torch.randn(7, 5).double(), torch.randn(10, 5).double()
    scores = rows @ keys.T
    of_rows, of_keys = scores[:, 3] + 1e-9, scores.median(0).values + 1e-9
    of_rows[:2], of_keys[-2:] = torch.inf, torch.tensor([-torch.inf, torch.inf])
    tags = torch.tensor([0, 1, 0, 2, 1, 3, 4, 4, 1, 0])
    return Pairs(rows, keys, (10,), tags=tags, thresholds=(of_rows, of_keys)), [of_rows, of_keys]


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
@pytest.mark.parametrize("leave_out", ["nothing", "own", "similar"])
@pytest.mark.parametrize("factor", [1.0, 60.0])  # 60: beyond what one exponential can span
def test_thresholds_of_rows_and_keys(factor, leave_out, keys_from):
    pairs, thresholds = scores_and_thresholds()
    thresholds = [factor * x for x in thresholds]
    rows, keys = (factor * pairs.rows).requires_grad_(), pairs.keys.requires_grad_()
    for both in (False, True):
        of_keys = thresholds[1] if both else None
        how = {"thresholds": (thresholds[0], of_keys), "keys_from": keys_from}
        given, results = replace(pairs, rows=rows, keys=keys, **how), []
        for impl, chunk_size in (("dense", None), ("chunked", 3), ("chunked", 64)):
            found = sum(pairwise.reduce(LogSumExp(leave_out, both), given, impl, chunk_size), ())
            torch.manual_seed(0)
            loss = sum((x * torch.randn_like(x))[x.detach().isfinite()].sum() for x in found)
            results.append([*found, *torch.autograd.grad(loss, [rows, keys])])
        for others in results[1:]:
            for right, x in zip(results[0], others, strict=True):
                torch.testing.assert_close(x, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("both", [False, True])
def test_forward_and_backward_decide_alike(both):
    """Scores at the threshold, up to rounding: the weights of those that count still add up to 1,
    which they would not if backward took one out that forward had left in."""
    rows, keys = torch.randn(60, 16), F.normalize(torch.randn(40, 16))
    keys[20:] = keys[:20]  # each score twice
    rows, thresholds = rows.requires_grad_(), (rows.detach() * keys[:1]).sum(1)
    # A further dimension counts the weights, and changes no score.
    rows, keys = F.pad(rows, (0, 1)), F.pad(keys, (0, 1), value=1.0)
    for number in range(20):
        thresholds = rows.detach() @ keys[number]
        pairs = Pairs(rows, keys, (40,), thresholds=(thresholds, None))
        (lse, *_), _ = pairwise.reduce(LogSumExp(both=both), pairs, "chunked", 7)
        weights = torch.autograd.grad(lse[lse.isfinite()].sum(), rows, retain_graph=True)[0][:, -1]
        assert (weights[lse.isfinite()] - 1).abs().max() < 1e-6


def test_limits_have_no_gradient():
    """A limit far from all scores decides the same wherever the positive is: gradients are those
    of the loss without it."""
    q, k = made(7, 7)
    inputs = [q, k]
    plain, limited = losses.InfoNCE(0.2), losses.InfoNCE(0.2, false_negative_margin=2.5)
    equal(limited(q, k), plain(q, k), inputs)


def on_rank(sizes: tuple[int, ...]) -> str:
    rank = torch.distributed.get_rank()
    x = torch.randn(sizes[rank], 3)
    ids = torch.arange(sizes[rank]) if rank else None
    with pytest.raises(ConfigError) as error:
        losses.InfoNCE()(x, x, ids=ids)
    return str(error.value)


def test_ids_of_one_rank_alone():
    words = "ids are missing on ranks [0]; give them on all ranks or none"
    assert run_ranks(on_rank, 2, (2, 3)) == [words, words]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ids": IDS[:3]}, "7 rows of queries, 7 rows of keys, 3 rows of ids"),
        ({"ids": IDS - 3}, "ids on rank 0 have -4 as the lowest; give integers from 0"),
        ({"ids": IDS.double()}, "give integers from 0, -1 where missing, as [n]"),
        ({"negative_ids": FURTHER_IDS}, "negative_ids are given without negatives; give both"),
        ({"bank_ids": BANK_IDS}, "bank_ids are given without bank; give both"),
        (
            {"bank_ids": BANK_IDS, "bank": torch.zeros(5, 3).double()},
            "bank_ids are given without ids; give both",
        ),
    ],
)
def test_bad_ids(given, words):
    q, k = made(7, 7)
    with pytest.raises(ConfigError) as error:
        losses.InfoNCE()(q, k, **given)
    assert words in str(error.value)
    if given.keys() == {"ids"}:
        with pytest.raises(ConfigError) as error:
            losses.SigLIP()(q, k, **given)
        assert words.removeprefix("7 rows of queries, 7 rows of keys, ") in str(error.value)


def test_limits_are_numbers():
    for name, x in (("margin", torch.nan), ("ratio", 0.0), ("margin", torch.inf)):
        with pytest.raises(ConfigError, match=f"false_negative_{name}"):
            losses.InfoNCE(**{f"false_negative_{name}": x})


def test_cosines_of_rows_without_direction():
    settings = losses.InfoNCE.Config(false_negative_margin=0.25)
    rows, scale = torch.tensor([[0.0, 0.0], [3e-10, 0.0]]), torch.tensor(2.0)
    found = settings.thresholds(rows, torch.tensor([[1.0, 0.0], [5.0, 0.0]]), scale, "auto")
    torch.testing.assert_close(found, torch.tensor([0.5, 2.5]))
    assert false_negatives.cross_entropy(found, found + 200, "own").tolist() == [0, 0]
