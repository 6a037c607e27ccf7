"""Sums of exponentials of a tile's scores, and softmax weights, with all the digits of fp32."""

import torch
from torch import Tensor

# A sum of 2**20 terms, each of which may have lost up to the smallest normal number.
LEAST_SUM = {
    dtype: torch.finfo(dtype).tiny * 2**20 / torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.float64)
}
MOST_SPREAD = 30.0


def without(x: Tensor, out: Tensor | None, value: float = 0.0) -> Tensor:
    """Numbers of the pairs [r, k], another value for those that are out."""
    return x if out is None else x.masked_fill(out, value)


def logsumexp(scores: Tensor, dim: int) -> Tensor:
    """Log-sum-exp in fp64 of scores in a lower precision."""
    if not scores.numel():
        return scores.logsumexp(dim).double()
    shift = scores.amax(dim, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, 0.0)
    return (scores - shift).exp_().sum(dim).double().log_().add_(shift.squeeze(dim))


def weighted_softmax(scores: Tensor, lse: Tensor, weight: Tensor) -> Tensor:
    """``weight * exp(scores - lse)``, 0 for rows or keys that have nothing to be compared with.

    Args:
        lse: fp64; what it has beyond the digits of the scores goes into the weight.
    """
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    shift = lse.to(scores.dtype)
    rest = torch.where(lse.isfinite(), shift - lse, 0.0).exp()
    return (scores - shift).exp_().mul_((weight * rest).to(scores.dtype))
