"""Rounding errors of the contrastive force and of its loss's gradient, against dense code.

    python benchmarks/force_precision.py [--points 512] [--draws 4] [--dims 8 64 256]

One process, on CPU. Points are given in fp32, bf16 or fp16. Ours compares them tile by tile; the
dense code of force_baselines.py computes in their dtype from end to end. The reference is the dense
code in fp64 on the same rounded points. Errors are relative (norm of the difference over the norm),
and root mean squares over draws of the points; nan where some draw gave no number. The force is the
sum over all temperatures of a preset, at a mean distance of about 1.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from force_baselines import Loss, clouds, paper_force, paper_loss, seed_force, seed_loss
from precision import relative
from torch import Tensor

from dist_contrastive import losses
from dist_contrastive.losses.force import PRESETS, Preset

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 128  # several tiles even of few points, so that adding them up counts


class Code(NamedTuple):
    """Functions of generated points and data."""

    force: Callable[[Tensor, Tensor], Tensor]
    loss: Loss


class Errors(NamedTuple):
    """Relative errors."""

    force: float
    gradient: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every preset, dtype and dimension, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 64, 256])
    args = parser.parse_args(arguments)
    print("| preset | dtype | D | force: ours / dense | gradient: ours / dense |")
    print("| --- | --- | --- | --- | --- |")
    for preset in DENSE:
        for dtype in DTYPES:
            for dim in args.dims:
                both = errors(preset, dtype, dim, args.points, args.draws)
                cells = [f"{ours:.1e} / {dense:.1e}" for ours, dense in zip(*both, strict=True)]
                name = str(dtype).removeprefix("torch.")
                print(f"| {preset} | {name} | {dim} | {' | '.join(cells)} |")


def errors(
    preset: Preset, dtype: torch.dtype, dim: int, points: int = 512, draws: int = 4
) -> tuple[Errors, Errors]:
    """Errors of ours and of the dense code, see the head of this file.

    Args:
        dtype: of the points. points: generated ones, and as many of data. draws: of the points.
    """
    loss = losses.ContrastiveForce(preset=preset, impl="chunked", chunk_size=TILE)
    ours = Code(loss.force, loss)
    squares = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(draws):
        negative, positive = (x.detach() for x in clouds((points, dim), seed=seed))
        scale = torch.cdist(negative, positive).mean()
        n, p = ((x / scale).to(dtype) for x in (negative, positive))
        exact = results(DENSE[preset], n.double(), p.double())
        for square, code in zip(squares, (ours, DENSE[preset]), strict=True):
            square += relative(results(code, n, p), exact).square()
    mine, theirs = (squares / draws).sqrt().tolist()
    return Errors(*mine), Errors(*theirs)


def results(code: Code, negative: Tensor, positive: Tensor) -> list[Tensor]:
    """The force on the generated points, and the gradient of the loss by them."""
    given = negative.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(code.loss(given, positive), [given])
    return [code.force(negative, positive), gradient]


def dense_drift_force(negative: Tensor, positive: Tensor) -> Tensor:
    """Sum over the temperatures of the preset."""
    total = torch.zeros_like(negative)
    for temperature in PRESETS["drift"].temperatures:
        total += seed_force(positive, negative, temperature, masked=True)
    return total


def dense_paper_force(negative: Tensor, positive: Tensor) -> Tensor:
    """Sum over the temperatures of the preset."""
    return paper_force(positive, negative, PRESETS["paper"].temperatures)


DENSE: dict[Preset, Code] = {
    "drift": Code(dense_drift_force, partial(seed_loss, masked=True, with_graph=False)),
    "paper": Code(dense_paper_force, paper_loss),
}


if __name__ == "__main__":
    main()
