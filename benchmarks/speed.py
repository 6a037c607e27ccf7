"""Time and memory of a step of CLIP's loss: chunked, against dense code on each rank's own rows.

    python benchmarks/speed.py [--batch 16384] [--dim 512] [--pairs 5]

Two gloo ranks of one thread each, fp32, on Linux: symmetric InfoNCE with a learnable temperature,
forward and backward of embeddings. The baseline is what open_clip recommends (local_loss with
gather_with_grad): a rank gathers both modalities with their gradient, and keeps the two matrices of
its own rows' scores with all keys. Times are those of the slower rank, the ratio the median over
pairs of neighbouring steps, so that a busy machine slows both sides of a ratio. Memory is measured
in other processes, as in memory.py, since giving freed blocks back at once costs time.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from memory import growth_mib
from torch import Tensor, nn

from dist_contrastive import collectives, losses
from dist_contrastive.pairwise import KEYS_FROM
from dist_contrastive.testing import run_ranks

RANKS = 2
TEMPERATURE = 0.07
BASELINE = "dense"
OURS = [name for name in KEYS_FROM if name != "local"]  # every way to reach the keys of all ranks
LIMIT_S = 3600.0


def main() -> None:
    """Measure the baseline and ours, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16384, help="rows over all ranks")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5, help="timed steps of each")
    parser.add_argument("--one", choices=[BASELINE, *OURS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        peaks = run_ranks(peak_mib, RANKS, args.one, args.batch, args.dim, timeout_s=LIMIT_S)
        print(json.dumps(max(peaks)))
        return
    times, differences = zip(
        *run_ranks(timed, RANKS, args.batch, args.dim, args.pairs, timeout_s=LIMIT_S), strict=True
    )
    peaks = [peak_in_own_process(name, args.batch, args.dim) for name in (BASELINE, *OURS)]
    report(np.max(times, axis=0), np.max(differences, axis=0), peaks)


def report(times: np.ndarray, differences: np.ndarray, peaks: list[float]) -> None:
    """Print the table.

    Args:
        times: [losses, repetitions] in s. differences: [losses, 4], see `compared`.
        peaks: [losses] in MiB. The baseline comes first in each.
    """
    print("| keys_from | s dense / ours | ratio | MiB dense / ours | ratio | loss / grads differ |")
    print("| --- | --- | --- | --- | --- | --- |")
    for i, name in enumerate(OURS, start=1):
        took = f"{np.median(times[0]):.2f} / {np.median(times[i]):.2f}"
        ratio = f"{np.median(times[0] / times[i]):.2f}"
        memory = f"{peaks[0]:.0f} / {peaks[i]:.0f} | 1/{peaks[0] / peaks[i]:.1f}"
        differs = f"{differences[i][0]:.0e} / {max(differences[i][1:]):.0e}"
        print(f"| {name} | {took} | {ratio} | {memory} | {differs} |")


def timed(batch: int, dim: int, pairs: int) -> tuple[list[list[float]], list[list[float]]]:
    """On a rank: seconds of every step, and how results differ from the baseline's.

    Both have one list for each loss, the baseline first.
    """
    embeddings = local_rows(batch, dim)
    all_losses = [build(name) for name in (BASELINE, *OURS)]
    times: list[list[float]] = [[] for _ in all_losses]
    for loss in all_losses:
        step(loss, local_rows(batch // 8, dim))  # the warm-up
    for _ in range(pairs):
        results = []
        for loss, its_times in zip(all_losses, times, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            results.append(step(loss, embeddings))
            its_times.append(time.perf_counter() - begin)
    return times, [compared(found, results[0]) for found in results]


def compared(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norm of the difference over the norm, of each of the results of `step`."""
    differences = []
    for x, y in zip(found, expected, strict=True):
        if x.dim() == 0:  # of the baseline's, the mean over ranks counts
            x, y = (collectives.all_reduce_sum(value) for value in (x, y))
        differences.append(((x - y).norm() / y.norm()).item())
    return differences


def peak_in_own_process(name: str, batch: int, dim: int) -> float:
    """Peak in MiB of a rank, measured where freed blocks go back to the system at once."""
    argv = [sys.executable, __file__, "--batch", str(batch), "--dim", str(dim), "--one", name]
    give_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=give_back)
    return float(json.loads(done.stdout))


def peak_mib(name: str, batch: int, dim: int) -> float:
    """On a rank: growth of its peak resident memory over forward and backward."""
    return growth_mib(build(name), lambda rows: local_rows(rows, dim), batch)


def local_rows(batch: int, dim: int) -> list[Tensor]:
    """This rank's rows of two modalities that resemble each other, as leaf tensors."""
    rows = batch // RANKS
    torch.manual_seed(dist.get_rank())
    images = torch.randn(rows, dim)
    texts = torch.randn(rows, dim).add_(images, alpha=0.5)
    return [images.requires_grad_(), texts.requires_grad_()]


def step(loss: nn.Module, embeddings: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients: of this rank's images, of its texts, of log(1 / temperature)."""
    value = loss(*embeddings)
    return [value.detach(), *torch.autograd.grad(value, [*embeddings, *loss.parameters()])]


def build(name: str) -> nn.Module:
    """The baseline, or InfoNCE with keys_from=name."""
    if name == BASELINE:
        return DenseLocalLoss()
    return losses.InfoNCE(
        TEMPERATURE, symmetric=True, learnable=True, impl="chunked", keys_from=name
    )


class DenseLocalLoss(nn.Module):
    """CLIP's loss in plain torch, each rank with the rows of its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """The mean over this rank's samples: losses of ranks differ, their mean is the loss."""
        images, texts = nn.functional.normalize(images), nn.functional.normalize(texts)
        all_images, offset = collectives.all_gather_rows(images)
        all_texts, _ = collectives.all_gather_rows(texts)
        labels = torch.arange(len(images)) + offset
        scale = self.log_scale.exp()
        of_images = nn.functional.cross_entropy(scale * images @ all_texts.T, labels)
        of_texts = nn.functional.cross_entropy(scale * texts @ all_images.T, labels)
        return (of_images + of_texts) / 2


if __name__ == "__main__":
    main()
