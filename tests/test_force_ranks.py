"""The contrastive force on several ranks: that of one process which holds all points; and inputs
that are refused on all ranks."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from force_formulas import specified
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError
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
WAYS = [
    {"keys_from": "gather", "impl": "chunked", "chunk_size": 6},
    {"keys_from": "ring", "impl": "dense"},  # in tiles of whole blocks
]
MORE_WAYS = [  # of the batch with everything, on two ranks
    {"keys_from": "gather", "impl": "dense"},
    {"keys_from": "ring", "impl": "chunked", "chunk_size": 3},
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
    """Presets, batches and settings."""
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
        for way in ways(name, dist.get_world_size())
    ]


def ways(name: str, world_size: int) -> list[dict]:
    return [*WAYS, *MORE_WAYS] if name == "everything" and world_size == 2 else WAYS


@pytest.fixture(scope="module")
def right() -> list[Result]:
    """Of every case what the specification finds; and what one process does, densely."""
    found = []
    for preset, name, settings in cases():
        given = leaves(batch(name))
        dense = computed(given, preset, impl="dense", **settings)
        settings = {k: x for k, x in settings.items() if k != "diagnostics"}
        expected = specified(preset, **given, temperatures=TEMPERATURES, **settings)
        gradients = derived(expected.loss, given)
        metrics = {
            k: expected.metrics["scale"] if k == "scale" else x for k, x in dense.metrics.items()
        }
        found.append(Result(expected.loss.detach(), gradients, dense.force, metrics))
    return found


@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_ranks_find_what_one_process_finds(world_size, right):
    """Gathered and in a ring."""
    of_ranks = list(zip(*run_ranks(on_ranks, world_size, timeout_s=280), strict=True))
    names = [f"{case}, {way}" for case in cases() for way in ways(case[1], world_size)]
    expected = [
        x for x, case in zip(right, cases(), strict=True) for _ in ways(case[1], world_size)
    ]
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
        expected = specified(preset, **given, temperatures=TEMPERATURES, **scopes)
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
            others = sum(sorted(numbers)[:-1])  # than the exchange of headers
            assert (others > 2) == ("global" in scopes)  # 2: the mean loss


TWO, THREE = torch.ones(2, 4), torch.ones(3, 4)
NUMBERS = [torch.arange(n) for n in range(4)]
POINTS = {"negative": TWO, "positive": THREE}
LABELLED = {**POINTS, "negative_labels": NUMBERS[2], "positive_labels": NUMBERS[3]}
NAN = torch.tensor([1.0, torch.nan])
BAD = {  # what two ranks give, and words of the refusal
    "labels on one rank": (
        [POINTS, LABELLED],
        "negative_labels are missing on ranks [0]",
    ),
    "labels of the wrong length": (
        [LABELLED, {**POINTS, "negative_labels": NUMBERS[3], "positive_labels": NUMBERS[2]}],
        "rank 1 has 2 rows of negative, 3 rows of negative_labels",
    ),
    "labels of one kind": (
        [{**POINTS, "negative_labels": NUMBERS[2]}, LABELLED],
        "positive_labels are missing on ranks [0]",
    ),
    "no labels of fixed": (
        [{**LABELLED, "fixed": THREE, "fixed_labels": NUMBERS[3]}, {**LABELLED, "fixed": TWO}],
        "fixed_labels are missing on ranks [1]",
    ),
    "floating labels": (
        [LABELLED, {**LABELLED, "negative_labels": TWO[:, 0]}],
        "[rows] torch.float32 without gradient on rank 1; give integers",
    ),
    "shapes": (
        [POINTS, {"negative": TWO, "positive": THREE[:, :3]}],
        "[rows, 4] torch.float32 without gradient on rank 0; [rows, 3]",
    ),
    "shape of fixed": (
        [{**POINTS, "fixed": TWO}, {**POINTS, "fixed": TWO[:, :3]}],
        "[rows, 4] torch.float32 without gradient on rank 0; [rows, 3]",
    ),
    "groups of data": (
        [{"negative": torch.ones(2, 3, 4), "positive": torch.ones(3, 3, 4)}] * 2,
        "leading dimensions {'negative': (2,), 'positive': (3,)} on rank 0",
    ),
    "groups of a rank": (
        [{"negative": x, "positive": x} for x in (torch.ones(2, 3, 4), torch.ones(3, 3, 4))],
        "[2, rows, 4] torch.float32 without gradient on rank 0; [3, rows, 4]",
    ),
    "integers": (
        [POINTS, {"negative": TWO, "positive": TWO.long()}],
        "torch.int64 without gradient on rank 1; give floating",
    ),
    "no dimension": (
        [{"negative": TWO[:, :0], "positive": TWO[:, :0]}] * 2,
        "[rows, 0] torch.float32 without gradient on rank 0, 1; give floating",
    ),
    "no group": (
        [{"negative": x, "positive": x} for x in (TWO[None], TWO[None][:0])],
        "[0, rows, 4] torch.float32 without gradient on rank 1; give floating",
    ),
    "no data": (
        [{"negative": TWO, "positive": TWO[:0]}] * 2,
        "ranks together hold 4 negative (generated) and 0 positive",
    ),
    "nothing generated": (
        [{"negative": TWO[:0], "positive": TWO, "fixed": TWO}] * 2,
        "ranks together hold 0 negative (generated) and 4 positive",
    ),
    "no positive on one rank": (
        [POINTS, {"negative": TWO, "positive": None}],
        "positive are missing on ranks [1]",
    ),
    "points that are no tensor": (
        [POINTS, {"negative": TWO.numpy(), "positive": THREE}],
        "no dense tensor of a known dtype on rank 1; give floating",
    ),
    "weights that overflow": (
        [{**POINTS, "negative_weights": x} for x in (TWO[:, 0], TWO[:, 0].double() * 1e100)],
        "negative_weights on rank 1 hold NaN, infinity or negative numbers",
    ),
    "fixed on one rank": (
        [{**POINTS, "fixed": TWO}, POINTS],
        "fixed are missing on ranks [1]",
    ),
    "weights on one rank": (
        [POINTS, {**POINTS, "positive_weights": THREE[:, 0]}],
        "positive_weights are missing on ranks [0]",
    ),
    "too few weights": (
        [{**POINTS, "positive_weights": THREE[:, 0]}, {**POINTS, "positive_weights": TWO[:, 0]}],
        "rank 1 has 3 rows of positive, 2 rows of positive_weights",
    ),
    "weights of other groups": (
        [{"negative": TWO[None], "positive": THREE[None], "negative_weights": TWO}] * 2,
        "dimensions {'negative': (1,), 'negative_weights': (2,), 'positive': (1,)}",
    ),
    "weights that are integers": (
        [POINTS | {"negative_weights": TWO[:, 0]}, POINTS | {"negative_weights": NUMBERS[2]}],
        "torch.int64 without gradient on rank 1; give floating weights",
    ),
    "weights that are no tensor": (
        [POINTS | {"negative_weights": TWO[:, 0]}, POINTS | {"negative_weights": [1.0, 2.0]}],
        "no dense tensor of a known dtype on rank 1; give floating weights",
    ),
    "NaN in points": (
        [POINTS, {"negative": TWO, "positive": THREE * torch.nan}],
        "3 of 3 rows of positive on rank 1",
    ),
    **{
        f"weights {what}": (
            [{**given, "negative_weights": TWO[:, 0]}, {**given, "negative_weights": weights}],
            "negative_weights on rank 1 hold NaN, infinity or negative numbers",
        )
        for what, given, weights in (
            ("below 0", POINTS, torch.tensor([1.0, -1.0])),
            ("that are NaN", POINTS, NAN),
            ("that are infinite", POINTS, torch.tensor([1.0, torch.inf])),
            ("of groups that are NaN", {k: x[None] for k, x in POINTS.items()}, NAN[None]),
        )
    },
}


def refused() -> list[str]:
    words = []
    for keys_from in ("gather", "ring"):
        for inputs, _ in BAD.values():
            with pytest.raises((ConfigError, NonFiniteError)) as caught:
                losses.ContrastiveForce(keys_from=keys_from)(**inputs[dist.get_rank()])
            words.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        losses.ContrastiveForce(keys_from="local")(TWO, TWO[: 2 - 2 * dist.get_rank()])
    return [*words, str(caught.value)]


def test_bad_points_are_refused_on_all_ranks_in_the_same_words():
    first, second = run_ranks(refused, 2)
    assert first == second
    expected = [words for _, words in BAD.values()] * 2
    for words, message in zip([*expected, "rank 1 holds 2 negative"], first, strict=True):
        assert words in message
        assert message.count(". ") == 0  # one sentence
