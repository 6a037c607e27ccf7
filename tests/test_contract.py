"""The gradient contract: W ranks give the loss and the gradient of one process with all rows.

A linear encoder inside the real DistributedDataParallel, fp64, different data on every rank.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError
from dist_contrastive.testing import run_ranks

DIM_IN, DIM = 6, 5
ROWS = {  # rows of every rank
    "even": {1: [12], 2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]},
    "uneven": {1: [12], 2: [9, 3], 3: [1, 7, 4], 4: [2, 5, 1, 4]},
    "one empty rank": {1: [12], 2: [0, 12], 3: [7, 0, 5], 4: [4, 5, 3, 0]},
}
WORLD_SIZES = (1, 2, 3, 4)


class TwoInputs(nn.Module):
    """Encodes two inputs a row and compares them; uneven third inputs where a loss takes them."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(DIM_IN, DIM, dtype=torch.float64)
        self.loss = loss.double()

    def forward(self, a: Tensor, b: Tensor, *others: Tensor | None) -> Tensor:
        encoded = [x if x is None or x.dtype == torch.int64 else self.encoder(x) for x in others]
        return self.loss(self.encoder(a), self.encoder(b), *encoded)


def build(name: str, impl: str) -> TwoInputs:
    options = {"impl": impl, "chunk_size": 4}
    loss: nn.Module
    if name.startswith("infonce"):
        learnable = {"symmetric": "symmetric" in name, "learnable": True}
        loss = losses.InfoNCE(0.1, **learnable, **options)
    elif name == "ntxent":
        loss = losses.NTXent(0.2, learnable=True, **options)
    else:
        preset = name.split()[1]
        loss = losses.ContrastiveForce((0.05, 0.2, 1.0), preset=preset, **options)
    torch.manual_seed(0)
    return TwoInputs(loss)


LOSSES = ["infonce", "infonce symmetric", "infonce symmetric negatives", "ntxent"]
LOSSES += ["force seed", "force drift", "force drift labels"]


def global_inputs(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(12, DIM_IN, generator=generator, dtype=torch.float64) for _ in range(3)]
    if name.endswith("negatives"):
        return inputs
    if name.endswith("labels"):
        labels = torch.randint(0, 3, (2, 12), generator=generator)
        return [*inputs[:2], *labels]
    return inputs[:2]


def local_inputs(name: str, sizes: list[int], rank: int) -> list[Tensor]:
    """This rank's rows; the second kind of input is split in the opposite way for the force, and
    so are extra negatives: their numbers need not follow those of the rows."""
    reverse = sizes[::-1]
    parts = []
    for place, x in enumerate(global_inputs(name)):
        second = place % 2 == 1 if name.startswith("force") else place == 2
        parts.append(x.split(reverse if second else sizes)[rank])
    return parts


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}
    return {"loss": loss.detach(), **found}


def all_cases(world_size: int) -> list[tuple[str, str, str]]:
    return [
        (name, impl, split)
        for name in LOSSES
        for impl in ("dense", "chunked")
        for split in ROWS
        if world_size > 1 or split == "even"
    ]


def on_rank() -> dict[tuple[str, str, str], dict[str, Tensor]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, impl, split in all_cases(world_size):
        module = nn.parallel.DistributedDataParallel(build(name, impl))
        inputs = local_inputs(name, ROWS[split][world_size], rank)
        results[name, impl, split] = gradients(module, module(*inputs))
    return results


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in LOSSES:
        module = build(name, "dense")
        found[name] = gradients(module, module(*global_inputs(name)))
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradient_contract(world_size, reference):
    for rank, results in enumerate(run_ranks(on_rank, world_size)):
        for (name, impl, split), found in results.items():
            for what, expected in reference[name].items():
                where = f"{what} of {name}, {impl}, {split} rows, rank {rank} of {world_size}"
                assert expected.norm() > 0, where
                ratio = (found[what].norm() / expected.norm()).item()
                assert ratio == pytest.approx(1, abs=1e-9), where
                torch.testing.assert_close(
                    found[what], expected, rtol=1e-9, atol=1e-11, msg=lambda m, w=where: f"{w}\n{m}"
                )


def summed() -> Tensor:
    """With grad_reduction="sum" the gradients of ranks add up to the exact one."""
    loss = losses.NTXent(0.2, grad_reduction="sum")
    a, b = (x.requires_grad_() for x in local_inputs("ntxent", [9, 3], dist.get_rank()))
    loss(a, b).backward()
    return a.grad


def test_sum_reduction_leaves_plain_gradient():
    a, b = (x.requires_grad_() for x in global_inputs("ntxent"))
    losses.NTXent(0.2)(a, b).backward()
    torch.testing.assert_close(torch.cat(run_ranks(summed, 2)), a.grad, rtol=1e-9, atol=1e-12)


def gradient_on_one_rank() -> str:
    n, p = (torch.randn(3, 2) for _ in range(2))
    n.requires_grad_(dist.get_rank() == 0)
    with pytest.raises(ConfigError) as caught:
        losses.ContrastiveForce(preset="seed")(n, p)
    return str(caught.value)


def test_gradient_on_some_ranks_is_refused_rather_than_awaited():
    for message in run_ranks(gradient_on_one_rank, 2):
        assert "with gradient on rank 0" in message


def groups_across_ranks(keys_from: str) -> tuple[Tensor, Tensor]:
    negative, positive = grouped_points()
    rank = dist.get_rank()
    if keys_from == "gather":  # rows of every group are spread over the ranks
        split = [x.split([2, 4], dim=1)[rank] for x in (negative, positive)]
    else:  # whole groups on one rank
        split = [x.split([1, 2])[rank] for x in (negative, positive)]
    n, p = (x.requires_grad_() for x in split)
    loss = losses.ContrastiveForce(preset="seed", keys_from=keys_from, impl="chunked")(n, p)
    loss.backward()
    return loss.detach(), n.grad


def grouped_points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (3, 6, DIM)
    n, p = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return n, p + 0.5


@pytest.mark.parametrize(("keys_from", "dim"), [("gather", 1), ("local", 0)])
def test_groups_over_ranks(keys_from, dim):
    n, p = (x.requires_grad_() for x in grouped_points())
    loss = losses.ContrastiveForce(preset="seed")(n, p)
    loss.backward()
    results = run_ranks(groups_across_ranks, 2, keys_from)
    for value, _ in results:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-9, atol=0)
    # Every rank holds W times its share: the mean that DDP takes is exact.
    joined = torch.cat([grad for _, grad in results], dim=dim) / 2
    torch.testing.assert_close(joined, n.grad, rtol=1e-9, atol=1e-12)
