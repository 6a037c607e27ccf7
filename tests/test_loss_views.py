"""Several views of the same samples, fed to losses that take two views, one, or labels."""

import pytest
import torch
import torch.distributed as dist
from formulas import naive_infonce, naive_koleo, naive_self_diagonal, naive_supcon
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import compare_views
from dist_contrastive.testing import run_ranks

TAKES = {
    "views": {"InfoNCE", "NTXent", "DCL", "SigLIP", "VICReg", "BarlowTwins"},
    "features": {"SelfDiagonal", "KoLeo"},
    "labels": {"SupCon", "Triplet", "CosineEmbedding"},
    "points": {"ContrastiveForce"},
}
LABELS = torch.tensor([0, 1, 0, 2, -1, 1, 2])
SIZES = (4, 0, 3)  # of the ranks


def made(num_views: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (num_views, 7, 5)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [x.clone().requires_grad_() for x in drawn]


def check(found: Tensor, expected: Tensor, views: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(x, views, retain_graph=True) for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_every_loss_says_what_it_takes():
    by_kind: dict[str, set[str]] = {}
    for cls in losses.LOSSES.values():
        by_kind.setdefault(cls.takes, set()).add(cls.__name__)
    assert by_kind == TAKES


@pytest.mark.parametrize("name", sorted(TAKES["views"]))
def test_two_views_are_exactly_the_loss(name):
    views, loss = made(2), getattr(losses, name)()
    values = compare_views(loss, views), loss(*views)
    assert torch.equal(*values)
    gradients = [torch.autograd.grad(x, views) for x in values]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("num_global", "pairs"),
    [
        (1, ["01", "02", "03"]),
        (2, ["01", "02", "03", "12", "13"]),
        (3, ["01", "02", "03", "12", "13", "23"]),
        (4, ["01", "02", "03", "12", "13", "23"]),
    ],
)
def test_every_pair_has_a_global_view(num_global, pairs):
    views = made()
    terms = [naive_infonce(views[int(i)], views[int(j)]) for i, j in pairs]
    found = compare_views(losses.InfoNCE(0.2), views, num_global=num_global)
    check(found, sum(terms) / len(terms), views)


@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize(
    ("loss", "naive"),
    [(losses.SelfDiagonal(0.2), naive_self_diagonal), (losses.KoLeo(), naive_koleo)],
)
def test_features_are_the_mean_over_the_views(loss, naive, num_views):
    views = made(num_views)
    expected = torch.stack([naive(view) for view in views]).mean()
    check(compare_views(loss, views, num_global=9), expected, views)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_labels_compare_all_rows_of_all_views(labels):
    views = made(3)
    expected = naive_supcon(torch.stack(views, 1), labels)
    check(compare_views(losses.SupCon(0.2), views, labels), expected, views)


@pytest.mark.parametrize("name", sorted(TAKES["labels"]))
def test_one_view_with_labels(name):
    views, loss = made(1), getattr(losses, name)()
    assert torch.equal(compare_views(loss, views, LABELS), loss(views[0], LABELS))


LOSSES = {
    "InfoNCE": losses.InfoNCE(0.2, symmetric=True),
    "VICReg": losses.VICReg(),
    "KoLeo": losses.KoLeo(),
    "SupCon": losses.SupCon(0.2),
    "Triplet": losses.Triplet(mining="hard"),
}


def on_ranks(keys_from: str) -> list[tuple[float, Tensor]]:
    rank, results = dist.get_rank(), []
    for loss in LOSSES.values():
        loss.keys_from = keys_from
        views = [x.detach().split(SIZES)[rank].requires_grad_() for x in made(3)]
        value = compare_views(loss, views, LABELS.split(SIZES)[rank])
        gradients = torch.autograd.grad(value, views)
        results.append((value.item(), torch.stack(gradients)))
    return results


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
def test_the_gradient_contract_holds(keys_from):
    of_ranks = run_ranks(on_ranks, len(SIZES), keys_from)
    for place, loss in enumerate(LOSSES.values()):
        views = made(3)
        value = compare_views(loss, views, LABELS)
        gradients = torch.stack(torch.autograd.grad(value, views))
        found = [results[place] for results in of_ranks]
        assert [x for x, _ in found] == pytest.approx([value.item()] * 3, abs=1e-9)
        joined = torch.cat([x for _, x in found], dim=1) / len(SIZES)
        torch.testing.assert_close(joined, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "num_views", "num_global", "words"),
    [
        (losses.NTXent(), 1, 1, "NTXent was given 1 view(s) of the samples and needs at least 2"),
        (losses.VICReg(), 0, 1, "VICReg was given 0 view(s) of the samples and needs at least 2"),
        (losses.KoLeo(), 0, 2, "KoLeo was given 0 view(s) of the samples and needs at least 1"),
        (losses.SupCon(), 0, 2, "SupCon was given 0 view(s)"),
        (
            losses.SupCon(),
            1,
            2,
            "features [rows, 5] have one view a sample and no labels, hence no",
        ),
        (losses.DCL(), 3, 0, "num_global=0 must be 1 to 3, the number of views; set it"),
        (losses.DCL(), 3, 4, "num_global=4 must be 1 to 3, the number of views; set it"),
        (losses.ContrastiveForce(), 2, 2, "ContrastiveForce compares points of two kinds, not"),
    ],
)
def test_bad_input_is_one_sentence(loss, num_views, num_global, words):
    with pytest.raises(ConfigError) as caught:
        compare_views(loss, made(num_views), num_global=num_global)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


BAD = {  # loss, rows of the views of ranks 0 and 1, words
    "more views": (
        losses.NTXent(),
        [[3, 3], [3, 3, 3]],
        "[2, rows, 4] torch.float32 without gradient on rank 0; [3, rows",
    ),
    "no views": (losses.KoLeo(), [[3, 3], []], "views are missing on ranks [1]"),
    "rows": (
        losses.SupCon(),
        [[3, 3], [3, 2]],
        "without gradient on rank 0; tensors of different shapes or dtypes on rank 1; give",
    ),
}


def refused() -> dict[str, str]:
    messages = {}
    for name, (loss, rows, _) in BAD.items():
        with pytest.raises(ConfigError) as caught:
            compare_views(loss, [torch.ones(n, 4) for n in rows[dist.get_rank()]])
        messages[name] = str(caught.value)
    return messages


def test_bad_views_of_one_rank_are_refused_on_all():
    first, second = run_ranks(refused, 2)
    assert first == second
    for name, (_, _, words) in BAD.items():
        assert words in first[name]
