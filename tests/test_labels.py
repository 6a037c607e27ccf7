"""Labels and second modalities of samples; the table of all labels of a data set."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_contrastive.data import Fields, ShardIndex, ShardStream, index_folder
from dist_contrastive.data.collate import collate, without_rows
from dist_contrastive.data.labels import check_labels, keep_per_class, read_label_table
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.testing import RankError, run_ranks

IMAGE = np.zeros((1, 2, 2), np.uint8)
CLASSES = Fields("png", "json.label", num_classes=5)
CONTINUOUS = Fields("png", "json.label")


def shards(folder: Path, labels: list, per_shard: int = 3) -> ShardIndex:
    """Sample n has the key s<n> and labels[n] in `json`, which may be what JSON cannot hold."""
    for start in range(0, len(labels), per_shard):
        chosen = enumerate(labels[start : start + per_shard], start)
        samples = ({"__key__": f"s{n}", "png": IMAGE, "json": {"label": x}} for n, x in chosen)
        write_samples(folder / f"{start:04d}.tar", samples)
    return index_folder(folder)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(-99), b.nan_to_num(-99))


# ---------------------------------------------------------------------------- labels of samples


@pytest.mark.parametrize(
    ("fields", "held", "expected"),
    [
        (CLASSES, [3, None, -1, math.nan, 0, 4.0], torch.tensor([3, -1, -1, -1, 0, 4])),
        (CLASSES, [None, None], torch.tensor([-1, -1])),
        (
            CONTINUOUS,
            [3, None, -1, math.nan, 0.25],
            torch.tensor([3, math.nan, -1, math.nan, 0.25], dtype=torch.float64),
        ),
        (CONTINUOUS, [None], torch.tensor([math.nan], dtype=torch.float64)),
    ],
)
def test_labels_and_missing_ones(tmp_path: Path, fields: Fields, held: list, expected):
    index = shards(tmp_path, held)
    numbers = range(len(held))
    assert same(fields.labels(index, numbers), expected)
    samples = fields.read(index, numbers)
    assert samples.labels is not None
    assert same(samples.labels, expected)
    assert same(fields.labels(index, range(0)), expected[:0])
    backwards = [*reversed(numbers)]
    assert same(fields.labels(index, backwards), expected.flip(0))


@pytest.mark.parametrize("name", ["cls", "npy", "json"])
def test_labels_that_are_whole_fields(tmp_path: Path, name: str):
    held = {"cls": [2, -1, 0], "npy": [np.int16(2), np.float32("nan"), np.uint8(0)]}
    values = held.get(name, [2, None, 0])
    samples = [{"__key__": f"s{n}", "png": IMAGE, name: v} for n, v in enumerate(values)]
    write_samples(tmp_path / "a.tar", samples)
    index, fields = index_folder(tmp_path), Fields("png", name, num_classes=3)
    assert fields.labels(index, range(3)).tolist() == [2, -1, 0]
    labels = fields.read(index, range(3)).labels
    assert labels is not None
    assert labels.tolist() == [2, -1, 0]


@pytest.mark.parametrize(
    ("fields", "value", "message"),
    [
        (CLASSES, 5, r"sample s1 has label 5, outside 0\.\.4; set data\.num_classes"),
        (CLASSES, -2, r"sample s1 has label -2, outside 0\.\.4"),
        (CLASSES, 10**30, r"sample s1 has label 1000000000000000000000000000000, outside"),
        (CLASSES, 1.5, r"has label 1\.5 in 'json\.label'; classes are whole numbers 0\.\.4"),
        (CLASSES, math.inf, "has label inf in .* classes are whole"),
        (CLASSES, True, "sample s1 has label True in"),
        (CLASSES, "2", "sample s1 has label '2' in"),
        (CLASSES, [2], r"sample s1 has label \[2\] in"),
        (CONTINUOUS, math.inf, "s1 has label inf in .*continuous labels are finite.*num_classes"),
        (CONTINUOUS, -math.inf, "has label -inf in"),
        (CONTINUOUS, 10**400, "has label 1000.* in .* are finite numbers"),
        (CONTINUOUS, False, "has label False in"),
        (CONTINUOUS, "0.5", r"has label '0\.5' in"),
    ],
)
def test_wrong_labels_name_the_sample(tmp_path: Path, fields: Fields, value, message: str):
    index = shards(tmp_path, [1, value])
    for read in (fields.labels, fields.read):
        with pytest.raises(DataError, match=message) as error:
            read(index, range(2))
        assert "\n" not in str(error.value)


def test_missing_labels_are_refused_where_all_are_needed(tmp_path: Path):
    index = shards(tmp_path, [1, None, 2])
    for fields in (CLASSES, CONTINUOUS):
        needed = Fields("png", "json.label", fields.num_classes, labels_required=True)
        for read in (needed.labels, needed.read):
            with pytest.raises(
                DataError, match=r"sample s1 has no label .*needs one; label it, or"
            ):
                read(index, range(3))
        assert needed.labels(index, [0, 2]).tolist() == [1, 2]


def test_absent_fields_are_errors_whatever_may_be_missing(tmp_path: Path):
    index = shards(tmp_path, [1, 2])
    for read in ("labels", "read"):
        with pytest.raises(DataError, match="sample s0 has no 'colour' in its field 'json'"):
            getattr(Fields("png", "json.colour"), read)(index, range(2))
        with pytest.raises(DataError, match=r"samples have no field 'cls'; .*: json, png"):
            getattr(Fields("png", "cls"), read)(index, range(2))
        with pytest.raises(DataError, match="sample s0 has no 'x' in its field 'png'"):
            getattr(Fields("png", "png.x"), read)(index, range(2))
    with pytest.raises(DataError, match=r"data\.label is null; set it"):
        Fields("png").labels(index, range(2))


def test_labels_are_read_without_decoding_images(tmp_path: Path):
    write_samples(tmp_path / "a.tar", [{"__key__": "k", "png": b"no image", "cls": 3}])
    index = index_folder(tmp_path)
    assert Fields("png", "cls", 5).labels(index, [0]).tolist() == [3]
    with pytest.raises(DataError, match=r"field 'png' of sample 'k' .* cannot be decoded"):
        Fields("png", "cls", 5).read(index, [0])


# ---------------------------------------------------------------------------- second modality


def test_second_modalities(digits: Path):
    index = load_index(digits / "test")
    decoded = [index.read(n) for n in range(4)]
    texts, profiles, images = (
        Fields("png", pair=name).read(index, range(4)).pair for name in ("txt", "npy", "png")
    )
    assert texts == tuple(sample["txt"] for sample in decoded)
    assert isinstance(profiles, torch.Tensor)
    assert profiles.dtype == torch.float32
    assert profiles.tolist() == [sample["npy"].tolist() for sample in decoded]
    assert isinstance(images, torch.Tensor)
    assert torch.equal(images, torch.stack([sample["png"] for sample in decoded]) / 255)
    assert Fields("png").read(index, range(4)).pair is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_samples_move_with_all_their_tensors(digits: Path, device: str):
    index = load_index(digits / "test")
    for pair in ("txt", "npy"):
        moved = Fields("png", "json.label", 10, pair).read(index, range(2)).to(torch.device(device))
        columns = [moved.images, moved.labels, moved.epoch, moved.index, moved.pair]
        tensors = [x for x in columns if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {device}
        assert len(tensors) == (4 if pair == "txt" else 5)
        assert pair == "npy" or isinstance(moved.pair, tuple)


def test_other_values_are_no_second_modality(tmp_path: Path):
    held = [{"npy": np.ones(n + 1), "json": {}, "bin": b"x"} for n in range(2)]
    samples = [{"__key__": f"s{n}", "png": IMAGE, **fields} for n, fields in enumerate(held)]
    write_samples(tmp_path / "a.tar", samples)
    index = index_folder(tmp_path)
    for name, kind in (("npy", r"an array of shape \[1\]"), ("json", r"\{\}"), ("bin", "bytes")):
        with pytest.raises(DataError, match=f"sample s0 holds {kind} in '{name}'.*data.pair"):
            Fields("png", pair=name).read(index, range(2))
    with pytest.raises(DataError, match="samples have no field 'wav'"):
        Fields("png", pair="wav").read(index, range(2))


@pytest.mark.parametrize(
    ("fields", "label_dtype"),
    [
        (Fields("png", "json.label", 10, "npy", labels_required=True), torch.int64),
        (Fields("png", "json.slant", None, "png"), torch.float64),
        (Fields("png", pair="txt"), None),
    ],
)
def test_batches_without_rows_keep_their_types(digits: Path, fields: Fields, label_dtype):
    index = load_index(digits / "test")
    rows = [{**index.read(n), "__epoch__": 0, "__index__": n} for n in range(2)]
    whole, empty = (fields.samples(b) for b in (collate(rows), without_rows(collate(rows))))
    assert empty.images.shape == (0, 1, 8, 8)
    assert empty.images.dtype == torch.float32
    for mine, other in ((empty.epoch, whole.epoch), (empty.index, whole.index)):
        assert (len(mine), mine.dtype) == (0, other.dtype)
    if label_dtype is None:
        assert empty.labels is None
        assert empty.pair == ()
    else:
        assert empty.labels is not None
        assert (empty.labels.shape, empty.labels.dtype) == ((0,), label_dtype)
        assert isinstance(empty.pair, torch.Tensor)
        assert isinstance(whole.pair, torch.Tensor)
        assert empty.pair.shape == (0, *whole.pair.shape[1:])
        assert empty.pair.dtype == torch.float32


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path, num_workers: int):
    """Columns take another type where one of their values is missing."""
    values = [0, 1, math.nan, 2, None, 3, -1, 4]
    for n, value in enumerate(values):
        text = json.dumps(value).encode()
        write_samples(tmp_path / f"{n}.tar", [{"__key__": f"s{n}", "png": IMAGE, "json": text}])
    index, fields = index_folder(tmp_path), Fields("png", "json", 5)
    table = fields.labels(index, range(8))
    assert table.tolist() == [0, 1, -1, 2, -1, 3, -1, 4]
    settings = {"lanes": 2, "seed": 0, "num_workers": num_workers, "epochs": 2}
    for batch in ShardStream(index, global_batch_size=4, **settings):
        samples = fields.samples(batch)
        assert samples.labels is not None
        assert same(samples.labels, table[samples.index])


# ---------------------------------------------------------------------------- the label table


def read_table_on_rank(folder: Path, fields: Fields) -> torch.Tensor:
    return read_label_table(load_index(folder), fields)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_label_table_on_all_ranks(digits: Path, ranks: int):
    index = load_index(digits / "test")
    rows = [index.read(n)["json"] for n in range(len(index))]
    for name, classes, dtype in (("label", 10, torch.int64), ("slant", None, torch.float64)):
        expected = torch.tensor([row[name] for row in rows], dtype=dtype)
        fields = Fields("png", f"json.{name}", classes)
        tables = run_ranks(read_table_on_rank, ranks, digits / "test", fields)
        assert len(tables) == ranks
        assert all(same(table, expected) for table in tables)


def test_label_table_of_fewer_samples_than_ranks(tmp_path: Path):
    shards(tmp_path, [4, None])
    for table in run_ranks(read_table_on_rank, 3, tmp_path, CLASSES):
        assert same(table, torch.tensor([4, -1]))
    assert same(read_table_on_rank(tmp_path, CLASSES), torch.tensor([4, -1]))


def table_error_on_rank(folder: Path) -> tuple[str, str]:
    try:
        read_table_on_rank(folder, CLASSES)
    except DataError as error:
        dist.barrier()  # all ranks are here, so none waits in an exchange
        return type(error).__name__, str(error)
    return "none", ""


def test_wrong_label_of_one_rank_is_raised_on_all(tmp_path: Path):
    shards(tmp_path, [1, 2, 3, 4, 0, "x"])
    try:
        seen = run_ranks(table_error_on_rank, 3, tmp_path, timeout_s=30)
    except RankError as error:
        pytest.fail(f"a rank did not raise: {error}")
    sentence = "sample s5 has label 'x' in 'json.label'; classes are whole numbers 0..4"
    assert [kind for kind, _ in seen] == ["DataError"] * 3
    assert all(sentence in message for _, message in seen)
    assert seen[0][1].startswith("rank 2: ")


# ---------------------------------------------------------------------------- fewer labels


def test_keep_per_class(digits: Path):
    labels = Fields("png", "json.label", 10).labels(load_index(digits / "test"), range(360))
    before = labels.clone()
    kept = {n: keep_per_class(labels, n, seed=3) for n in (1, 5, 30)}
    assert torch.equal(labels, before)
    for n, table in kept.items():
        assert table.dtype == torch.int64
        assert table[table >= 0].bincount().tolist() == [n] * 10
        assert torch.equal(table[table >= 0], labels[table >= 0])
        assert torch.equal(table, keep_per_class(labels, n, seed=3))
    assert bool(((kept[1] < 0) | (kept[5] >= 0)).all())  # fewer are a part of more
    assert bool(((kept[5] < 0) | (kept[30] >= 0)).all())
    assert not torch.equal(kept[5], keep_per_class(labels, 5, seed=4))


def test_what_is_kept_of_a_class_does_not_depend_on_the_others():
    labels = torch.tensor([0, 1] * 30)
    fewer = torch.where(labels == 1, -1, labels)
    both, one = keep_per_class(labels, 4, seed=0), keep_per_class(fewer, 4, seed=0)
    assert torch.equal(both == 0, one == 0)
    assert torch.equal(keep_per_class(labels, 30, seed=0), labels)


def test_keep_per_class_refuses():
    labels = torch.tensor([0, 0, 0, 7, 7, -1])
    with pytest.raises(ConfigError, match=r"=3 cannot be kept of class 7, which has 2; keep 2 or"):
        keep_per_class(labels, 3, seed=0)
    with pytest.raises(ConfigError, match="per_class=0 is below 1; keep 1"):
        keep_per_class(labels, 0, seed=0)
    with pytest.raises(ConfigError, match=r"are continuous; set data\.num_classes"):
        keep_per_class(labels.double(), 1, seed=0)


def test_labels_that_tell_nothing_apart():
    nan = math.nan
    for useless, message in (
        (torch.tensor([-1, -1]), "all 2 labels are missing; set data.label"),
        (torch.tensor([nan, nan, nan]), "all 3 labels are missing; set data.label"),
        (torch.tensor([-1, 4, 4]), "all 2 labels are class 4, so .* two classes or more"),
        (torch.tensor([0.5, nan, 0.5, 0.5]), "all 3 continuous labels are 0.5, .* two values"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_labels(useless)
    for fine in ([0, 1], [0, 1, -1], [0.5, nan, 0.25]):
        check_labels(torch.tensor(fine))
