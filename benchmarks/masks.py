"""What leaving false negatives out costs: InfoNCE with masks against InfoNCE without, on a CPU.

    python benchmarks/masks.py [--batch 4096] [--dim 512] [--pairs 7]

One process of one thread, fp32, chunked, forward and backward. Ids are those of pairs of samples. A
ratio is the median over neighbouring steps with and without masks, so that a busy machine slows
both sides of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dist_contrastive import losses

SETTINGS = {  # by name: settings of the loss, and whether it gets ids
    "ids": ({}, True),
    "margin": ({"false_negative_margin": 0.1}, False),
    "ids, margin, ratio": ({"false_negative_margin": 0.1, "false_negative_ratio": 0.95}, True),
}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7, help="timed steps of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    queries = torch.randn(args.batch, args.dim, requires_grad=True)
    keys = torch.randn(args.batch, args.dim).add_(queries.detach()).requires_grad_()
    ids = torch.arange(args.batch) // 2
    print("| InfoNCE | s without masks | s with masks | ratio |")
    print("| --- | --- | --- | --- |")
    for symmetric in (False, True):
        for name, (settings, has_ids) in SETTINGS.items():
            plain = losses.InfoNCE(0.07, symmetric, impl="chunked")
            masked = losses.InfoNCE(0.07, symmetric, impl="chunked", **settings)
            given = {"ids": ids} if has_ids else {}
            times = compared(
                plain, lambda q, k, f=masked, g=given: f(q, k, **g), [queries, keys], args.pairs
            )
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            of_both = " | ".join(f"{statistics.median(x):.2f}" for x in times)
            print(f"| {'symmetric, ' if symmetric else ''}{name} | {of_both} | {ratio:.2f} |")


def compared(
    plain: Callable[..., Tensor], masked: Callable[..., Tensor], views: list[Tensor], pairs: int
) -> tuple[list[float], list[float]]:
    """Seconds of steps of both, one after the other; the first of each does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs + 1):
        for loss, found in zip((plain, masked), times, strict=True):
            begin = time.perf_counter()
            torch.autograd.grad(loss(*views), views)
            found.append(time.perf_counter() - begin)
    return times[0][1:], times[1][1:]


if __name__ == "__main__":
    main()
