"""The gradient contract: W ranks give the loss and the gradient of one process with all rows.

The audit does the comparing: every loss behind an encoder inside the real DistributedDataParallel,
fp64, different data on every rank. Its reference, the dense loss in one process, is proved against
formulas written out in test_objectives.py.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_contrastive import losses, pairwise
from dist_contrastive.audit import CASES, SPLITS, Case, audit
from dist_contrastive.testing import run_ranks


@pytest.mark.parametrize(
    "world_size",
    [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)],
)
def test_gradient_contract(world_size):
    findings = audit([world_size])
    for found in findings:
        assert found.way.world_size == world_size
        assert found.error <= 1e-9, found


def test_the_audit_leaves_nothing_out():
    audited = {case.loss for case in CASES.values()}
    assert audited == {*losses.LOSSES.values()}
    name = "InfoNCE, symmetric, hard negatives"
    findings = audit([3], {name: CASES[name]})
    assert {f.way for f in findings} == {
        (keys_from, impl, 3, split)
        for keys_from in ("gather", "ring")
        for impl in ("dense", "chunked")
        for split in SPLITS
    }
    assert findings[0].ratios.keys() == {"value", "encoder", "log_scale"}
    assert findings[0].differences.keys() == {"encoder", "log_scale", "rows"}
    assert audit([1], {"SigLIP": CASES["SigLIP"]})[0].cosines.keys() == {
        "encoder",
        "log_scale",
        "bias",
    }


def test_the_audit_sees_a_wrong_gradient():
    """Gradients that reducers should add, averaged by DDP: the audit must tell 1/W."""
    case = Case(losses.NTXent, {"learnable": True, "grad_reduction": "sum"}, 2)
    found = audit([2], {"NTXent": case})[0]
    assert found.ratios["encoder"] == pytest.approx(0.5)
    assert found.ratios["log_scale"] == pytest.approx(0.5)
    assert found.differences["rows"] > 0.2  # of one rank, beside the norm of all rows
    assert found.error == pytest.approx(0.5)


def largest_batches() -> tuple[float, Tensor]:
    a, b = (mine(x, (1, 1100)).requires_grad_() for x in many_views())
    loss = losses.InfoNCE(0.1, symmetric=True)(a, b)
    loss.backward()
    return loss.item(), a.grad


def counted() -> list[tuple[float, dict[str, float], bool]]:
    """Labels with four triplets, then with none: value, metrics, whether all slopes are 0."""
    results = []
    for labels in ([3, 3, 5, 6], [3, 4, 5, 6]):
        for make in (losses.Triplet, losses.SupCon):
            x = mine(torch.arange(8.0).reshape(4, 2), (1, 3)).requires_grad_()
            loss = make()
            value = loss(x, mine(torch.tensor(labels), (1, 3)))
            value.backward()
            metrics = {name: count.item() for name, count in loss.metrics.items()}
            results.append((value.item(), metrics, bool((x.grad == 0).all())))
    return results


def test_batches_without_a_triplet_are_counted():
    for triplet, supcon, no_triplet, no_positive in run_ranks(counted, 2):
        assert triplet[1]["valid_triplets"] == 4
        assert supcon[1] == {"rows_with_positives": 2}
        assert no_triplet == (0.0, {"valid_triplets": 0, "active_triplets": 0}, True)
        assert no_positive == (0.0, {"rows_with_positives": 0}, True)


ONE_CLASS = {  # labels of which no two differ by more than max_delta
    "classes": ([5, 5, 5, 5], None),
    "class 0": ([0, 0, 0, 0], None),
    "continuous": ([1.0, 1.25, 1.25, 1.5], 0.5),
}


def of_one_class() -> list[tuple[float, float, bool]]:
    results = []
    for labels, max_delta in ONE_CLASS.values():
        for options in itertools.product(
            ("gather", "ring"), ("dense", "chunked"), ("all", "hard", "semihard")
        ):
            keys_from, impl, mining = options
            x = mine(torch.arange(8.0).reshape(4, 2), (1, 3)).requires_grad_()
            loss = losses.Triplet(
                mining=mining, max_delta=max_delta, impl=impl, keys_from=keys_from
            )
            value = loss(x, mine(torch.tensor(labels), (1, 3)))
            value.backward()
            counts = sum(x.item() for x in loss.metrics.values())
            results.append((value.item(), counts, bool((x.grad == 0).all())))
    return results


def test_a_batch_of_one_class_counts_0():
    for results in run_ranks(of_one_class, 2):
        assert results == [(0.0, 0.0, True)] * len(ONE_CLASS) * 12


def many_views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1101, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_ranks_of_different_size_choose_the_same_implementation():
    """Alone, rank 0 would take the dense way and rank 1 the chunked one, and wait for ever."""
    a, b = (x.requires_grad_() for x in many_views())
    loss = losses.InfoNCE(0.1, symmetric=True, impl="dense")(a, b)
    loss.backward()
    (value, first), (_, second) = run_ranks(largest_batches, 2)
    assert value == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(torch.cat([first, second]) / 2, a.grad, rtol=1e-9, atol=1e-12)


def nearest_of_equals(keys_from: str) -> tuple[list[int], list[int]]:
    """Three points of one class and, on each rank, two of others, all equally far from them."""
    near, far = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.cat([near, far])
    rank = dist.get_rank()
    tags = torch.tensor([-1, -1, -1, 2 * rank, 2 * rank + 1])
    pairs = pairwise.Pairs(x, x, (5, 5, 5), keys_from, tags)
    positive, negative = pairwise.extremes(pairs, pairwise.DISTANCES["euclidean"], 2)
    return positive.number[:3].tolist(), negative.number[:3].tolist()


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
def test_of_equally_distant_keys_the_first_counts(keys_from):
    for rank, (positive, negative) in enumerate(run_ranks(nearest_of_equals, 3, keys_from)):
        assert positive == ([1, 0, 0] if rank == 0 else [0, 0, 0])
        assert negative == [3, 3, 3]


def mine(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return x.split(sizes)[dist.get_rank()]


def two_views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def summed() -> Tensor:
    a, b = (mine(x, (9, 3)).requires_grad_() for x in two_views())
    losses.NTXent(0.2, grad_reduction="sum")(a, b).backward()
    return a.grad


def test_sum_reduction_leaves_plain_gradient():
    """With grad_reduction="sum" the gradients of ranks add up to the exact one."""
    a, b = (x.requires_grad_() for x in two_views())
    losses.NTXent(0.2)(a, b).backward()
    torch.testing.assert_close(torch.cat(run_ranks(summed, 2)), a.grad, rtol=1e-9, atol=1e-12)


BANK = torch.randn(5, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
MADE = {
    "InfoNCE": lambda **options: losses.InfoNCE(0.1, symmetric=True, **options),
    "InfoNCE, bank": lambda **options: partial(losses.InfoNCE(0.1, **options), bank=BANK),
    "SupCon": lambda **options: losses.SupCon(**options),
    "Triplet, all": lambda **options: losses.Triplet(0.5, **options),
    "Triplet, hard": lambda **options: losses.Triplet(0.5, mining="hard", **options),
    "KoLeo": lambda **options: losses.KoLeo(**options),
    "BarlowTwins": lambda **options: losses.BarlowTwins(**options),
}


def inputs_of(name: str) -> list[Tensor]:
    a, b = two_views()
    labels = torch.arange(12) % 5 - 1
    kinds = {"InfoNCE": [a, b], "InfoNCE, bank": [a, b], "BarlowTwins": [a, b], "KoLeo": [a]}
    return kinds.get(name, [a, labels])


def all_losses(order: list[int], sizes: tuple[int, ...], keys_from: str) -> list[float]:
    """On rows in another order, divided among the ranks in another way."""
    found = []
    for name, make in MADE.items():
        rows = (mine(x[order], sizes) for x in inputs_of(name))
        found.append(make(keys_from=keys_from, impl="chunked", chunk_size=3)(*rows).item())
    return found


@settings(max_examples=6, deadline=None)
@given(
    order=st.permutations(range(12)),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    keys_from=st.sampled_from(["gather", "ring"]),
)
def test_order_of_rows_and_ranks_changes_nothing(order, cuts, keys_from):
    ends = [0, *sorted(cuts), 12]
    sizes = tuple(b - a for a, b in itertools.pairwise(ends))
    expected = [make()(*inputs_of(name)).item() for name, make in MADE.items()]
    for found in run_ranks(all_losses, len(sizes), order, sizes, keys_from):
        assert found == pytest.approx(expected, abs=1e-10)


def local_batches() -> list[float]:
    rows = {name: [mine(x, (6, 6)) for x in inputs_of(name)] for name in MADE}
    return [make(keys_from="local")(*rows[name]).item() for name, make in MADE.items()]


def test_local_keys_compare_within_each_rank():
    halves = []
    for half in (slice(0, 6), slice(6, 12)):
        halves.append([make()(*(x[half] for x in inputs_of(n))).item() for n, make in MADE.items()])
    found, _ = run_ranks(local_batches, 2)
    for place, name in enumerate(MADE):
        if not name.startswith(("SupCon", "Triplet")):  # whose means are over rows that count
            assert found[place] == pytest.approx((halves[0][place] + halves[1][place]) / 2), name


def local_supcon(labels: list[int]) -> float:
    return losses.SupCon(keys_from="local")(*(mine(x, (6, 6)) for x in labelled(labels))).item()


def labelled(labels: list[int]) -> tuple[Tensor, Tensor]:
    return two_views()[0], torch.tensor(labels)


def test_local_supcon_weighs_rows_that_have_a_positive():
    labels = [0, 0, 1, 2, 3, 4, 0, 0, 1, 1, 2, 2]  # of the first rank's rows only two have one
    x, y = labelled(labels)
    halves = [losses.SupCon()(x[half], y[half]).item() for half in (slice(0, 6), slice(6, 12))]
    expected = (2 * halves[0] + 6 * halves[1]) / 8
    assert run_ranks(local_supcon, 2, labels) == pytest.approx([expected, expected])


def groups_across_ranks(keys_from: str) -> tuple[Tensor, Tensor]:
    negative, positive = grouped_points()
    if keys_from != "local":  # rows of every group are spread over the ranks
        n, p = (x.split([2, 4], dim=1)[dist.get_rank()] for x in (negative, positive))
    else:  # whole groups on one rank
        n, p = (mine(x, (1, 2)) for x in (negative, positive))
    n.requires_grad_()
    loss = losses.ContrastiveForce(preset="seed", keys_from=keys_from, impl="chunked")
    value = loss(n, p.requires_grad_())
    value.backward()
    return value.detach(), n.grad


def grouped_points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    n, p = (torch.randn(3, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return n, p + 0.5


@pytest.mark.parametrize(("keys_from", "dim"), [("gather", 1), ("ring", 1), ("local", 0)])
def test_groups_over_ranks(keys_from, dim):
    n, p = (x.requires_grad_() for x in grouped_points())
    loss = losses.ContrastiveForce(preset="seed")(n, p)
    loss.backward()
    results = run_ranks(groups_across_ranks, 2, keys_from)
    for value, _ in results:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-9, atol=0)
    # Every rank holds W times its share: the mean that DDP takes is exact.
    joined = torch.cat([grad for _, grad in results], dim=dim) / 2
    torch.testing.assert_close(joined, n.grad, rtol=1e-9, atol=1e-12)
