"""Subsets of sources, against shards that hold the chosen samples alone, and against loops."""

import csv
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from test_engines import config_of

from dist_contrastive import checkpoint, trainer
from dist_contrastive.data import (
    Filter,
    ShardStream,
    Subset,
    index_folder,
    load_index,
    open_subset,
    pack_dataset,
)
from dist_contrastive.data.keyed_random import combine
from dist_contrastive.data.keys import key_hashes
from dist_contrastive.data.rows_source import Rows
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.testing import run_ranks

COUNTS = (31, 0, 40, 1, 28)  # 100 samples
ORDER = {"global_batch_size": 12, "lanes": 6, "seed": 4, "shuffle_window": 5}
TEXTS = ("de", "en", "fr")


def sample_of(n: int) -> dict:
    details = {"width": 100 + n % 50, "uid": f"{n:032x}", "flag": n % 2 == 0}
    if n % 9:
        details["score"] = (n * 37 % 20) / 20  # with ties
    return {"__key__": f"photos/s{n}", "cls": n, "txt": TEXTS[n % 3], "json": details}


def write(folder: Path, numbers_of_shards) -> Path:
    folder.mkdir(exist_ok=True)
    for shard, numbers in enumerate(numbers_of_shards):
        write_samples(folder / f"{shard}.tar", map(sample_of, numbers))
    index_folder(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    numbers = itertools.count()
    shards = [list(itertools.islice(numbers, count)) for count in COUNTS]
    return write(tmp_path_factory.mktemp("whole") / "shards", shards)


def packed_alone(path: Path, chosen) -> Path:
    """Shards with the chosen samples only, in the same parts."""
    edges = np.cumsum([0, *COUNTS])
    parts = itertools.pairwise(edges)
    return write(path, [[n for n in sorted(chosen) if a <= n < b] for a, b in parts])


def numbers_of(source, tmp_path: Path, **wanted) -> list[int]:
    subset = open_subset(source, Filter(**wanted), tmp_path / "subsets")
    return [subset.read(n)["cls"] for n in range(len(subset))]


# ---------------------------------------------------------------------------- keys as numbers


def naive_hash(key: str) -> int:
    data = key.encode("utf-8", "surrogateescape")
    words = [data[at : at + 8].ljust(8, b"\0") for at in range(0, len(data), 8)]
    parts = [int.from_bytes(word, "little") for word in words]
    return int(combine(len(data), *parts)) % 2**64


def test_hashes_are_fixed_for_ever_and_depend_on_the_key_alone():
    keys = ["", "a", "12345678", "123456789", "ä/日本", "x" * 1000, "a\0", "\udcff"]
    hashes = key_hashes(keys)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [naive_hash(key) for key in keys]
    assert key_hashes([keys[1].encode()]).tolist() == [hashes[1]]
    assert hashes[1] == 12_565_839_569_580_772_773
    many = key_hashes([f"{n:09d}" for n in range(200_000)])
    assert len(np.unique(many)) == len(many)
    assert abs((many >> np.uint64(63)).mean() - 0.5) < 0.01


def test_the_index_holds_them(folder):
    index = load_index(folder)
    assert index.sample_key.tolist() == [naive_hash(f"photos/s{n}") for n in range(100)]
    assert index.select([2, 0]).sample_key.tolist() == [
        naive_hash(f"photos/s{n}") for n in (*range(31, 71), *range(31))
    ]


# ---------------------------------------------------------------------------- what is taken


CHOSEN = [n for n in range(100) if n % 7 in (0, 3)]


def key_files(root: Path, keys: list[str]) -> dict[str, tuple[Path, dict]]:
    """The same keys in files of each kind, one of them twice."""
    keys = [*keys[::-1], keys[0]]
    paths = {kind: root / f"keys{kind}" for kind in (".txt", ".csv", ".parquet", ".npy")}
    paths[".txt"].write_text("\r\n".join(keys) + "\n\n")
    with paths[".csv"].open("w", newline="") as file:
        csv.writer(file).writerows([("other", "name"), *(("x", key) for key in keys)])
    parquet.write_table(pa.table({"key": keys, "more": range(len(keys))}), paths[".parquet"])
    np.save(paths[".npy"], np.array(keys))
    return {kind: (path, {"column": "name"} if kind == ".csv" else {}) for kind, path in
            paths.items()}  # fmt: skip


def test_keys_of_every_kind_of_file(folder, tmp_path):
    for path, more in key_files(tmp_path, [f"photos/s{n}" for n in CHOSEN]).values():
        assert numbers_of(load_index(folder), tmp_path, keys=str(path), **more) == CHOSEN


def test_keys_in_a_field_as_datacomp_writes_them(folder, tmp_path):
    halves = [(0, n) for n in CHOSEN]
    np.save(tmp_path / "uids.npy", np.array(halves, np.dtype("u8,u8")))
    settings = {"keys": str(tmp_path / "uids.npy"), "key_field": "json.uid"}
    assert numbers_of(load_index(folder), tmp_path, **settings) == CHOSEN


@pytest.mark.parametrize(
    ("where", "is_taken"),
    [
        ({"txt": "de"}, lambda s: s["txt"] == "de"),
        ({"cls": [3, 7, 99, 1000]}, lambda s: s["cls"] in (3, 7, 99)),
        ({"json.width": {"at_least": 120, "at_most": 130}},
         lambda s: 120 <= s["json"]["width"] <= 130),
        ({"json.score": {"at_least": 0.5}}, lambda s: s["json"].get("score", -1) >= 0.5),
        ({"json.flag": True, "txt": ["en", "fr"]}, lambda s: s["cls"] % 2 == 0 and s["cls"] % 3),
    ],
)  # fmt: skip
def test_conditions_on_fields(where, is_taken, folder, tmp_path):
    expected = [n for n in range(100) if is_taken(sample_of(n))]
    assert 0 < len(expected) < 100
    assert numbers_of(load_index(folder), tmp_path, where=where) == expected


def best(numbers, score, top=None, above=None) -> list[int]:
    """By a sort of all that have a score."""
    having = [n for n in numbers if score(n) is not None]
    if top is not None:
        order = sorted(having, key=lambda n: (-score(n), n))
        having = sorted(order[: math.floor(Fraction(str(top)) * len(order))])
    return [n for n in having if above is None or score(n) > above]


@pytest.mark.parametrize("bounds", [{"top": 0.3}, {"above": 0.55}, {"top": 0.9, "above": 0.2}])
def test_scores_in_a_field_or_a_file(bounds, folder, tmp_path):
    index, stored = load_index(folder), lambda n: sample_of(n)["json"].get("score")
    expected = best(range(100), stored, **bounds)
    assert 0 < len(expected) < 90
    assert numbers_of(index, tmp_path, score="json.score", **bounds) == expected
    where = {"where": {"txt": "de"}, "score": "json.score"}
    assert numbers_of(index, tmp_path, **where, **bounds) == best(
        range(0, 100, 3), stored, **bounds
    )
    rows = {"uid": [f"photos/s{n}" for n in range(100)], "clip": [stored(n) for n in range(100)]}
    parquet.write_table(pa.table(rows), tmp_path / "scores.parquet")
    (tmp_path / "keys.txt").write_text("\n".join(f"photos/s{n}" for n in CHOSEN))
    settings = {"scores": str(tmp_path / "scores.parquet"), "score": "clip", "column": "uid"}
    assert numbers_of(index, tmp_path, **settings, **bounds) == expected
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "clip"), *zip(*rows.values(), strict=True)])
    settings = {"scores": str(tmp_path / "scores.csv"), "score": "clip"}
    both = numbers_of(index, tmp_path, keys=str(tmp_path / "keys.txt"), **settings, **bounds)
    assert both == best(CHOSEN, stored, **bounds)


def test_all_samples_of_a_key_are_taken(tmp_path):
    """Keys may begin anew in every shard."""
    for shard in range(3):
        samples = [{"__key__": f"{n}", "cls": 10 * shard + n} for n in range(5)]
        (tmp_path / "again").mkdir(exist_ok=True)
        write_samples(tmp_path / "again" / f"{shard}.tar", samples)
    index = index_folder(tmp_path / "again")
    (tmp_path / "keys.txt").write_text("4\n1\n")
    expected = [1, 4, 11, 14, 21, 24]
    assert numbers_of(index, tmp_path, keys=str(tmp_path / "keys.txt")) == expected


# ---------------------------------------------------------------------------- the stream


def rows(batch: dict) -> list[tuple]:
    names = ("__epoch__", "__index__", "cls")
    columns = (batch[name].tolist() for name in names)
    return list(zip(batch["__key__"], batch["txt"], *columns, strict=True))


def global_batches(sources, world_size=1, num_workers=0, steps=None, **options) -> list[list]:
    ranks = []
    for rank in range(world_size):
        stream = ShardStream(sources, **ORDER, rank=rank, world_size=world_size,
                             num_workers=num_workers, **options)  # fmt: skip
        ranks.append([rows(batch) for batch in itertools.islice(stream, steps)])
    return [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


def subset_of(folder: Path, tmp_path: Path, chosen) -> Subset:
    keys = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
    keys.write_text("\n".join(f"photos/s{n}" for n in chosen))
    return open_subset(load_index(folder), Filter(keys=str(keys)), tmp_path / "subsets")


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 2), (3, 0), (6, 1)])
def test_batches_are_those_of_shards_with_these_samples_alone(
    folder, tmp_path, world_size, num_workers
):
    subset, alone = subset_of(folder, tmp_path, CHOSEN), packed_alone(tmp_path / "alone", CHOSEN)
    expected = global_batches(load_index(alone), epochs=3)
    assert global_batches(subset, world_size, num_workers, epochs=3) == expected
    seen = sorted((row[2], row[4]) for row in itertools.chain(*expected))
    assert seen == [(epoch, n) for epoch in range(3) for n in CHOSEN]
    later = global_batches(subset, world_size, num_workers, epochs=3, consumed=24)
    assert later == expected[2:]


def test_mixtures_of_subsets(folder, tmp_path):
    """The same shards twice, the better samples more often; and with a source that is whole."""
    parts = CHOSEN, [n for n in range(100) if n not in CHOSEN]
    subsets = [subset_of(folder, tmp_path, chosen) for chosen in parts]
    alone = [load_index(packed_alone(tmp_path / f"alone{n}", x)) for n, x in enumerate(parts)]
    for weights in ((3, 1), None):
        expected = global_batches(alone, steps=30, weights=weights)
        assert global_batches(subsets, 3, 2, steps=30, weights=weights) == expected
        assert global_batches(subsets, 2, steps=10, weights=weights, consumed=240) == expected[20:]
    whole = write(tmp_path / "whole", [range(100, 130)])
    expected = global_batches([alone[0], load_index(whole)], steps=20, weights=(1, 2))
    mixed = global_batches([subsets[0], load_index(whole)], 2, steps=20, weights=(1, 2))
    assert mixed == expected


def test_what_is_known_of_the_samples_taken(folder, tmp_path):
    write_samples(tmp_path / "0.tar", [{"__key__": f"{n}", "cls": n, **({"txt": "x"} if n % 3 else
                                        {})} for n in range(20)])  # fmt: skip
    index = index_folder(tmp_path)
    subset = Subset(index, np.array([0, 1, 2, 3, 6, 10], np.uint32))
    assert subset.lacking("txt").tolist() == [0, 3, 4]
    assert subset.lacking("cls").tolist() == []
    assert [subset.key(n) for n in range(6)] == ["0", "1", "2", "3", "6", "10"]
    assert subset.shard_samples.tolist() == [6]
    for bad in ([1, 1], [2, 1], [0, 20]):
        with pytest.raises(DataError, match=r"different samples 0\.\.19 in their order"):
            Subset(index, np.array(bad))
    with pytest.raises(IndexError):
        subset.read(6)


def test_numbers_are_found_once_for_all_processes(folder, tmp_path):
    subset_of(folder, tmp_path, CHOSEN)
    made = list((tmp_path / "subsets").glob("*.npy"))
    assert len(made) == 1
    again = open_subset(load_index(folder), Filter(keys=str(tmp_path / "0.txt")),
                        tmp_path / "subsets")  # fmt: skip
    assert isinstance(again.numbers.base, np.memmap)
    assert again.numbers.tolist() == CHOSEN
    made[0].write_bytes(made[0].read_bytes()[:40])  # a disk that was full
    assert subset_of(folder, tmp_path, CHOSEN).numbers.tolist() == CHOSEN


# ---------------------------------------------------------------------------- runs


def trained(config) -> dict[str, torch.Tensor]:
    assert trainer.train(config) == 0
    return checkpoint.newest(config.run_dir / "checkpoints").weights()


STEPS = ("train.steps=4", "train.save_every=2", "data.image=png")


def digits_alone(digits: Path, path: Path, chosen) -> Path:
    index, path = load_index(digits / "train"), path
    path.mkdir()
    for shard, (a, b) in enumerate(itertools.pairwise(index.shard_starts.tolist())):
        samples = (index.read_contents(n) for n in chosen if a <= n < b)
        write_samples(path / f"{shard:02d}.tar", list(samples))
    index_folder(path)
    return path


def test_a_run_on_a_subset_is_the_run_on_shards_with_it_alone(digits, overrides, tmp_path):
    """Bitwise, labels and balance included; it goes on with other ranks, and not with other
    keys."""
    chosen = [n for n in range(1437) if n % 4]
    index, keys = load_index(digits / "train"), tmp_path / "keys.txt"
    keys.write_text("\n".join(str(index.key(n)) for n in chosen))
    alone = digits_alone(digits, tmp_path / "alone", chosen)
    train = f"data.train={{shards: '{digits}/train', filter: {{keys: '{keys}'}}}}"
    source = train, f"data.cache.folder={tmp_path}/cache"
    expected = trained(
        config_of("labelled", overrides, tmp_path / "a", *STEPS, f"data.train={alone}")
    )
    found = trained(config_of("labelled", overrides, tmp_path / "b", *STEPS, *source))
    assert all(torch.equal(found[name], x) for name, x in expected.items())

    config = config_of("labelled", overrides, tmp_path / "c", *STEPS, *source)
    trainer.train(config, stop_after=1)
    record = json.loads((tmp_path / "c" / "data.json").read_text())
    assert record[0]["samples"] == len(chosen)
    text = keys.read_text()
    keys.write_text(text.partition("\n")[2])
    with pytest.raises(ConfigError, match=f"was trained on {len(chosen)} samples .*, now 1076 "):
        trainer.train(config)
    lines = text.splitlines()
    lines[0] = str(index.key(0))  # as many, and another one
    keys.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"was trained on 1077 samples .*, now 1077 samples"):
        trainer.train(config)
    keys.write_text(text)
    assert run_ranks(trainer.train, 2, config) == [0, 0]
    for name, x in checkpoint.newest(tmp_path / "c" / "checkpoints").weights().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def test_a_filter_of_rows_is_that_of_the_rows_packed(tmp_path):
    table = tmp_path / "rows.csv"
    lines = [f"text {n},{n % 5},{n * 7 % 30}" for n in range(60)]
    table.write_text("caption,label,clip\n" + "\n".join(lines))
    source = Rows(Rows.Config(path=str(table)))
    packed = pack_dataset(table, tmp_path / "packed").index
    (tmp_path / "keys.txt").write_text("\n".join(f"{n:09d}" for n in range(0, 60, 2)))
    for wanted in ({"keys": str(tmp_path / "keys.txt")}, {"where": {"cls": [1, 2]}}):
        subsets = [open_subset(x, Filter(**wanted), tmp_path / "subsets") for x in (source, packed)]
        assert np.array_equal(subsets[0].numbers, subsets[1].numbers)
        assert global_batches(subsets[0], epochs=2) == global_batches(subsets[1], 2, epochs=2)


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "a filter without conditions takes all; give keys, where or score"),
        ({"scores": "x.csv"}, "a filter without conditions"),
        ({"keys": "x.txt", "scores": "x.csv"}, "scores without score; name the column"),
        ({"score": "json.x"}, "score goes with top or above; give both, or neither"),
        ({"keys": "x.txt", "top": 0.5}, "score goes with top or above"),
        ({"score": "json.x", "top": 0}, "top"),
        ({"where": {}}, "no conditions; give some"),
        ({"where": {"cls": []}}, "cls has"),
        ({"where": {"cls": {"below": 3}}}, "give numbers as at_least, at_most or both"),
        ({"where": {"cls": {"at_least": "3"}}}, "give numbers as at_least"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        Filter.checked(settings)


def test_keys_of_no_sample_are_counted_and_named(folder, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("photos/s1\nnobody\nphotos/s2\nphotos/s100\n")
    index = load_index(folder)
    words = r"2 of 4 keys in .* are of no sample, as 'nobody', 'photos/s100'; correct them, or "
    with pytest.raises(DataError, match=words + "allow so many: filter.max_unknown=2"):
        numbers_of(index, tmp_path, keys=str(keys), max_unknown=1)
    assert numbers_of(index, tmp_path, keys=str(keys), max_unknown=2) == [1, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keys": "nowhere.txt"}, "nowhere.txt, which names samples, cannot be read"),
        ({"keys": "empty.txt"}, "names no keys"),
        ({"keys": "keys.json"}, "is of no kind that is read here; give .txt, .csv"),
        ({"keys": "bad.npy"}, "holds float64"),
        ({"keys": "bad.parquet"}, "cannot be read"),
        ({"keys": "scores.csv", "column": "uid"}, "has no column 'uid'; name one of key, clip"),
        ({"scores": "scores.csv", "score": "clip", "top": 1}, "gives 1 keys again with another"),
        ({"scores": "empty.txt", "score": "clip", "top": 1}, "give .csv, .parquet"),
        ({"where": {"colour": 1}}, "no field 'colour', by which a filter takes them; name one of"),
        ({"where": {"cls": -7}}, r"none of the 100 samples of .* is taken by the filter \{'where'"),
        ({"score": "json.nothing", "top": 1}, "none of the 100 samples"),
    ],
)
def test_filters_that_cannot_be_used(settings, words, folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "keys.json").write_text("[]")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    np.save(tmp_path / "bad.npy", np.zeros(3))
    (tmp_path / "scores.csv").write_text("key,clip\nphotos/s1,0.5\nphotos/s1,0.6\n")
    paths = {name: str(tmp_path / settings[name]) for name in ("keys", "scores") if name in
             settings}  # fmt: skip
    with pytest.raises((ConfigError, DataError), match=words):
        numbers_of(load_index(folder), tmp_path, **{**settings, **paths})


def test_an_index_of_an_older_version(folder, tmp_path):
    """It is read as before; only keys want a newer one, which `shards index` writes."""
    copy = write(tmp_path / "old", [range(10)])
    with np.load(copy / "index.npz") as file:
        arrays = {name: file[name] for name in file if name != "sample_key"}
    np.savez(copy / "index.npz", **arrays)
    index = load_index(copy)
    assert numbers_of(index, tmp_path, where={"cls": [3, 4]}) == [3, 4]
    assert len(ShardStream([index, load_index(folder)], **ORDER).index) == 110
    (tmp_path / "keys.txt").write_text("photos/s3\n")
    with pytest.raises(DataError, match="older version, which has no keys; run `dist-contrastive"):
        numbers_of(index, tmp_path, keys=str(tmp_path / "keys.txt"))
    assert index_folder(copy).has_keys
    assert numbers_of(load_index(copy), tmp_path, keys=str(tmp_path / "keys.txt")) == [3]
