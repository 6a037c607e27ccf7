"""Tiles against the dense specification: values, gradients, extremes."""

import pytest
import torch

from dist_contrastive import pairwise
from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise import LogSumExp, LogSumExpAndPositives, Pairs, PairSum
from dist_contrastive.pairwise.distances import distances


def worst(found: torch.Tensor, expected: torch.Tensor) -> str:
    place = (found - expected).abs().argmax()
    return f"worst: {found.flatten()[place]} instead of {expected.flatten()[place]}"


def make_pairs(rows: torch.Tensor, keys: torch.Tensor, **more) -> Pairs:
    return Pairs(rows, keys, (len(keys),), **more)


class Cubes(PairSum):
    """A pair function that is no loss: the engine must not know what it sums."""

    def __repr__(self) -> str:
        return "Cubes()"

    def value(self, tile):
        return torch.where(tile.positive(), tile.scores**3, -tile.scores)

    def derivative(self, tile):
        return torch.where(tile.positive(), 3 * tile.scores**2, -1.0)


REDUCTIONS = [
    LogSumExp(),
    LogSumExp(both=True),
    LogSumExp(leave_out="own", both=True),
    LogSumExp(leave_out="similar"),
    LogSumExpAndPositives(leave_out="own"),
    Cubes(),
]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64, None])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("factor", [1.0, 60.0])  # 60: beyond what one exponential can span
def test_chunked_equals_dense(chunk_size, reduction, factor):
    rows = (factor * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    keys = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([0, 1, 0, 2, 1, 3, 4, 4, 1, 0])
    results = []
    for impl in ("dense", "chunked"):
        found = sum(
            pairwise.reduce(reduction, make_pairs(rows, keys, tags=tags), impl, chunk_size), ()
        )
        torch.manual_seed(0)
        loss = sum((x * torch.randn_like(x)).sum() for x in found)
        results.append([*found, *torch.autograd.grad(loss, [rows, keys])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_gradcheck(reduction):
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([0, 1, 0, 1, 1])

    def totals(rows, keys):
        return sum(pairwise.reduce(reduction, make_pairs(rows, keys, tags=tags), "chunked", 2), ())

    assert torch.autograd.gradcheck(totals, [rows, keys])


def test_keys_without_gradient():
    rows = torch.randn(4, 3, requires_grad=True)
    keys = torch.randn(5, 3)
    expected = torch.autograd.grad((rows @ keys.T).logsumexp(1).sum(), rows)[0]
    (row_lse,), _ = pairwise.reduce(LogSumExp(), make_pairs(rows, keys), "chunked", 2)
    torch.testing.assert_close(torch.autograd.grad(row_lse.sum(), rows)[0], expected)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 100.0, 1e4])
def test_large_and_small_scores_stay_exact(impl, factor):
    """One exponential serves both directions only where it keeps its digits: no error shows."""
    rows = (torch.randn(9, 8) * factor).requires_grad_()
    keys = torch.randn(11, 8, requires_grad=True)
    pairs = make_pairs(rows, keys)
    (row_lse,), (key_lse,) = pairwise.reduce(LogSumExp(both=True), pairs, impl, 4)
    (row_lse.sum() + key_lse.sum()).backward()
    exact = (rows.detach().double() @ keys.detach().double().T).requires_grad_()
    torch.testing.assert_close(row_lse.double(), exact.logsumexp(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(key_lse.double(), exact.logsumexp(0), rtol=1e-5, atol=1e-4)
    assert rows.grad.isfinite().all()
    assert keys.grad.isfinite().all()


def test_rows_of_very_different_scale():
    """The first row's scores are 500 below the others': its sum must not vanish beside them."""
    points = torch.tensor([[-5.0], [1.0], [2.0]]), torch.tensor([[100.0], [99.0], [98.0]])
    results = []
    for impl, dtype in (("dense", torch.float64), ("chunked", torch.float32)):
        rows, keys = (x.to(dtype).requires_grad_() for x in points)
        lse = sum(pairwise.reduce(LogSumExp(both=True), make_pairs(rows, keys), impl), ())
        results.append([*lse, *torch.autograd.grad(sum(x.sum() for x in lse), [rows, keys])])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0, -300.0])
def test_softmax_weights_sum_to_one(both, offset):
    """At scores of 100 the log-sum-exp in fp32 would be wrong by 4e-6, and every weight with it."""
    rows = (offset + 3 * torch.randn(50, 30)).requires_grad_()
    keys = torch.eye(30)
    pairs = make_pairs(rows, keys)
    row_lse = pairwise.reduce(LogSumExp(both=both), pairs, "chunked", 7)[0][0]
    weights = torch.autograd.grad(row_lse.sum(), rows)[0]
    assert (weights.double().sum(1) - 1).abs().max() < 5e-7


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_no_rows_and_nothing_counted(impl):
    keys = torch.randn(3, 4, requires_grad=True)
    pairs = make_pairs(torch.zeros(0, 4), keys)
    (row_lse,), (key_lse,) = pairwise.reduce(LogSumExp(both=True), pairs, impl)
    assert row_lse.shape == (0,)
    assert (key_lse == -torch.inf).all()


def test_scores_are_fp32_inside_autocast():
    pairs = make_pairs(20 * torch.randn(6, 16), torch.randn(6, 16))
    expected = pairwise.reduce(LogSumExp(), pairs, "dense")[0][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl in ("dense", "chunked"):
            assert torch.equal(pairwise.reduce(LogSumExp(), pairs, impl)[0][0], expected)


def test_unknown_impl():
    pairs = make_pairs(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"impl='fast' is not known; use one of auto, dense"):
        pairwise.reduce(LogSumExp(), pairs, impl="fast")


@pytest.mark.parametrize("distance", pairwise.DISTANCES.values())
def test_distances_and_their_gradients(distance):
    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.cat([torch.randn(5, 3, dtype=torch.float64), x[:1]])
    x, y = (distance.prepare(z).requires_grad_() for z in (x, y))
    weight = torch.randn(4, 6, dtype=torch.float64)
    dense = distance.dense(x, y)
    expected = torch.autograd.grad((dense * weight).sum(), [x, y])
    with torch.no_grad():
        d = distance.tile(x, y)
        torch.testing.assert_close(d, dense)
        for found, correct in zip(distance.gradients(x, y, d, weight), expected, strict=True):
            torch.testing.assert_close(found, correct)
        torch.testing.assert_close(distance.rowwise(x, y[:4]), dense.diagonal())


@pytest.mark.parametrize("dim", [1, 2, 64, 512])
def test_distances_of_near_and_equal_points(dim):
    x = torch.randn(1, 20, dim, dtype=torch.float64) + 3
    x[0, 5] = x[0, 4]  # equal
    x[0, 7] = x[0, 6] + 1e-5  # nearly equal
    x[0, 8] = 0
    exact = (x[:, :, None] - x[:, None]).norm(dim=-1)
    x32 = x.float()
    found = distances(x32, x32).double()
    assert (found[0].diagonal() == 0).all()
    assert found[0, 4, 5] == 0
    exact32 = (x32.double()[:, :, None] - x32.double()[:, None]).norm(dim=-1)
    torch.testing.assert_close(found, exact32, rtol=2e-5, atol=1e-6, msg=worst(found, exact))


def test_distances_of_a_collapsed_cloud():
    """All points close together: the product form has no correct digit left there."""
    x = 1e-3 * torch.randn(2, 50, 16) + 1000 * torch.ones(16)
    exact = (x.double()[:, :, None] - x.double()[:, None]).norm(dim=-1)
    torch.testing.assert_close(distances(x, x).double(), exact, rtol=1e-5, atol=1e-7)
