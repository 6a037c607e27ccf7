"""The runs behind the tables of force.py, each in a process of its own.

python benchmarks/force_runs.py CALL     # the answer to `in_own_process`, as JSON
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from force_baselines import Loss, clouds, gathered_loss, keops_loss, paper_loss, seed_loss
from memory import growth_mib
from torch import Tensor

from dist_contrastive import collectives, losses
from dist_contrastive.losses.force import PRESETS
from dist_contrastive.pairwise import KeysFrom
from dist_contrastive.testing import run_ranks

THREADS = 2  # of a process that is alone; ranks have one each
LIMIT_S = 3600.0
WARM_UP = 64  # rows or groups

Shape = tuple[int, ...]
"""[points, D] or [groups, points, D], of the generated points and of the data each."""

BASELINES: dict[str, Loss] = {
    "seed, recorded": seed_loss,
    "seed, not recorded": partial(seed_loss, with_graph=False),
    "drift, recorded": partial(seed_loss, masked=True),
    "drift, not recorded": partial(seed_loss, masked=True, with_graph=False),
    "paper, not recorded": paper_loss,
    "drift, KeOps": keops_loss,
    "drift, computed on all ranks": gathered_loss,
}


def loss_of(name: str) -> Loss:
    """A baseline, or ours as `ours` names it."""
    if name in BASELINES:
        return BASELINES[name]
    preset, keys_from = name.split()
    return losses.ContrastiveForce(preset=preset, keys_from=keys_from)  # type: ignore[arg-type]


def ours(preset: str, keys_from: KeysFrom = "gather") -> str:
    """The name by which `loss_of` knows ours."""
    return f"{preset} {keys_from}"


def in_own_process(function: Callable, *args: Any, ranks: int = 1, **environment: str) -> list:
    """What a function of CALLS returns in a fresh process, or on each rank that it starts."""
    argv = [sys.executable, __file__, json.dumps([function.__name__, args, ranks])]
    environment = {**os.environ, **environment}
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # KeOps prints too


@cache
def peak_in_own_process(name: str, shape: Shape, ranks: int = 1, **environment: str) -> float:
    """Peak in MiB, the largest of ranks, where freed blocks go back to the system at once."""
    give_back = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), **environment}
    return max(in_own_process(peak_mib, name, shape, ranks=ranks, **give_back))


def answer(function: str, args: list, ranks: int) -> list:
    """In the fresh process: call a function of CALLS."""
    if ranks > 1:
        return run_ranks(CALLS[function], ranks, *args, timeout_s=LIMIT_S)
    torch.set_num_threads(THREADS)
    return [CALLS[function](*args)]


def timed(
    names: Sequence[str], preset: str, shape: Shape, repeats: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of every run of every loss, and its two errors; the points are those of all ranks."""
    all_losses = [loss_of(name) for name in names]
    for loss in all_losses:
        step(loss, *local_clouds((WARM_UP, *shape[1:])))
    points = local_clouds(shape)
    times, results = taking_turns([partial(step, x, *points) for x in all_losses], repeats)
    exact = step(BASELINES[f"{preset}, not recorded"], *clouds(shape, torch.float64))
    return times, [errors(result, exact) for result in results]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of the loss, whose mean over ranks counts, and of this rank's gradient, which is to be that
    of the whole batch times their number."""
    value = collectives.all_reduce_sum(found[0].double()) / world_size()
    value_error = (value - exact[0]).abs() / exact[0].abs()
    mine = world_size() * local(exact[1])
    return [value_error.item(), ((found[1] - mine).norm() / mine.norm()).item()]


def against_products(shape: Shape, repeats: int) -> list[list[float]]:
    """Seconds of every run of each of PRESETS, then of the two matrix products, whose results go
    into memory that is there."""
    all_losses = [loss_of(ours(preset)) for preset in PRESETS]
    for loss in all_losses:
        step(loss, *clouds((WARM_UP, *shape[1:])))
    points = clouds(shape)
    x = torch.cat(points).detach()
    square, wide = torch.empty(len(x), len(x)), torch.empty_like(x)

    def products() -> None:
        torch.mm(x, x.T, out=square)
        torch.mm(square, x, out=wide)

    products()
    steps = [partial(step, loss, *points) for loss in all_losses]
    times, _ = taking_turns([*steps, products], repeats)
    return times


def once(name: str, shape: Shape) -> tuple[float, float]:
    """Seconds of one run, and the loss."""
    loss = loss_of(name)
    step(loss, *clouds((WARM_UP, *shape[1:])))
    ((seconds,),), (result,) = taking_turns([partial(step, loss, *clouds(shape))], 1)
    return seconds, result[0].item()


def peak_mib(name: str, shape: Shape) -> float:
    """Growth of the peak resident memory over forward and backward."""
    return growth_mib(loss_of(name), lambda first: local_clouds((first, *shape[1:])), shape[0])


CALLS = {function.__name__: function for function in (timed, against_products, once, peak_mib)}


def step(loss: Loss, negative: Tensor, positive: Tensor) -> list[Tensor]:
    """The loss, and its gradient by the generated points."""
    value = loss(negative, positive)
    return [value.detach(), *torch.autograd.grad(value, [negative])]


def taking_turns(
    steps: Sequence[Callable[[], Any]], repeats: int
) -> tuple[list[list[float]], list[Any]]:
    """Seconds of every run of each step, and what each returned last."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        results = []
        for run, its_times in zip(steps, times, strict=True):
            if dist.is_initialized():
                dist.barrier()
            begin = time.perf_counter()
            results.append(run())
            its_times.append(time.perf_counter() - begin)
    return times, results


def local_clouds(shape: Shape) -> list[Tensor]:
    """This rank's part of `clouds`."""
    return [local(x).requires_grad_(x.requires_grad) for x in clouds(shape)]


def local(x: Tensor) -> Tensor:
    """A copy of this rank's rows."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return x.detach().chunk(world_size(), dim=-2)[rank].clone()


def world_size() -> int:
    """1 where there are no ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


if __name__ == "__main__":
    print(json.dumps(answer(*json.loads(sys.argv[1]))))
