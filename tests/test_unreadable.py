"""Samples that are damaged, missing or incomplete: counted, listed, replaced alike everywhere."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, global_batches, run_forked
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_contrastive.cli import main
from dist_contrastive.data import Balance, ShardStream, index_folder, load_index
from dist_contrastive.data.keyed_random import keyed_number
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.stream.order import SampleOrder
from dist_contrastive.data.stream.reader import Skipped, substitute
from dist_contrastive.errors import DataError
from dist_contrastive.metrics import read_rows

COUNTS = (30, 1, 25, 16)  # 72 samples
ORDER = {"global_batch_size": 12, "lanes": 6, "seed": 2, "shuffle_window": 4}
DAMAGED = (3, 4, 31, 60)


def write(folder: Path, counts: Iterable[int] = COUNTS) -> Path:
    """Sample n has the key s<n>, and n in `cls` and `txt`."""
    folder.mkdir(exist_ok=True)
    numbers = itertools.count()
    for shard, count in enumerate(counts):
        chosen = itertools.islice(numbers, count)
        samples = [{"__key__": f"s{n}", "cls": n, "txt": str(n)} for n in chosen]
        write_samples(folder / f"{shard}.tar", samples)
    index_folder(folder)
    return folder


def damage(folder: Path, samples: Iterable[int], field: str = "cls") -> None:
    """Change a byte of a field of these samples, as a disk does: the time of the file stays."""
    index = load_index(folder)
    for number in samples:
        place = index.sample_offset[number] + index.member_start[number, index.fields.index(field)]
        path = Path(index.shards[index.shard_of(number)])
        status = path.stat()
        data = bytearray(path.read_bytes())
        data[int(place) + 512] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("damaged") / "shards")
    damage(folder, DAMAGED)
    return folder


def read(
    source, world_size: int = 1, **options
) -> tuple[list[list[tuple[int, int]]], list[Skipped]]:
    """Global batches as (epoch, sample), and what was skipped, over all ranks."""
    batches, skipped = [], []
    for rank in range(world_size):
        stream = ShardStream(source, **{**ORDER, **options}, rank=rank, world_size=world_size)
        mine = []
        for batch in stream:
            numbers = batch["__index__"].tolist()
            assert batch["__key__"] == [f"s{n}" for n in numbers]
            mine.append(list(zip(batch["__epoch__"].tolist(), numbers, strict=True)))
            skipped += stream.take_skipped()
        batches.append(mine)
    whole = zip(*batches, strict=True)
    return [list(itertools.chain(*parts)) for parts in whole], skipped


def naive(
    epochs: int, bad: Iterable[int], total: int = sum(COUNTS)
) -> tuple[list[list[tuple[int, int]]], list[tuple[int, int, int]]]:
    """Batches as they should be, and (epoch, sample, substitute), written out."""
    order = SampleOrder(COUNTS, tail="carry", **ORDER)
    batches, skipped = [], []
    for start in range(0, epochs * total, 12):
        rows = []
        for lane in range(6):
            span = (order.position(lane, min(c, epochs * total)) for c in (start, start + 12))
            for epoch, number in zip(*order.samples(lane, *span), strict=True):
                key, chosen, tried = (int(epoch), int(number)), int(number), []
                draws = itertools.count()
                while chosen in bad:
                    tried += [chosen] if chosen not in tried else []
                    chosen = keyed_number(total, 2, 6, *key, next(draws))
                rows.append((key[0], chosen))
                skipped += [(key[0], one, chosen) for one in tried]
        batches.append(rows)
    return batches, skipped


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 2), (6, 1), (1, 5)])
def test_damaged_samples_are_replaced_alike_everywhere(folder, world_size, num_workers):
    batches, skipped = read(folder, world_size, num_workers=num_workers, epochs=2, max_skipped=4)
    expected, records = naive(2, DAMAGED)
    assert batches == expected
    assert sorted((s.epoch, s.sample, s.replaced_by) for s in skipped) == sorted(records)
    assert {s.sample for s in skipped} == set(DAMAGED)
    for one in skipped:
        assert one.shard == str(folder / f"{[0, 0, 2, 3][DAMAGED.index(one.sample)]}.tar")
        assert one.key == f"s{one.sample}"  # its first field is damaged, its name is not
        assert f"field 'cls' of sample {one.sample} at byte" in one.reason


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 71), max_size=60), st.sampled_from([1, 2, 3, 6]))
def test_any_set_of_damaged_samples(tmp_path_factory, bad, world_size):
    source = write(tmp_path_factory.mktemp("any") / "shards")
    damage(source, bad)
    batches, skipped = read(source, world_size, epochs=1, max_skipped=len(bad))
    expected, records = naive(1, bad)
    assert batches == expected
    assert sorted((s.epoch, s.sample, s.replaced_by) for s in skipped) == sorted(records)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_the_same_substitutes(folder: Path, num_workers: int):
    whole, _ = read(folder, epochs=2, max_skipped=4)
    rest, _ = read(folder, 2, num_workers=num_workers, epochs=2, max_skipped=4, consumed=60)
    assert rest == whole[5:]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_one_more_than_the_bound_names_the_shards(folder: Path, num_workers: int):
    message = (
        r"4 samples cannot be read, more than max_skipped=3: in .*0\.tar \(2\), .*2\.tar \(1\), "
        r".*3\.tar \(1\); first: shard .* is damaged"
    )
    with pytest.raises(DataError, match=message):
        read(folder, num_workers=num_workers, epochs=1, max_skipped=3)
    with pytest.raises(DataError, match=r"^shard .* is damaged or was changed: field 'cls' of"):
        read(folder, num_workers=num_workers, epochs=1)


def test_a_shard_removed_while_in_use(tmp_path: Path):
    source = write(tmp_path / "shards")
    index = load_index(source)
    (source / "2.tar").unlink()
    batches, skipped = read(index, 2, epochs=1, max_skipped=25)
    assert batches == naive(1, range(31, 56))[0]
    assert {s.sample for s in skipped} == set(range(31, 56))
    assert all(s.key is None and "No such file" in s.reason for s in skipped)


def test_substitutes_keep_class_and_source(tmp_path: Path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    damage(first, range(0, 72, 3))
    damage(second, range(1, 72, 3))
    labels = np.arange(72) % 2
    balance = Balance(labels, classes=2, samples_per_class=6)
    stream = ShardStream(first, balance=balance, max_skipped=24, **ORDER)
    for batch in itertools.islice(stream, 40):
        assert sum(n % 2 for n in batch["cls"].tolist()) == 6
        assert all(n % 3 for n in batch["cls"].tolist())
    assert {s.sample % 2 for s in stream.take_skipped()} == {0, 1}
    stream = ShardStream([first, second], weights=[2, 1], max_skipped=48, **ORDER)
    of_first = 0
    for batch in itertools.islice(stream, 42):
        numbers = batch["__index__"].tolist()
        of_first += sum(n < 72 for n in numbers)
        assert all(n % 3 if n < 72 else n % 3 != 1 for n in numbers)
    assert of_first == 42 * 8
    assert {s.sample < 72 for s in stream.take_skipped()} == {True, False}


def test_samples_without_a_field_count_too(tmp_path: Path):
    source = tmp_path / "shards"
    source.mkdir()
    samples = [{"__key__": f"s{n}", "cls": n, "txt": str(n)} for n in range(72)]
    for number in (5, 40):
        del samples[number]["txt"]
    write_samples(source / "0.tar", samples)
    index = index_folder(source)
    batches, skipped = read(index, epochs=1, only=["txt"], max_skipped=2)
    assert sorted({s.sample for s in skipped}) == [5, 40]
    assert "sample 's5' of shard" in skipped[0].reason + skipped[1].reason
    assert len(list(itertools.chain(*batches))) == 72
    with pytest.raises(DataError, match=r"0\.tar has no field 'txt'; pack it with one"):
        read(index, epochs=1, only=["txt"], max_skipped=1)
    assert read(index, epochs=1, only=["cls"])[1] == [], "fields that are not asked for may lack"


def test_an_order_of_nothing_but_damage_stops(tmp_path: Path):
    source = write(tmp_path / "shards")
    damage(source, range(72))
    with pytest.raises(DataError, match="72 samples that could take the place of each other"):
        read(source, epochs=1, max_skipped=72)


def test_substitutes_are_fixed_for_ever():
    """A change here would change runs that are resumed."""
    order = SampleOrder([1000], tail="carry", **ORDER)
    assert [substitute(order, 1, 7, n) for n in range(3)] == [253, 705, 633]
    assert {substitute(order, e, n, 0) for e in range(3) for n in range(300)} <= set(range(1000))


# ---------------------------------------------------------------------------- in training


def skipped_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


def told(text: str) -> list[int]:
    """Number of samples in each line about skipped ones."""
    counts = re.findall(r"^skipped (a|\d+) samples?.*: shard", text, re.MULTILINE)
    return [1 if count == "a" else int(count) for count in counts]


@pytest.fixture
def damaged_digits(digits: Path, tmp_path: Path) -> Path:
    """One damaged image in each of the eight shards."""
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)  # copy2 keeps the times of the files
    damage(folder, range(20, 1437, 180), "png")
    return folder


def test_training_lists_what_it_skips(tmp_path, overrides, damaged_digits):
    """Two ranks, stopped and resumed by one: one list, each sample once an epoch."""
    config = CONFIGS / "digits_encoder.yaml"
    epochs = ["train.steps=46", "train.log_every=46", f"data.train={damaged_digits}"]
    argv = [config, *overrides(tmp_path / "run", *epochs, "data.max_skipped=8")]
    two = run_forked("train", *argv, "train.log_every=1", "data.num_workers=1", number=2)
    assert two.returncode == 0, two.stderr
    rows = skipped_rows(tmp_path / "run")
    assert {row["sample"] for row in rows} == set(range(20, 1437, 180))
    drawn = [(row["epoch"], row["sample"]) for row in rows]
    assert len(drawn) >= len(set(drawn)) == 16  # two epochs; a substitute may be damaged too
    assert all(row["replaced_by"] not in range(20, 1437, 180) for row in rows)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert sum(told(two.stderr)) == 8  # each once
    assert read_rows(tmp_path / "run")[-1]["skipped"] == 8
    options = overrides(tmp_path / "one", *epochs, "data.max_skipped=8")
    one = run_forked("train", config, *options)
    assert one.returncode == 0, one.stderr
    assert sum(told(one.stderr)) == 8
    assert len(told(one.stderr)) <= 2  # one line for each row that is shown
    assert global_batches(tmp_path / "one") == global_batches(tmp_path / "run")
    alike = [sorted(map(str, skipped_rows(tmp_path / name))) for name in ("one", "run")]
    assert alike[0] == alike[1]


def test_the_bound_holds_over_ranks_and_resumes(tmp_path, overrides, damaged_digits, capsys):
    """No rank alone skips more than 7; together, and after a resume, they are 8."""
    config = CONFIGS / "digits_encoder.yaml"
    epoch = ["train.steps=23", f"data.train={damaged_digits}", "data.max_skipped=7"]
    done = run_forked("train", config, *overrides(tmp_path / "run", *epoch), number=2)
    assert done.returncode == 64, done.stderr
    assert done.stderr.count("8 samples cannot be read, more than max_skipped=7: in ") == 2
    assert len(skipped_rows(tmp_path / "run")) == 8
    assert "Traceback" not in done.stderr
    again = ["train", str(config), *overrides(tmp_path / "run", *epoch)]
    assert main(again) == 64
    assert "8 samples cannot be read" in capsys.readouterr().err
    assert main([*again, "data.max_skipped=8"]) == 0
    assert "going on from step" in capsys.readouterr().err


def test_damaged_labels_count_too(tmp_path, overrides, digits, capsys):
    """They are read once, at the start; the sample is replaced all the same, and counted."""
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    damage(folder, (7, 700), "json")
    config = str(CONFIGS / "digits_supcon.yaml")
    options = [f"data.train={folder}", "train.steps=23", "data.max_skipped=1", "data.balance=null"]
    argv = ["train", config, *overrides(tmp_path / "run", *options)]
    assert main(argv) == 64
    assert "2 samples cannot be read, more than max_skipped=1" in capsys.readouterr().err
    assert main([*argv, "data.max_skipped=2"]) == 0
    assert {row["sample"] for row in skipped_rows(tmp_path / "run")} == {7, 700}
    keys = set(itertools.chain(*global_batches(tmp_path / "run")))
    assert not keys & {load_index(folder).key(n) for n in (7, 700)}


def test_the_first_sample_may_be_the_bad_one(tmp_path, overrides, digits, capsys):
    folder = tmp_path / "train"
    index, samples = load_index(digits / "train"), []
    for number in range(128):
        samples.append(index.read_contents(number))
    del samples[0]["png"]
    samples[1]["png"] = b"no image"
    folder.mkdir()
    write_samples(folder / "0.tar", samples)
    index_folder(folder)
    config = str(CONFIGS / "digits_encoder.yaml")
    argv = ["train", config, *overrides(tmp_path / "run", f"data.train={folder}", "train.steps=2")]
    assert main([*argv, "data.max_skipped=0"]) == 64
    assert "1 of 128 samples have no field 'png'" in capsys.readouterr().err
    assert main([*argv, "data.max_skipped=2"]) == 0


def test_a_damaged_record_of_the_data_is_told_of(tmp_path, overrides, capsys):
    argv = ["train", str(CONFIGS / "digits_encoder.yaml"), *overrides(tmp_path / "run")]
    assert main([*argv, "train.steps=2"]) == 0
    (tmp_path / "run" / "data.json").write_text("[{")
    assert main([*argv, "train.steps=2"]) == 0
    assert "data.json is damaged" in capsys.readouterr().err
    (tmp_path / "run" / "data.json").unlink()
    assert main([*argv, "train.steps=2"]) == 0
