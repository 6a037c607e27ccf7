"""The contrastive force on several ranks: that of one process which holds all points."""

import functools
from typing import NamedTuple

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
WAYS = [  # the latter in tiles of whole blocks
    {"keys_from": "gather", "impl": "chunked", "chunk_size": 6},
    {"keys_from": "ring", "impl": "dense"},
]
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
        found[name] = x.split(sizes, -2 if of_points else -1)[dist.get_rank()]
    return leaves(found)


def leaves(given: Arguments) -> Arguments:
    """Copies, of which the points require gradients."""
    return {name: x.clone().requires_grad_(name in SPLITS[1]) for name, x in given.items()}


def cases() -> list[tuple[str, str, dict]]:
    """Preset, batch and settings."""
    plain = [(preset, name, {}) for preset in PRESETS for name in BATCHES]
    apart = {"scale_scope": "label", "norm_scope": "label", "affinity_floor": 1e-3}
    wide = {"scale_scope": "global", "norm_scope": "group", "normalise_total": True}
    wide["diagnostics"] = True
    return [*plain, *((p, "everything", options) for p in PRESETS for options in (apart, wide))]


class Result(NamedTuple):
    value: Tensor
    gradients: list[Tensor]  # of all points
    force: Tensor | None  # where nothing but the points is given
    metrics: dict[str, Tensor]


def computed(given: Arguments, preset: str, **options) -> Result:
    """By the loss."""
    loss = losses.ContrastiveForce(TEMPERATURES, preset, **options)
    value = loss(**given)
    gradients = derived(value, given)
    metrics, force = loss.metrics, None
    if len(given) == 2:
        force = loss.force(given["negative"], given["positive"])
    return Result(value.detach(), gradients, force, metrics)


def derived(value: Tensor, given: Arguments) -> list[Tensor]:
    """By all points that the value was computed of."""
    points = [given[kind] for kind in SPLITS[1] if kind in given]
    return list(torch.autograd.grad(value, points, allow_unused=True, materialize_grads=True))


def on_ranks() -> list[Result]:
    return [
        computed(share(batch(name)), preset, **settings, **way)
        for preset, name, settings in cases()
        for way in WAYS
    ]


@pytest.fixture(scope="module")
def right() -> list[Result]:
    """Of every case what the naive form finds; and what one process does, densely."""
    found = []
    for preset, name, settings in cases():
        given = leaves(batch(name))
        dense = computed(given, preset, impl="dense", **settings)
        settings = {k: x for k, x in settings.items() if k != "diagnostics"}
        expected = naive(preset, **given, temperatures=TEMPERATURES, **settings)
        gradients = derived(expected.loss, given)
        metrics = {
            k: expected.metrics["scale"] if k == "scale" else x for k, x in dense.metrics.items()
        }
        found.append(Result(expected.loss.detach(), gradients, dense.force, metrics))
    return found


@pytest.mark.parametrize("world_size", SPLITS)
def test_ranks_find_what_one_process_finds(world_size, right):
    """Gathered and in a ring."""
    of_ranks = list(zip(*run_ranks(on_ranks, world_size), strict=True))
    names = [f"{case}, {way}" for case in cases() for way in WAYS]
    expected = [x for x in right for _ in WAYS]
    for name, found, correct in zip(names, of_ranks, expected, strict=True):
        for rank in found:  # the same on all ranks
            closely(rank.value, correct.value, name)
            assert rank.metrics.keys() == correct.metrics.keys()
            for key, number in correct.metrics.items():
                closely(rank.metrics[key], number, f"{name}, {key}")
        check_gradients([rank.gradients for rank in found], correct.gradients, name)
        if correct.force is not None:
            closely(torch.cat([rank.force for rank in found], -2), correct.force, name)


def check_gradients(
    of_ranks: list[list[Tensor]], right: list[Tensor], name: str, dim: int = -2
) -> None:
    """They are W times a rank's share: the mean that DDP takes is exact."""
    for parts, correct in zip(zip(*of_ranks, strict=True), right, strict=True):
        closely(torch.cat(parts, dim) / len(of_ranks), correct, name)


def closely(found: Tensor, expected: Tensor, message: str) -> None:
    atol = 1e-9 * expected.abs().max().nan_to_num().item()
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=atol, equal_nan=True, msg=lambda text: f"{message}: {text}"
    )


GROUPS = {2: (4, 2), 3: (1, 3, 2), 4: (2, 1, 2, 1)}  # of every rank
SCOPES = [("group", "group"), ("global", "global"), ("global", "label")]


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


def settings_of_groups() -> list[tuple[str, dict[str, str]]]:
    return [
        (preset, {"scale_scope": scale, "norm_scope": norm})
        for preset in PRESETS
        for scale, norm in SCOPES
    ]


def groups_on_ranks() -> list[Result]:
    sizes, rank = GROUPS[dist.get_world_size()], dist.get_rank()
    mine = {
        name: x if name.endswith("labels") else x.split(sizes)[rank]
        for name, x in many_groups().items()
    }
    return [
        computed(leaves(mine), preset, keys_from="local", diagnostics=True, **scopes)
        for preset, scopes in settings_of_groups()
    ]


@pytest.mark.parametrize("world_size", GROUPS)
def test_groups_of_their_own_are_those_of_one_process(world_size):
    of_ranks = zip(*run_ranks(groups_on_ranks, world_size), strict=True)
    for (preset, scopes), found in zip(settings_of_groups(), of_ranks, strict=True):
        given, name = leaves(many_groups()), f"{preset}, {scopes}"
        expected = naive(preset, **given, temperatures=TEMPERATURES, **scopes)
        for rank in found:
            closely(rank.value, expected.loss.detach(), name)
            for key in ("scale", *(f"neighbours/{t:g}" for t in TEMPERATURES)):
                closely(rank.metrics[key], expected.metrics[key], f"{name}, {key}")
        correct = derived(expected.loss, given)
        check_gradients([rank.gradients for rank in found], correct, name, 0)


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
