"""Rounding errors of losses and gradients, chunked, against dense code in plain torch.

    python benchmarks/precision.py [--rows 512] [--dim 128] [--draws 8]

One process, on CPU. Embeddings are given in fp32, bf16 or fp16. Ours compares them tile by tile;
the dense code is the formula on the whole matrix, computed in the dtype of the embeddings from end
to end. The reference is the dense code in fp64 on the same rounded embeddings. Errors are relative
(norm of the difference over the norm), and root mean squares over draws of the embeddings.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from dist_contrastive import losses
from dist_contrastive.losses import PairLoss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (14.0, 50.0, 100.0)
TILE = 128  # several tiles even with few rows, so that adding them up counts
BIAS = -10.0

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Errors(NamedTuple):
    """Relative errors: of the loss, and of its derivatives."""

    loss: float
    embeddings: float
    log_scale: float


def main() -> None:
    """Measure every loss, dtype and scale, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--draws", type=int, default=8)
    args = parser.parse_args()
    print("| loss | dtype | scale | loss: ours / dense | embeddings' gradient | scale's gradient |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in DENSE:
        for dtype in DTYPES:
            for scale in SCALES:
                ours, dense = errors(name, dtype, scale, args.rows, args.dim, args.draws)
                cells = [f"{x:.1e} / {y:.1e}" for x, y in zip(ours, dense, strict=True)]
                row = [name, str(dtype).removeprefix("torch."), f"{scale:g}", *cells]
                print(f"| {' | '.join(row)} |")


def errors(
    name: str, dtype: torch.dtype, scale: float, rows: int = 512, dim: int = 128, draws: int = 8
) -> tuple[Errors, Errors]:
    """Root-mean-square errors of ours and of the dense code, see the head of this file.

    Args:
        name: a key of DENSE. dtype: of the embeddings. scale: 1 / temperature; all keep its
            logarithm in fp32.
        rows, dim: shape of the embeddings. draws: how often they are drawn.
    """
    log_scale = torch.tensor(scale).log()
    both = chunked(name), DENSE[name]
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(draws):
        a, b = (x.to(dtype) for x in embeddings(rows, dim, seed))
        exact = results(DENSE[name], a.double(), b.double(), log_scale.double())
        for square, loss in zip(squares, both, strict=True):
            square += relative(results(loss, a, b, log_scale), exact).square()
    ours, dense = (squares / draws).sqrt().tolist()
    return Errors(*ours), Errors(*dense)


def embeddings(rows: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two modalities; those of a sample have a cosine of about 0.3, other pairs of about 0."""
    random = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, rows, dim, generator=random)
    return a, 0.3 * a + noise


def results(loss: Loss, a: Tensor, b: Tensor, log_scale: Tensor) -> list[Tensor]:
    """Loss, gradient of both embeddings [2, rows, dim], gradient of log(scale)."""
    inputs = [x.clone().requires_grad_() for x in (a, b, log_scale)]
    value = loss(*inputs)
    grad_a, grad_b, grad_scale = torch.autograd.grad(value, inputs)
    return [value.detach(), torch.stack([grad_a, grad_b]), grad_scale]


def relative(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """[3] fp64: norm of the difference over the norm."""
    pairs = zip(found, exact, strict=True)
    return torch.stack([(x.double() - y).norm() / y.norm() for x, y in pairs])


def chunked(name: str) -> Loss:
    """Ours by the name it has in the table, as a function of its log_scale too."""
    options: dict[str, Any] = {"impl": "chunked", "chunk_size": TILE}
    module: PairLoss
    if name == "SigLIP":
        module = losses.SigLIP(bias=BIAS, **options)
    else:
        module = losses.InfoNCE(symmetric=True, learnable=True, **options)
    return lambda a, b, log_scale: functional_call(module, {"scale.log_scale": log_scale}, (a, b))


def dense_infonce(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss in the dtype of the embeddings."""
    x, y = normalize(a), normalize(b)
    logits = log_scale.exp().to(x.dtype) * x @ y.T
    labels = torch.arange(len(a))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def dense_siglip(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """SigLIP's loss in the dtype of the embeddings."""
    x, y = normalize(a), normalize(b)
    logits = log_scale.exp().to(x.dtype) * x @ y.T + BIAS
    sign = 2 * torch.eye(len(a), dtype=x.dtype) - 1
    return -logsigmoid(sign * logits).sum(1).mean()


DENSE: dict[str, Loss] = {"InfoNCE": dense_infonce, "SigLIP": dense_siglip}


if __name__ == "__main__":
    main()
