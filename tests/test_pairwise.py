"""Tiles against the dense specification: values, gradients, extremes."""

import pytest
import torch

from dist_contrastive import pairwise
from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise.distances import centre, distances


def worst(found: torch.Tensor, expected: torch.Tensor) -> str:
    place = (found - expected).abs().argmax()
    return f"worst: {found.flatten()[place]} instead of {expected.flatten()[place]}"


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64, None])
@pytest.mark.parametrize("excluding", [False, True])
def test_chunked_logsumexp_equals_dense(chunk_size, excluding):
    rows = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    exclude = torch.tensor([0, 9, 3, 3, -1, 5, 2]) if excluding else None
    weights = torch.randn(7, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    results = []
    for impl in ("dense", "chunked"):
        row_lse, key_lse = pairwise.logsumexp(rows, keys, exclude, impl, chunk_size)
        loss = row_lse @ weights[0] + key_lse @ weights[1]
        results.append([row_lse, key_lse, *torch.autograd.grad(loss, [rows, keys])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    exclude = torch.tensor([0, 1, 2, 3])

    def both(rows, keys):
        return pairwise.logsumexp(rows, keys, exclude, "chunked", 2)

    assert torch.autograd.gradcheck(both, [rows, keys])


def test_one_direction_alone():
    rows = torch.randn(4, 3, requires_grad=True)
    keys = torch.randn(5, 3)
    expected = torch.autograd.grad((rows @ keys.T).logsumexp(0).sum(), rows)[0]
    key_lse = pairwise.logsumexp(rows, keys, impl="chunked", chunk_size=2)[1]
    torch.testing.assert_close(torch.autograd.grad(key_lse.sum(), rows)[0], expected)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 100.0, 1e4])
def test_large_and_small_scores_stay_finite(impl, factor):
    rows = (torch.randn(9, 8) * factor).requires_grad_()
    keys = torch.randn(11, 8, requires_grad=True)
    row_lse, key_lse = pairwise.logsumexp(rows, keys, impl=impl, chunk_size=4)
    (row_lse.sum() + key_lse.sum()).backward()
    for x in (row_lse, key_lse, rows.grad, keys.grad):
        assert x.isfinite().all()


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_no_rows_and_nothing_counted(impl):
    keys = torch.randn(3, 4, requires_grad=True)
    row_lse, key_lse = pairwise.logsumexp(torch.zeros(0, 4), keys, impl=impl)
    assert row_lse.shape == (0,)
    assert (key_lse == -torch.inf).all()


def test_scores_are_fp32_inside_autocast():
    rows, keys = torch.randn(6, 16), torch.randn(6, 16)
    expected = pairwise.logsumexp(rows * 20, keys, impl="dense")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl in ("dense", "chunked"):
            assert torch.equal(pairwise.logsumexp(rows * 20, keys, impl=impl)[0], expected)


def test_unknown_impl():
    with pytest.raises(ConfigError, match=r"impl='fast' is not known; use one of auto, dense"):
        pairwise.logsumexp(torch.zeros(2, 2), torch.zeros(2, 2), impl="fast")


@pytest.mark.parametrize("dim", [1, 2, 64, 512])
def test_distances_of_near_and_equal_points(dim):
    x = torch.randn(1, 20, dim, dtype=torch.float64) + 3
    x[0, 5] = x[0, 4]  # equal
    x[0, 7] = x[0, 6] + 1e-5  # nearly equal
    x[0, 8] = 0
    exact = (x[:, :, None] - x[:, None]).norm(dim=-1)
    x32 = x.float()
    found = distances(*centre(x32, x32)).double()
    assert (found[0].diagonal() == 0).all()
    assert found[0, 4, 5] == 0
    exact32 = (x32.double()[:, :, None] - x32.double()[:, None]).norm(dim=-1)
    torch.testing.assert_close(found, exact32, rtol=2e-5, atol=1e-6, msg=worst(found, exact))


def test_distances_of_a_collapsed_cloud():
    """All points close together: the product form has no correct digit left there."""
    x = 1e-3 * torch.randn(2, 50, 16) + 1000 * torch.ones(16)
    exact = (x.double()[:, :, None] - x.double()[:, None]).norm(dim=-1)
    torch.testing.assert_close(distances(x, x).double(), exact, rtol=1e-5, atol=1e-7)
