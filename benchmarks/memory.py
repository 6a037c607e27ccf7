"""Memory of the losses, backward included: how it grows with the global batch.

    python benchmarks/memory.py [--sizes 2048 4096 8192 16384] [--dim 64] [--losses LOSS ...]

One process, fp32, on Linux. Every line is measured in a process of its own: the peak of its
resident memory during forward and backward minus what it held before. Freed blocks go back at
once (MALLOC_MMAP_THRESHOLD_), so that the peak is what was in use, not what the heap kept. The
slope is that of a line through log(memory) over log(batch): 1 is linear, 2 quadratic. The second
table is of several gloo ranks with a fixed number of rows each, keys gathered or in a ring.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

LOCAL_ROWS, LOCAL_DIM = 4096, 256
LABELLED = {"supcon", "triplet all", "triplet hard", "triplet semihard", "cosine_embedding"}
ONE_INPUT = {"self_diagonal", "koleo"}
LOSSES = ("infonce symmetric", "ntxent", "dcl", "siglip", "self_diagonal", "supcon")
LOSSES += ("cosine_embedding", "triplet all", "triplet hard", "triplet semihard", "koleo")
LOSSES += ("vicreg", "barlow_twins", "force drift", "force seed")
# Rows beyond which dense matrices would not fit beside other work; none where there are no pairs.
DENSE_LIMIT = dict.fromkeys(LOSSES, 4096) | {"infonce symmetric": 8192}


def main() -> None:
    """Measure every loss, dense and chunked, then gather and ring, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps([peak_mib(*args.one, size, args.dim) for size in args.sizes]))
    elif args.ranks:
        print(json.dumps([peak_on_ranks(args.ranks[0], int(args.ranks[1]))]))
    else:
        first, *others = args.sizes
        print_row("loss", f"B = {first}", *others, "slope")
        print_row(*["---"] * (len(args.sizes) + 2))
        for name in args.losses:
            print_row(name, *cells(name, args.sizes, args.dim))
        world_sizes = (2, 4)
        print()
        print_row(f"{LOCAL_ROWS} rows a rank", *(f"{size} ranks" for size in world_sizes))
        print_row(*["---"] * (len(world_sizes) + 1))
        for keys_from in ("gather", "ring"):
            peaks = [of_ranks_in_own_process(keys_from, size) for size in world_sizes]
            print_row(keys_from, *(f"{x:.0f}" for x in peaks))


def cells(name: str, sizes: list[int], dim: int) -> list[str]:
    """Cells of a loss: MiB dense / chunked by size, then both slopes."""
    found = {}
    for impl in ("dense", "chunked"):
        measured = [size for size in sizes if impl == "chunked" or size <= DENSE_LIMIT[name]]
        found[impl] = in_own_process(name, impl, measured, dim)
    dense = [f"{x:.0f}" for x in found["dense"]] + ["-"] * (len(sizes) - len(found["dense"]))
    mib = [f"{a} / {b:.0f}" for a, b in zip(dense, found["chunked"], strict=True)]
    slopes = (f"{slope(sizes[: len(peaks)], peaks):.2f}" for peaks in found.values())
    return [*mib, " / ".join(slopes)]


def print_row(*values: object) -> None:
    """A line of a table in Markdown."""
    print(f"| {' | '.join(map(str, values))} |", flush=True)


def slope(sizes: list[int], peaks: list[float]) -> float:
    """Of a line through log(memory) over log(batch)."""
    return float(np.polyfit(np.log(sizes), np.log(peaks), 1)[0])


def in_own_process(name: str, impl: str, sizes: list[int], dim: int) -> list[float]:
    """Peaks in MiB, measured in a fresh process."""
    return _run("--dim", str(dim), "--sizes", *map(str, sizes), "--one", name, impl)


def of_ranks_in_own_process(keys_from: str, world_size: int) -> float:
    """Largest peak of a rank in MiB, measured in fresh processes."""
    return _run("--ranks", keys_from, str(world_size))[0]


def _run(*args: str) -> list[float]:
    give_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    argv = [sys.executable, __file__, *args]
    done = subprocess.run(argv, check=True, capture_output=True, env=give_back)
    return json.loads(done.stdout)


def peak_mib(name: str, impl: str, size: int, dim: int) -> float:
    """Growth of the peak resident memory over forward and backward with `size` rows."""
    import torch

    torch.set_num_threads(1)
    return growth_mib(build(name, impl), lambda rows: inputs(name, rows, dim), size)


def peak_on_ranks(keys_from: str, world_size: int) -> float:
    """The same on several ranks with a fixed number of rows each, the largest of them."""
    from dist_contrastive.testing import run_ranks

    return max(run_ranks(peak_of_rank, world_size, keys_from))


def peak_of_rank(keys_from: str) -> float:
    """On a rank: growth over forward and backward of a loss whose keys come from all ranks."""
    loss = build("infonce symmetric", "chunked", keys_from=keys_from)
    return growth_mib(loss, lambda rows: inputs("infonce symmetric", rows, LOCAL_DIM), LOCAL_ROWS)


def growth_mib(loss, make_inputs, size: int) -> float:
    """Growth of the peak resident memory over forward and backward with `size` rows."""
    for rows in (64, size):  # the small call first, for what is allocated once and for all
        given = make_inputs(rows)
        # Not getrusage: its maximum is inherited from the process that started this one.
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = own_memory_kib("VmRSS")
        loss(*given).backward()
    return (own_memory_kib("VmHWM") - before) / 1024


def inputs(name: str, rows: int, dim: int):
    """Embeddings, and labels of about 16 rows each where the loss takes some."""
    import torch

    embeddings = [torch.randn(rows, dim, requires_grad=True) for _ in range(2)]
    if name in LABELLED:
        return embeddings[0], torch.arange(rows) % (rows // 16)
    return embeddings[:1] if name in ONE_INPUT else embeddings


def own_memory_kib(name: str) -> int:
    """A line of this process's status: VmRSS is the memory it holds, VmHWM the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def build(name: str, impl: str, **options):
    """The loss by the name it has in the table."""
    from dist_contrastive import losses

    kind, _, setting = name.partition(" ")
    if kind == "force":
        return losses.ContrastiveForce(preset=setting, impl=impl, **options)
    settings = {
        "infonce": {"temperature": 0.1, "symmetric": True, "learnable": True},
        "triplet": {"mining": setting},
    }
    return by_name(losses)[kind.replace("_", "")](**settings.get(kind, {}), impl=impl, **options)


def by_name(losses) -> dict:
    """Class of every loss by its name in lower case."""
    return {loss.__name__.lower(): loss for loss in losses.LOSSES.values()}


if __name__ == "__main__":
    main()
