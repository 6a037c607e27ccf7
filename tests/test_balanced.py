"""Class-balanced batches: P classes x K samples, from anywhere, whatever reads them."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_contrastive.data import Balance, Fields, ShardStream
from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.labels import keep_per_class
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.stream.balanced import BalancedOrder
from dist_contrastive.errors import ConfigError

Rows = list[tuple[int, int]]  # pass, sample number


def rows_of(order: BalancedOrder, lane: int, start: int, stop: int) -> Rows:
    """Rows of a lane between two numbers of consumed samples."""
    span = order.position(lane, start), order.position(lane, stop)
    passes, numbers = order.samples(lane, *span)
    assert passes.dtype == numbers.dtype == np.int64
    return list(zip(passes.tolist(), numbers.tolist(), strict=True))


def batches(order: BalancedOrder, steps: range) -> list[Rows]:
    size = order.global_batch_size
    return [
        [x for lane in range(order.lanes) for x in rows_of(order, lane, s * size, (s + 1) * size)]
        for s in steps
    ]


def naive_batch(labels: list[int], classes: int, each: int, size: int, seed: int, step: int):
    """One batch, written out from the definition."""
    members = defaultdict(list)
    for number, label in enumerate(labels):
        members[label].append(number)
    unlabelled = members.pop(-1, [])
    names = sorted(members)
    steps_of_round = len(names) // classes
    number, place = step // steps_of_round, step % steps_of_round

    def take(pool: list[int], count: int, turn: int, *key: int) -> Rows:
        turns = len(pool) // count
        shuffle = keyed_permutation(len(pool), seed, *key, turn // turns).tolist()
        chosen = shuffle[turn % turns * count :][:count]
        return [(turn // turns, pool[i]) for i in chosen]

    drawn = keyed_permutation(len(names), seed, 2, number).tolist()[place * classes :][:classes]
    batch = [row for i in drawn for row in take(members[names[i]], each, number, 3, names[i])]
    rest = size - classes * each
    return batch + (take(unlabelled, rest, step, 4) if rest else [])


@st.composite
def cases(draw):
    """Labels in any order, and settings that fit them."""
    each = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(each, 11), min_size=1, max_size=6))
    names = draw(st.lists(st.integers(0, 50), min_size=6, max_size=6, unique=True))
    classes = draw(st.integers(1, len(counts)))
    labelled = classes * each
    unlabelled = draw(st.integers(max(0, 2 - labelled), 9))
    size = draw(st.integers(max(2, labelled), labelled + unlabelled))
    labels = [n for n, count in zip(names, counts, strict=False) for _ in range(count)]
    return draw(st.permutations(labels + [-1] * unlabelled)), {
        "classes": classes,
        "samples_per_class": each,
        "global_batch_size": size,
        "lanes": draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])),
        "seed": draw(st.integers(0, 2**40)),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 40))
def test_order_equals_the_naive_specification(case, first):
    labels, config = case
    order = BalancedOrder(np.array(labels), **config)
    sizes = config["classes"], config["samples_per_class"], config["global_batch_size"]
    expected = [naive_batch(labels, *sizes, config["seed"], s) for s in range(first, first + 6)]
    assert batches(order, range(first, first + 6)) == expected
    assert batches(BalancedOrder(labels, **config), range(first, first + 1)) == expected[:1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_every_batch_has_p_classes_of_k_samples(case):
    labels, config = case
    classes, each = config["classes"], config["samples_per_class"]
    for batch in batches(BalancedOrder(labels, **config), range(12)):
        numbers = [number for _, number in batch]
        assert len(numbers) == len(set(numbers)) == config["global_batch_size"]
        counts = Counter(labels[n] for n in numbers)
        assert counts.pop(-1, 0) == config["global_batch_size"] - classes * each
        assert sorted(counts.values()) == [each] * classes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_passes_and_rounds(case):
    """In a round no class twice, in a pass no sample twice; each once where turns can hold all."""
    labels, config = case
    classes, each, rounds = config["classes"], config["samples_per_class"], 24
    members = {x: {n for n, y in enumerate(labels) if y == x} for x in set(labels) - {-1}}
    per_round = len(members) // classes
    made = batches(BalancedOrder(labels, **config), range(rounds * per_round))
    for start in range(0, len(made), per_round):
        in_round = Counter(labels[n] for rows in made[start : start + per_round] for _, n in rows)
        in_round.pop(-1, None)
        assert list(in_round.values()) == [each] * classes * per_round
    seen = Counter(row for rows in made for row in rows)
    assert set(seen.values()) == {1}
    for mine in members.values() if len(members) % classes == 0 else ():
        passes = rounds // (len(mine) // each)  # at least 2 whole ones
        for which in range(passes):
            used = {n for number, n in seen if number == which and n in mine}
            assert len(used) == len(mine) // each * each


def test_unlabelled_samples_are_passed_over_in_turn():
    """Every one of them exactly once a pass, a turn a step."""
    labels = [0, 1] * 5 + [-1] * 12
    order = BalancedOrder(
        labels, classes=2, samples_per_class=2, global_batch_size=8, lanes=2, seed=0
    )
    for which in range(4):
        made = batches(order, range(3 * which, 3 * which + 3))
        rows = [row for batch in made for row in batch if labels[row[1]] == -1]
        assert {p for p, _ in rows} == {which}
        assert sorted(n for _, n in rows) == list(range(10, 22))


def test_order_far_into_the_stream_is_cheap_and_exact():
    labels = np.arange(200_000) % 1000
    config: dict[str, Any] = {"classes": 32, "samples_per_class": 4, "global_batch_size": 128}
    step = 10**12
    far = BalancedOrder(labels, **config, lanes=8, seed=1)
    (batch,) = batches(far, range(step, step + 1))
    turn = step // (1000 // 32)
    assert {p for p, _ in batch} == {turn // 50}
    assert sorted(Counter(n % 1000 for _, n in batch).values()) == [4] * 32


def test_order_is_fixed_for_ever():
    """A change here would change the order of every run that is resumed."""
    labels = [0, 1, 2, -1] * 4
    order = BalancedOrder(
        labels, classes=2, samples_per_class=2, global_batch_size=6, lanes=1, seed=7
    )
    assert batches(order, range(2, 4)) == [
        [(1, 4), (1, 12), (1, 9), (1, 5), (1, 7), (1, 3)],
        [(1, 2), (1, 10), (1, 13), (1, 1), (1, 11), (1, 15)],
    ]


def test_seeds_and_passes_differ():
    labels = [0] * 12 + [1] * 12
    config: dict[str, Any] = {"classes": 2, "samples_per_class": 4, "global_batch_size": 8}
    made = {}
    for seed in (0, 1):
        order = BalancedOrder(labels, **config, lanes=1, seed=seed)
        for which in (0, 1):
            part = batches(order, range(3 * which, 3 * which + 3))
            made[seed, which] = [n for rows in part for _, n in rows]
    assert all(sorted(numbers) == list(range(24)) for numbers in made.values())
    assert all(a != b for a, b in itertools.combinations(made.values(), 2))


# ---------------------------------------------------------------------------- the stream

FIELDS = Fields("png", "json.label", 10)


@pytest.fixture(scope="module")
def semi(digits: Path) -> Balance:
    """12 labels of each class, 240 samples without."""
    table = FIELDS.labels(load_index(digits / "test"), range(360))
    return Balance(keep_per_class(table, 12, seed=0), classes=5, samples_per_class=4)


def stream(folder: Path, balance: Balance | None, **changed) -> ShardStream:
    defaults: dict[str, Any] = {"global_batch_size": 36, "lanes": 12, "seed": 5}
    return ShardStream(folder, balance=balance, **{**defaults, **changed})


def global_batches(
    folder: Path, balance: Balance, world_size: int, num_workers: int, steps: int, **changed
) -> list[Rows]:
    """The global batches of all ranks together."""
    ranks = []
    for rank in range(world_size):
        part = {"rank": rank, "world_size": world_size, "num_workers": num_workers, **changed}
        local = itertools.islice(stream(folder, balance, **part), steps)
        pairs = [(b["__epoch__"].tolist(), b["__index__"].tolist()) for b in local]
        ranks.append([list(zip(*pair, strict=True)) for pair in pairs])
    return [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (12, 0), (1, 3), (3, 2)]
)
def test_any_ranks_and_workers_give_the_same_global_batches(digits, semi, world_size, num_workers):
    ours = global_batches(digits / "test", semi, world_size, num_workers, steps=4)
    labels = np.asarray(semi.labels).tolist()
    assert ours == [naive_batch(labels, 5, 4, 36, 5, step) for step in range(4)]


def test_batches_hold_the_classes_that_they_say(digits: Path, semi: Balance):
    """Labels decoded from the shards agree with the table by which samples were drawn."""
    table = torch.as_tensor(semi.labels)
    for batch in itertools.islice(stream(digits / "test", semi), 3):
        samples = FIELDS.samples(batch)
        assert samples.labels is not None
        kept = table[samples.index]
        assert sorted(kept.unique(return_counts=True)[1].tolist()) == [4] * 5 + [16]
        assert torch.equal(samples.labels[kept >= 0], kept[kept >= 0])


@pytest.mark.parametrize(("num_workers", "steps"), [(0, range(1, 8)), (3, [3])])
def test_resume_at_any_step(digits: Path, semi: Balance, num_workers: int, steps):
    folder = digits / "test"
    whole = global_batches(folder, semi, 1, 0, steps=9)
    for step in steps:
        one = stream(folder, semi, num_workers=num_workers)
        for _ in itertools.islice(one, step):
            pass
        assert one.consumed == 36 * step
        rest = global_batches(folder, semi, 2, num_workers, 9 - step, consumed=one.consumed)
        assert rest == whole[step:]


def test_numbers_of_a_balanced_stream(digits: Path, semi: Balance):
    ours = stream(digits / "test", semi)
    assert ours.num_samples == 360


# ---------------------------------------------------------------------------- bad input

LABELS = [*[3] * 8, *[4] * 5, *[9] * 6, *[-1] * 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": 4}, "classes=4 is more than the 3 classes that have labels; set classes=3"),
        (
            {"samples_per_class": 6},
            "=6 is more than the 5 labelled samples of class 4; set .*=5 or",
        ),
        (
            {"global_batch_size": 6},
            "makes 8 rows, more than global_batch_size=6; set fewer, or .*=8",
        ),
        (
            {"global_batch_size": 14},
            "leaves 6 of global_batch_size=14 .* there are 4; .*=12 at most",
        ),
        ({"labels": [-1] * 20}, "all labels are missing, so .*; set data.label"),
        ({"labels": [0.5, 1.0] * 20}, "float64 name no classes; .*data.num_classes"),
        ({"labels": [[1, 2]]}, r"shape \[1, 2\] and type int64 name no classes"),
        ({"labels": [0, -2]}, "label -2 is below 0; number classes from 0, missing is -1"),
        ({"lanes": 3}, "global_batch_size=8 is not divisible by lanes=3; set .*=6 or 9"),
        ({"seed": -1}, "seed=-1 is negative; set seed=0"),
    ],
)
def test_impossible_settings_say_how_to_mend_them(changed: dict, message: str):
    config = {"classes": 2, "samples_per_class": 4, "global_batch_size": 8, "lanes": 1, "seed": 0}
    labels = changed.get("labels", LABELS)
    order: dict[str, Any] = {**config, **{k: v for k, v in changed.items() if k != "labels"}}
    with pytest.raises(ConfigError, match=message) as error:
        BalancedOrder(labels, **order)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["classes", "samples_per_class"])
def test_limits_of_a_balance(name: str):
    with pytest.raises(ConfigError, match=f"{name}=0: .*set more than 0"):
        Balance(LABELS, **{"classes": 2, "samples_per_class": 4, name: 0})


def test_no_samples_without_label(digits: Path):
    config: dict[str, Any] = {"global_batch_size": 9, "lanes": 1, "seed": 0}
    with pytest.raises(ConfigError, match=r"leaves 1 of .*=9 rows to .*, of which there are 0; "):
        BalancedOrder([0, 1] * 9, classes=2, samples_per_class=4, **config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 2}, "epochs=2 do not apply to class-balanced batches, .* leave out epochs"),
        ({"consumed": 12}, "consumed=12 is not a multiple of global_batch_size=36.* use 0 or 36"),
        ({"consumed": -36}, "consumed=-36 is negative"),
        ({"world_size": 5}, "lanes=12 is not divisible by world_size=5"),
    ],
)
def test_streams_refuse_what_does_not_fit(digits, semi, changed: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        stream(digits / "test", semi, **changed)


def test_labels_of_another_data_set_are_refused(digits: Path, semi: Balance):
    with pytest.raises(ConfigError, match="balance has 360 labels, but the data set has 1437 sam"):
        stream(digits / "train", semi)
