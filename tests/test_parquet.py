"""Parquet read by row groups, against the same rows packed in their order."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from dist_contrastive.data import Filter, PackOptions, ShardStream, load_index, open_subset
from dist_contrastive.data import pack_dataset as pack
from dist_contrastive.data.rows_source import ParquetRows
from dist_contrastive.data.shards.encoding import encode_field
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.pack_options import ShardBounds

GROUP, COUNT = 8, 80
ORDER = {"global_batch_size": 12, "lanes": 6, "seed": 3, "shuffle_window": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two files of five row groups each, as `datasets` writes them."""
    folder = tmp_path_factory.mktemp("parquet")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (COUNT, 1, 6, 6), np.uint8)
    columns = {
        "image": [{"bytes": encode_field("png", x), "path": None} for x in pictures],
        "caption": [f"text {n}" if n % 7 else None for n in range(COUNT)],
        "label": [n % 4 for n in range(COUNT)],
        "clip": [n % 10 / 10 for n in range(COUNT)],
    }
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(4),
        clip=datasets.Value("float32"),
    )  # fmt: skip
    data = datasets.Dataset.from_dict(columns, features)
    for part, half in enumerate((range(40), range(40, 80))):
        data.select(half).to_parquet(folder / f"{part}.parquet", batch_size=GROUP)
    return folder


def source_of(path: Path, **settings) -> ParquetRows:
    return ParquetRows(ParquetRows.Config(path=str(path), **settings))


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "shards"
    whole = tmp_path_factory.mktemp("whole")
    tables = [parquet.read_table(folder / f"{part}.parquet") for part in (0, 1)]
    parquet.write_table(pa.concat_tables(tables), whole / "rows.parquet")
    options = PackOptions(seed=None, bounds=ShardBounds(samples=GROUP, mib=None))
    pack(whole / "rows.parquet", path, options, field="png")
    return path


def rows(sources, world_size=1, steps=None, **options) -> list[list]:
    ranks = []
    for rank in range(world_size):
        stream = ShardStream(sources, **ORDER, rank=rank, world_size=world_size,
                             only=("png", "cls", "json"), **options)  # fmt: skip
        ranks.append([])
        for x in itertools.islice(stream, steps):
            numbers = x["__epoch__"].tolist(), x["__index__"].tolist(), x["cls"].tolist()
            pixels = [image.numpy().tobytes() for image in x["png"]]
            ranks[-1].append(list(zip(x["__key__"], pixels, x["json"], *numbers, strict=True)))
    return [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 2), (3, 0)])
def test_batches_are_those_of_the_packed_rows(folder, packed, world_size, num_workers):
    """With row groups that were read before the workers were forked, resumed by other ranks."""
    source, index = source_of(folder), load_index(packed)
    assert source.shard_samples.tolist() == index.shard_samples.tolist() == [GROUP] * 10
    assert set(source.fields) == set(index.fields)
    source.read(3)
    expected = rows(index, epochs=2)
    assert rows(source, world_size, epochs=2, num_workers=num_workers) == expected
    later = rows(source, world_size, epochs=2, num_workers=num_workers, consumed=48)
    assert later == expected[4:]


def test_no_more_row_groups_are_kept_than_fit(folder, packed):
    source = source_of(folder, cache_mb=1)
    table = source._table
    table._limit = 2 * table._group(0).nbytes
    expected = rows(load_index(packed), epochs=1)
    assert rows(source, epochs=1) == expected
    assert 1 <= len(table._kept) <= 2
    assert table._held == sum(group.nbytes for group in table._kept.values())


def test_a_filter_of_row_groups(folder, packed, tmp_path):
    wanted = Filter(where={"cls": [1, 2]}, score="json.clip", top=0.5)
    sources = source_of(folder), load_index(packed)
    found = [open_subset(source, wanted, tmp_path / "subsets") for source in sources]
    assert np.array_equal(found[0].numbers, found[1].numbers)
    assert rows(found[0], 2, epochs=2) == rows(found[1], epochs=2)


def test_a_file_that_changes(folder, tmp_path):
    """Another checksum for the next run; the one that reads it ends, with its name."""
    path = tmp_path / "x.parquet"
    path.write_bytes((folder / "0.parquet").read_bytes())
    source = source_of(path)
    assert source.fingerprint == source_of(path).fingerprint
    source.read(0)
    table = parquet.read_table(path)
    parquet.write_table(table.slice(0, 39), path, row_group_size=GROUP)
    source._table._forget()  # as a worker begins
    with pytest.raises(DataError, match=r"x\.parquet has changed since it was opened"):
        source.read(20)
    assert source_of(path).fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nowhere.parquet", {}, "names no Parquet files; give a file, a folder or a pattern"),
        ("bad.parquet", {}, "cannot be read as Parquet"),
        ("*.parquet", {}, "has other columns than"),
        ("1.parquet", {"image": "picture"}, "no column 'picture'"),
    ],
)
def test_files_that_cannot_be_used(name, settings, words, tmp_path):
    if name == "bad.parquet":
        (tmp_path / name).write_bytes(b"PAR1 and no more")
    for number in (1, 2):
        parquet.write_table(pa.table({f"{number}": ["a"]}), tmp_path / f"{number}.parquet")
    with pytest.raises((ConfigError, DataError), match=words):
        source_of(tmp_path / name, **settings)


def test_rows_whose_images_are_paths(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    parquet.write_table(pa.table({"file": ["a.png"] * 3}), tmp_path / "x.parquet")
    source = source_of(tmp_path / "x.parquet", image="file")
    assert torch.equal(source.read(2)["png"], torch.full((1, 4, 4), 9, dtype=torch.uint8))
