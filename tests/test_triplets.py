"""Weights of triplets against literal loops over them, whose derivative autograd takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_contrastive.pairwise.triplets import all_triplets, semihard_triplets

DTYPES = [torch.float32, torch.float64]
POSITIVE, NEGATIVE, NEITHER = 0, 1, 2


def loop_all(d, positives, negatives, margin):
    return [d[p] + margin - d[n] for p in positives for n in negatives]


def loop_semihard(d, positives, negatives, margin):
    costs = []
    for p in positives if negatives else []:
        farther = [n for n in negatives if d[n] > d[p]]
        # min and max return the first of equals.
        n = min(farther, key=d.__getitem__) if farther else max(negatives, key=d.__getitem__)
        costs.append(d[p] + margin - d[n])
    return costs


LOSSES = [(all_triplets, loop_all), (semihard_triplets, loop_semihard)]


def check(ours, loop, d, kind, margin):
    """Every row of ours equals the loop: value, derivative, counts."""
    found = ours(d, kind == POSITIVE, kind == NEGATIVE, margin)
    assert found.weight.dtype == d.dtype
    assert found.weight.shape == d.shape
    assert found.active.shape == found.valid.shape == d.shape[:1]
    for i, row in enumerate(d.clone().requires_grad_()):
        columns = [(kind[i] == k).nonzero().flatten().tolist() for k in (POSITIVE, NEGATIVE)]
        costs = loop(row, *columns, margin)
        total = sum((cost.relu() for cost in costs), start=0 * row.sum())
        derivative = torch.autograd.grad(total, row)[0]
        assert torch.equal(found.weight[i], derivative)
        assert found.active[i] == sum(cost.item() > 0 for cost in costs)
        assert found.valid[i] == len(costs)
        value = found.weight[i].double() @ d[i].double() + margin * found.active[i]
        assert value.item() == pytest.approx(total.item(), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(("ours", "loop"), LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [0.0, 0.2, 5.0])
def test_weights_equal_the_loop(ours, loop, dtype, margin):
    d = torch.rand(6, 12, dtype=dtype) * 2
    kind = torch.randint(3, (6, 12))
    kind[0], kind[1], kind[2] = POSITIVE, NEGATIVE, NEITHER
    check(ours, loop, d, kind, margin)


@pytest.mark.parametrize(("ours", "loop"), LOSSES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(0, 9),
    levels=st.sampled_from([1, 2, 4, 40]),
    margin=st.sampled_from([0.0, 0.25, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_ties(ours, loop, rows, columns, levels, margin, dtype, seed):
    """With few levels, distances tie, with each other and across a margin of 0.25 or 1."""
    random = torch.Generator().manual_seed(seed)
    d = torch.randint(levels, (rows, columns), generator=random).to(dtype) / 4
    kind = torch.randint(3, (rows, columns), generator=random)
    check(ours, loop, d, kind, margin)


def test_semihard_chooses_as_written():
    """One anchor; positives at 1 and 5, negatives at 2, 2, 3 and 0.5, and the anchor itself."""
    d = torch.tensor([[0.0, 1, 5, 3, 2, 2, 0.5]])
    kind = torch.tensor([[NEITHER, POSITIVE, POSITIVE, *[NEGATIVE] * 4]])
    found = semihard_triplets(d, kind == POSITIVE, kind == NEGATIVE, 1.5)
    # 1 takes the first at 2; nothing is beyond 5, which takes the farthest, at 3.
    assert found.weight.tolist() == [[0, 1, 1, -1, -1, 0, 0]]
    assert (found.active.item(), found.valid.item()) == (2, 2)


@pytest.mark.parametrize("ours", [all_triplets, semihard_triplets])
def test_transposed_distances(ours):
    d, is_positive = torch.rand(7, 5), torch.rand(7, 5) < 0.5
    found = ours(d.T, is_positive.T, ~is_positive.T, 0.3)
    expected = ours(d.T.contiguous(), is_positive.T, ~is_positive.T, 0.3)
    assert torch.equal(found.weight, expected.weight)


def test_counts_beyond_fp32_are_exact():
    num = 2 * 4099  # 4099 is a prime: 4099**2 is odd and above 2**24
    is_positive = torch.arange(num) < num // 2
    d = is_positive.float()[None]
    found = all_triplets(d, is_positive[None], ~is_positive[None], 0.5)
    assert found.active.item() == found.valid.item() == 4099**2
    assert torch.equal(found.weight, torch.where(is_positive, 4099.0, -4099.0)[None])


@pytest.mark.parametrize("ours", [all_triplets, semihard_triplets])
def test_no_matrix_of_triplets(ours):
    """1024 x 1024 x 1024 distances would take 4 GiB."""
    d = torch.rand(1024, 1024)
    is_positive = torch.rand(1024, 1024) < 0.5
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            tensors = out if isinstance(out, tuple) else (out,)
            sizes = [x.numel() for x in tensors if isinstance(x, torch.Tensor)]
            largest = max(largest, *sizes, 0)
            return out

    with Watch():
        ours(d, is_positive, ~is_positive, 0.3)
    assert 0 < largest <= 1024 * 1024
