"""Memory of the losses, backward included: how it grows with the global batch.

    python benchmarks/memory.py [--sizes 2048 4096 8192 16384] [--dim 64]

One process, fp32, on Linux. Every measurement is a process of its own: the peak of its resident
memory during forward and backward minus what it held before. Freed blocks go back to the system at
once (MALLOC_MMAP_THRESHOLD_), so that the peak is what was in use, not what the heap had kept. The
slope is that of a line through log(memory) over log(batch): 1 is linear, 2 quadratic.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

LOSSES = ("infonce symmetric", "ntxent", "force drift", "force seed")
DENSE_LIMIT = 8192  # rows; beyond it the dense matrices would not fit beside other work


def main() -> None:
    """Measure every loss, dense and chunked, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, impl, size = args.one
        print(json.dumps(peak_mib(name, impl, int(size), args.dim)))
        return
    print(f"{'loss':18} {'impl':8} " + " ".join(f"{size:>8}" for size in args.sizes) + "  slope")
    for name in LOSSES:
        for impl in ("dense", "chunked"):
            report(name, impl, args.sizes, args.dim)


def report(name: str, impl: str, sizes: list[int], dim: int) -> None:
    """One line of the table, in MiB."""
    limit = DENSE_LIMIT // (2 if name.startswith(("force", "ntxent")) else 1)
    sizes = [size for size in sizes if impl == "chunked" or size <= limit]
    peaks = [in_own_process(name, impl, size, dim) for size in sizes]
    slope = np.polyfit(np.log(sizes), np.log(peaks), 1)[0]
    print(f"{name:18} {impl:8} " + " ".join(f"{x:8.1f}" for x in peaks) + f"  {slope:.2f}")


def in_own_process(name: str, impl: str, size: int, dim: int) -> float:
    """Peak in MiB, measured in a fresh process."""
    argv = [sys.executable, __file__, "--dim", str(dim), "--one", name, impl, str(size)]
    give_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(argv, check=True, capture_output=True, env=give_back)
    return float(json.loads(done.stdout))


def peak_mib(name: str, impl: str, size: int, dim: int) -> float:
    """Growth of the peak resident memory over forward and backward with `size` rows."""
    import torch

    torch.set_num_threads(1)
    loss = build(name, impl)
    for rows in (64, size):  # the small call first, for what is allocated once and for all
        a, b = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))
        # Not getrusage: its maximum is inherited from the process that started this one.
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = own_memory_kib("VmRSS")
        loss(a, b).backward()
    return (own_memory_kib("VmHWM") - before) / 1024


def own_memory_kib(name: str) -> int:
    """A line of this process's status: VmRSS is the memory it holds, VmHWM the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def build(name: str, impl: str):
    """The loss by the name it has in the table."""
    from dist_contrastive import losses

    if name.startswith("infonce"):
        return losses.InfoNCE(0.1, symmetric=True, learnable=True, impl=impl)
    if name == "ntxent":
        return losses.NTXent(0.1, impl=impl)
    return losses.ContrastiveForce(preset=name.split()[1], impl=impl)


if __name__ == "__main__":
    main()
