"""The contrastive force on several ranks: that of one process which holds all points."""

import functools

import pytest
import torch
import torch.distributed as dist
from force_formulas import naive
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_contrastive import losses
from dist_contrastive.testing import run_ranks

PRESETS = ("seed", "drift", "paper")
TEMPERATURES = (0.05, 0.3)
SPLITS = {  # points of every rank, some of which have none of a kind, or none at all
    1: {"negative": (11,), "fixed": (5,), "positive": (13,)},
    2: {"negative": (4, 7), "fixed": (0, 5), "positive": (9, 4)},
    3: {"negative": (3, 0, 8), "fixed": (0, 5, 0), "positive": (0, 11, 2)},
    4: {"negative": (2, 5, 0, 4), "fixed": (4, 1, 0, 0), "positive": (0, 6, 0, 7)},
}
BATCHES = ("plain", "labels", "groups", "coinciding", "everything")
WAYS = [("gather", "chunked", 4), ("ring", "chunked", 4), ("ring", "dense", None)]
Arguments = dict[str, Tensor]


@functools.cache
def batch(name: str) -> Arguments:
    """What one process gives to the loss."""
    generator = torch.Generator().manual_seed(5)
    leading = {"groups": (2, 3), "everything": (2,)}.get(name, ())
    sizes = {"negative": 11, "positive": 13}
    if name == "everything":
        sizes["fixed"] = 5
    given = {
        kind: torch.randn(*leading, size, 4, generator=generator, dtype=torch.float64)
        for kind, size in sizes.items()
    }
    if name == "coinciding":  # on the same and on different ranks
        x, y = given["negative"], given["positive"]
        x[::3] = y[::4] = y[-1]
    if name in ("labels", "everything"):  # 9 has no positives, and -5 is on one rank alone
        given["negative_labels"] = torch.tensor([0, 7, 7, 0, 9, 9, 7, 0, 0, 9, 7])
        given["positive_labels"] = torch.tensor([0, 0, 7, 7, 0, -5, -5, 7, 0, 0, 7, 0, 7])
    if name == "everything":
        given["fixed_labels"] = torch.tensor([0, 9, 7, 7, 2])
        given["negative_weights"] = torch.rand(2, 11, generator=generator, dtype=torch.float64)
        given["fixed_weights"] = torch.rand(5, generator=generator, dtype=torch.float64)
    return given


def share(given: Arguments) -> Arguments:
    """This rank's part."""
    found = {}
    for name, x in given.items():
        sizes = SPLITS[dist.get_world_size()][name.split("_")[0]]
        of_points = "_" not in name
        found[name] = x.split(sizes, -2 if of_points else -1)[dist.get_rank()].clone()
    return found


def cases() -> list[tuple[str, str, dict]]:
    """Preset, batch and settings."""
    plain = [(preset, name, {}) for preset in PRESETS for name in BATCHES]
    apart = {"scale_scope": "label", "norm_scope": "label", "affinity_floor": 1e-3}
    wide = {"scale_scope": "global", "norm_scope": "group", "normalise_total": True}
    return [*plain, *((p, "everything", options) for p in PRESETS for options in (apart, wide))]


Result = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def computed(given: Arguments, preset: str, **options) -> Result:
    """Value, gradients of all points, and metrics."""
    points = [given[kind].requires_grad_() for kind in SPLITS[1] if kind in given]
    loss = losses.ContrastiveForce(TEMPERATURES, preset, diagnostics=True, **options)
    value = loss(**given)
    gradients = torch.autograd.grad(value, points, allow_unused=True, materialize_grads=True)
    return value.detach(), list(gradients), loss.metrics


def on_ranks() -> list[Result]:
    found = []
    for preset, name, settings in cases():
        for keys_from, impl, chunk_size in WAYS:
            how = {"keys_from": keys_from, "impl": impl, "chunk_size": chunk_size}
            found.append(computed(share(batch(name)), preset, **settings, **how))
    return found


@pytest.fixture(scope="module")
def right() -> list[tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]]:
    """Of every case, what one process finds: the naive form's numbers, and all metrics."""
    found = []
    for preset, name, settings in cases():
        given = {k: x.clone() for k, x in batch(name).items()}
        points = [given[kind].requires_grad_() for kind in SPLITS[1] if kind in given]
        expected = naive(preset, **given, temperatures=TEMPERATURES, **settings)
        gradients = torch.autograd.grad(
            expected.loss, points, allow_unused=True, materialize_grads=True
        )
        *_, metrics = computed(given, preset, impl="dense", **settings)
        found.append((expected.loss.detach(), gradients, expected.metrics["scale"], metrics))
    return found


@pytest.mark.parametrize("world_size", SPLITS)
def test_loss_gradient_and_scale_are_those_of_one_process(world_size, right):
    of_ranks = zip(*run_ranks(on_ranks, world_size), strict=True)
    expected = [x for x in right for _ in WAYS]
    names = [(*case, *way) for case in cases() for way in WAYS]
    for name, found, (value, gradients, scale, metrics) in zip(
        names, of_ranks, expected, strict=True
    ):
        close = functools.partial(closely, message=f"{name}")
        for mine, _, reported in found:  # the same on all ranks
            close(mine, value)
            close(reported["scale"], scale)
            assert reported.keys() == metrics.keys()
            for key, number in metrics.items():
                close(reported[key], number)
        # Gradients are W times a rank's share: the mean that DDP takes is exact.
        for parts, correct in zip(zip(*(x[1] for x in found), strict=True), gradients, strict=True):
            close(torch.cat(parts, -2) / world_size, correct)


def closely(found: Tensor, expected: Tensor, message: str) -> None:
    atol = 1e-9 * expected.abs().max().nan_to_num().item()
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=atol, equal_nan=True, msg=lambda text: f"{message}: {text}"
    )


def forces_on_ranks() -> list[Tensor]:
    found = []
    for preset in PRESETS:
        for keys_from, impl, chunk_size in WAYS:
            how = {"keys_from": keys_from, "impl": impl, "chunk_size": chunk_size}
            for name in ("plain", "groups", "coinciding"):
                given = share(batch(name))
                force = losses.contrastive_force(
                    given["positive"], given["negative"], 0.3, preset, **how
                )
                found.append(force)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_force_is_that_of_one_process(world_size):
    of_ranks = zip(*run_ranks(forces_on_ranks, world_size), strict=True)
    for preset in PRESETS:
        for _ in WAYS:
            for name in ("plain", "groups", "coinciding"):
                given = batch(name)
                expected = losses.contrastive_force(
                    given["positive"], given["negative"], 0.3, preset, impl="dense"
                )
                closely(torch.cat(next(of_ranks), -2), expected, f"{preset} {name}")


GROUPS = {1: (6,), 2: (4, 2), 3: (1, 3, 2), 4: (2, 1, 2, 1)}  # of every rank
SCOPES = [("group", "group"), ("global", "global"), ("global", "group"), ("label", "label")]


def many_groups() -> Arguments:
    generator = torch.Generator().manual_seed(7)
    sizes = {"negative": 6, "fixed": 3, "positive": 7}
    given = {
        kind: torch.randn(6, size, 4, generator=generator, dtype=torch.float64)
        for kind, size in sizes.items()
    }
    given["positive"] *= torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None, None]
    for kind, size in sizes.items():
        given[f"{kind}_weights"] = torch.rand(6, size, generator=generator, dtype=torch.float64)
        given[f"{kind}_labels"] = torch.arange(size) % 2
    return given


def groups_on_ranks() -> list[Result]:
    sizes, rank = GROUPS[dist.get_world_size()], dist.get_rank()
    mine = {
        name: x if name.endswith("labels") else x.split(sizes)[rank].clone()
        for name, x in many_groups().items()
    }
    return [
        computed(mine, preset, keys_from="local", scale_scope=a, norm_scope=b, impl=impl)
        for preset in PRESETS
        for a, b in SCOPES
        for impl in ("chunked", "dense")
    ]


@pytest.mark.parametrize("world_size", GROUPS)
def test_groups_of_their_own_are_those_of_one_process(world_size):
    of_ranks = zip(*run_ranks(groups_on_ranks, world_size), strict=True)
    given = many_groups()
    points = [given[kind].requires_grad_() for kind in SPLITS[1]]
    for preset in PRESETS:
        for a, b in SCOPES:
            expected = naive(
                preset, **given, temperatures=TEMPERATURES, scale_scope=a, norm_scope=b
            )
            gradients = torch.autograd.grad(expected.loss, points, materialize_grads=True)
            for _ in ("chunked", "dense"):
                found, message = next(of_ranks), f"{preset}, {a}, {b}"
                for value, _, metrics in found:
                    closely(value, expected.loss.detach(), message)
                    for name in ("scale", *(f"neighbours/{t:g}" for t in TEMPERATURES)):
                        closely(metrics[name], expected.metrics[name], f"{message}, {name}")
                parts = zip(*(gradients for _, gradients, _ in found), strict=True)
                for part, correct in zip(parts, gradients, strict=True):
                    closely(torch.cat(part) / world_size, correct, message)


class Sent(TorchDispatchMode):
    """Notes how many numbers each collective is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.numbers.append(sum(x.numel() for x in tensors))
        return func(*args, **(kwargs or {}))


def sent(num_points: int, dim: int, num_groups: int) -> list[list[int]]:
    found = []
    for preset in PRESETS:
        for scopes in SCOPES:
            x, y = (torch.randn(num_groups, num_points, dim) for _ in range(2))
            loss = losses.ContrastiveForce(
                preset=preset, keys_from="local", scale_scope=scopes[0], norm_scope=scopes[1]
            )
            with Sent() as noted:
                loss(x.requires_grad_(), y).backward()
            found.append(noted.numbers)
    return found


def sent_on_ranks() -> tuple[list[list[int]], list[list[int]]]:
    return sent(4, 3, 1 + dist.get_rank()), sent(12, 9, 4 - dist.get_rank())


def test_of_groups_of_their_own_only_scalars_cross_ranks():
    """As many for few small groups as for more large ones: what ranks hold, and means."""
    for few, many in run_ranks(sent_on_ranks, 2):
        assert few == many
        headers = 2 * 11 * 13 + 11 * 13  # of what may be given: theirs, and those of all
        for scopes, numbers in zip(SCOPES * len(PRESETS), few, strict=True):
            assert max(numbers) <= headers
            others = sum(sorted(numbers)[:-2])  # than the two exchanges of headers
            assert (others > 2) == ("global" in scopes)  # 2: the mean loss
