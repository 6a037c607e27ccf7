"""Rounding errors of chunked losses and gradients: no worse than those of dense code."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import precision

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
