"""Reductions over tiles of the score matrix, which are computed again in backward.

Memory is a few tiles plus the inputs and their gradients: linear in rows + keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 1024 x 1024 fp32 scores are 4 MiB: large enough for the matrix product, small beside the inputs.
_DEFAULT_CHUNK = 1024


def chunks(whole: slice, chunk_size: int | None) -> Iterator[slice]:
    """Slices of at most `chunk_size` that cover the whole."""
    step = chunk_size or _DEFAULT_CHUNK
    for begin in range(whole.start, whole.stop, step):
        yield slice(begin, min(begin + step, whole.stop))


def logsumexp(
    rows: Tensor, keys: Tensor, exclude: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """See `pairwise.logsumexp`."""
    return _LogSumExp.apply(rows, keys, exclude, chunk_size)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, exclude: Tensor | None, chunk_size: int | None
    ) -> tuple[Tensor, Tensor]:
        row_lse = rows.new_full((rows.shape[0],), -torch.inf)
        key_lse = keys.new_full((keys.shape[0],), -torch.inf)
        for r, k in _tiles(rows, keys, chunk_size):
            scores = _scores(rows, keys, exclude, r, k)
            row_lse[r] = torch.logaddexp(row_lse[r], scores.logsumexp(1))
            key_lse[k] = torch.logaddexp(key_lse[k], scores.logsumexp(0))
        ctx.save_for_backward(rows, keys, exclude, row_lse, key_lse)
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        return row_lse, key_lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_row: Tensor | None, grad_key: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows, keys, exclude, row_lse, key_lse = ctx.saved_tensors
        grad_rows, grad_keys = torch.zeros_like(rows), torch.zeros_like(keys)
        with torch.autocast(rows.device.type, enabled=False):
            for r, k in _tiles(rows, keys, ctx.chunk_size):
                scores = _scores(rows, keys, exclude, r, k)
                # dL/dscore: the softmax weights of both directions.
                slope = torch.zeros_like(scores)
                if grad_row is not None:
                    slope += (scores - row_lse[r, None]).exp_() * grad_row[r, None]
                if grad_key is not None:
                    slope += (scores - key_lse[k]).exp_() * grad_key[k]
                grad_rows[r] += slope @ keys[k]
                grad_keys[k] += slope.T @ rows[r]
        return grad_rows, grad_keys, None, None


def _tiles(rows: Tensor, keys: Tensor, chunk_size: int | None) -> Iterator[tuple[slice, slice]]:
    for r in chunks(slice(0, rows.shape[0]), chunk_size):
        for k in chunks(slice(0, keys.shape[0]), chunk_size):
            yield r, k


def _scores(rows: Tensor, keys: Tensor, exclude: Tensor | None, r: slice, k: slice) -> Tensor:
    scores = rows[r] @ keys[k].T
    if exclude is not None:
        number = torch.arange(k.start, k.stop, device=keys.device)
        scores.masked_fill_(exclude[r, None] == number, -torch.inf)
    return scores
