"""Several sources with weights: exact shares, exact epochs of each, any ranks and workers."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_contrastive import config as configs
from dist_contrastive import trainer
from dist_contrastive.data import Balance, ShardStream, index_folder
from dist_contrastive.data.keyed_random import keyed_number, keyed_permutation
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.stream.order import SampleOrder
from dist_contrastive.data.stream.weighted import WeightedOrder
from dist_contrastive.errors import ConfigError

COUNTS = ((20, 0, 13), (50, 7), (12,))
ORDER = {"global_batch_size": 24, "lanes": 12, "seed": 4, "shuffle_window": 5}


def naive_lane(counts, weights, lanes, seed, window, lane, length) -> list[tuple[int, int]]:
    """(epoch, sample) at the first positions of a lane, drawn one by one."""
    shares = [w // np.gcd.reduce(weights) for w in weights]
    orders = [
        SampleOrder(
            c, global_batch_size=max(2, lanes), lanes=lanes,
            seed=keyed_number(2**62, seed, 7, s), shuffle_window=window,
            tail="carry",
        )
        for s, c in enumerate(counts)
    ]  # fmt: skip
    starts = np.cumsum([0, *(sum(c) for c in counts)])
    taken, rows = [0] * len(counts), []
    for number in itertools.count():
        places = np.repeat(np.arange(len(shares)), shares)
        for source in places[keyed_permutation(sum(shares), seed, 5, lane, number)].tolist():
            epoch, sample = orders[source].samples(lane, taken[source], taken[source] + 1)
            taken[source] += 1
            rows.append((int(epoch[0]), int(starts[source] + sample[0])))
            if len(rows) == length:
                return rows
    raise AssertionError


@st.composite
def cases(draw):
    lanes = draw(st.integers(1, 4))
    counts = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1,
                           max_size=4).filter(lambda c: all(sum(x) >= 24 for x in c)) | st.just(
                               [[30, 5], [0, 41]]))  # fmt: skip
    weights = [draw(st.integers(1, 6)) for _ in counts]
    return counts, weights, lanes, draw(st.integers(0, 99)), draw(st.integers(1, 9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 60), st.integers(0, 40))
def test_order_equals_the_naive_specification(case, start, length):
    counts, weights, lanes, seed, window = case
    order = WeightedOrder(
        counts, weights, global_batch_size=max(2, lanes), lanes=lanes, seed=seed,
        shuffle_window=window,
    )  # fmt: skip
    for lane in range(lanes):
        expected = naive_lane(counts, weights, lanes, seed, window, lane, start + length + 1)
        epochs, numbers = order.samples(lane, start, start + length)
        rows = list(zip(epochs.tolist(), numbers.tolist(), strict=True))
        assert rows == expected[start : start + length]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for source, counts in enumerate(COUNTS):
        made.append(tmp_path_factory.mktemp("source"))
        for shard, count in enumerate(counts):
            samples = [{"__key__": f"{source}-{shard}-{n}", "cls": source} for n in range(count)]
            write_samples(made[-1] / f"{shard}.tar", samples)
        index_folder(made[-1])
    return made


def batches(folders, steps: int, weights=(3, 2, 1), **options) -> list[list[tuple]]:
    stream = ShardStream(folders, weights=weights, **{**ORDER, **options})
    return [
        list(zip(b["__epoch__"].tolist(), b["__key__"], b["cls"].tolist(), strict=True))
        for b in itertools.islice(stream, steps)
    ]


def test_shares_are_exact_and_every_source_gives_whole_epochs(folders):
    rows = list(itertools.chain(*batches(folders, 60)))
    for end in range(144, len(rows) + 1, 144):  # 12 lanes, rounds of 6 and batches of 2 each
        assert np.bincount([cls for _, _, cls in rows[:end]]).tolist() == [end // 2, end // 3,
                                                                           end // 6]  # fmt: skip
    for source, counts in enumerate(COUNTS):
        seen = [(epoch, key) for epoch, key, cls in rows if cls == source]
        assert len(set(seen)) == len(seen)
        keys = {f"{source}-{shard}-{n}" for shard, count in enumerate(counts) for n in range(count)}
        whole = len(seen) // len(keys) - 1  # lanes are in step but for one sample
        for epoch in range(whole):
            assert {key for e, key in seen if e == epoch} == keys


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 2), (12, 1), (1, 5)])
def test_any_ranks_and_workers_and_resume(folders, world_size, num_workers):
    whole = batches(folders, 12)
    for start in (0, 7):
        ranks = [
            batches(folders, 12 - start, rank=rank, world_size=world_size,
                    num_workers=num_workers, consumed=24 * start)
            for rank in range(world_size)
        ]  # fmt: skip
        assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole[
            start:
        ]


def test_sources_without_weights_are_one_data_set(folders):
    stream = ShardStream(folders, **ORDER, epochs=2)
    keys = [key for batch in stream for key in batch["__key__"]]
    assert stream.num_samples == 102
    assert len(keys) == 204
    assert all(keys.count(key) == 2 for key in set(keys))


def test_far_positions_are_cheap_and_exact():
    order = WeightedOrder([[10**6], [10**5]], [99, 1], global_batch_size=64, lanes=64, seed=0,
                          shuffle_window=4096)  # fmt: skip
    start = 10**8
    counts = np.zeros(2, int)
    for lane in range(64):
        epochs, numbers = order.samples(lane, start, start + 100)
        counts += np.bincount(numbers >= 10**6, minlength=2)
        assert {int(e) for e, n in zip(epochs, numbers, strict=True) if n < 10**6} == {6336}
    assert (Fraction(int(counts[1]), 6400)) == Fraction(1, 100)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": [1, 2]}, "2 weights for 3 sources; give each source one"),
        ({"weights": [1, 0, 1]}, r"weights \[1, 0, 1\] must be 1 or more; leave out a source"),
        ({"weights": [4096, 1, 1]}, r"sum to 4098 in lowest terms, more than 4096; use smaller"),
        (
            {"weights": [1, 1, 50]},
            "source 3 has 12 samples, fewer than the 24 of a batch of 24",
        ),
        ({"epochs": 1}, "epochs=1 do not apply to weighted sources, which have no end"),
        ({"consumed": 30}, "consumed=30 is not a multiple of global_batch_size=24"),
        ({"balance": Balance([0, 1], 2, 1)}, "weights and balance exclude each other"),
    ],
)
def test_impossible_settings_say_how_to_mend_them(folders, changed, message):
    with pytest.raises(ConfigError, match=message):
        ShardStream(folders, **{"weights": [3, 2, 1], **ORDER, **changed})


def test_a_source_that_fits_exactly_is_not_refused():
    """7 of 100 in each of 100 lanes, which floating numbers round to 8."""
    options = {"lanes": 100, "seed": 0, "shuffle_window": 1}
    WeightedOrder([[700], [9300]], [7, 93], global_batch_size=10_000, **options)
    with pytest.raises(ConfigError, match="source 1 has 699 samples, fewer than the 700 of"):
        WeightedOrder([[699], [9300]], [7, 93], global_batch_size=10_000, **options)


def test_training_from_two_sources(tmp_path: Path, overrides, digits: Path, capsys):
    """Where sources lie may change when a run goes on, what they hold and weigh may not."""
    sources = [
        {"shards": f"{digits}/{name}", "weight": w} for name, w in (("train", 3), ("test", 1))
    ]

    def config(*more: dict, **changed):
        chosen = [{**source, **extra} for source, extra in
                  itertools.zip_longest(sources, more, fillvalue={})]  # fmt: skip
        options = overrides(tmp_path / "run", f"data.train={chosen}", "train.log_every=4")
        return configs.load(CONFIGS / "digits_encoder.yaml", options)

    assert trainer.train(config(), stop_after=6) == trainer.EXIT_REQUEUE
    for more, message in (
        (({"weight": 2},), "with weight 3 .*, now 1437 samples .* with weight 2"),
        (({}, {"shards": f"{digits}/train"}), "was trained on 360 samples in 2 .*, now 1437"),
        (({"shards": f"{digits}/test"}, {"shards": f"{digits}/train"}), "was trained on 1437 "),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            trainer.train(config(*more))
    (tmp_path / "elsewhere").symlink_to(digits / "test")
    assert trainer.train(config({}, {"shards": f"{tmp_path}/elsewhere"})) == trainer.EXIT_DONE
