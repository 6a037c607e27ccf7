"""Rounding errors of losses and gradients: no worse than those of dense code in the same dtype."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import precision

from dist_contrastive import losses
from dist_contrastive.audit import CASES, Case

# Over other draws the errors of gradients move by some 2%; single numbers are right or wrong by
# one rounding, whatever computed them.
SLACK = 1.05
ROUNDING = 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", precision.DENSE)
@pytest.mark.parametrize("dtype", precision.DTYPES)
@pytest.mark.parametrize("scale", precision.SCALES)
def test_no_worse_than_dense_code_in_the_same_dtype(name, dtype, scale):
    ours, dense = precision.errors(name, dtype, scale)
    for quantity, error in ours._asdict().items():
        assert error <= max(SLACK * getattr(dense, quantity), ROUNDING), quantity


@pytest.mark.parametrize("name", precision.DENSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_costs_one_rounding_of_the_gradient(name, dtype):
    """Everything between the inputs and the gradient that is handed back is fp32."""
    ours, _ = precision.errors(name, dtype, 100.0)
    assert ours.loss <= 1e-6
    assert ours.log_scale <= 1e-5
    assert ours.embeddings <= torch.finfo(dtype).eps / 2


def gradients(case: Case, dtype: torch.dtype, inputs: list[Tensor], autocast: bool) -> list[Tensor]:
    """Value and slopes of a case's loss, of embeddings in a dtype and labels."""
    given = [x if x.dim() == 1 else x.detach().to(dtype).requires_grad_() for x in inputs]
    loss = case.loss(**case.settings, impl="chunked", chunk_size=4)
    first = len(given) - len(case.named)
    named = dict(zip(case.named, given[first:], strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = (loss.double() if dtype == torch.float64 else loss)(*given[:first], **named)
    value.backward()
    return [value.detach(), *(x.grad for x in given if x.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_computed_in_fp32(name, dtype, autocast):
    """Also under autocast: beside one rounding of the gradient there is nothing of a low dtype."""
    inputs = [x if x.dim() == 1 else x.to(dtype) for x in CASES[name].rows()]
    value, *found = gradients(CASES[name], dtype, inputs, autocast)
    exact, *slopes = gradients(CASES[name], torch.float64, inputs, autocast=False)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-5, abs=2e-6)
    for grad, slope in zip(found, slopes, strict=True):
        assert grad.dtype == dtype
        allowed = max(torch.finfo(dtype).eps, 1e-4)
        assert (grad.double() - slope).norm() <= allowed * slope.norm()


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_triplets_of_tight_classes(spread, mining, impl):
    """Near the end of training positives almost coincide: slopes are differences over distances."""
    labels = torch.arange(96) % 16
    x = torch.randn(16, 64)[labels] + spread * torch.randn(96, 64)
    loss = losses.Triplet(20.0, mining=mining, impl=impl, chunk_size=17)
    slopes = {}
    for dtype in (torch.float32, torch.float64):
        given = x.detach().to(dtype).requires_grad_()
        loss(given, labels).backward()
        slopes[dtype] = given.grad.double()
    error = (slopes[torch.float32] - slopes[torch.float64]).norm() / slopes[torch.float64].norm()
    assert error < 5e-7
