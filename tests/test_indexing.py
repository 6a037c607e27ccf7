"""Index files written part by part: the bytes of all at once, in little memory, by processes."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dist_contrastive.cli import main
from dist_contrastive.data import ShardIndex, index_folder, load_index
from dist_contrastive.data.shards.index import ARRAYS, concatenate
from dist_contrastive.data.shards.index_file import IndexWriter, save_index
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import DataError

COUNTS = (5, 0, 9, 1, 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of different fields; the third names classes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, count in enumerate(COUNTS):
        more = {"json": {"label": 1, "class": "one"}} if shard == 2 else {"txt": "x" * shard}
        write_samples(
            folder / f"{shard}.tar",
            [
                {"__key__": f"{shard}-{n}", "cls": n, **(more if n % 2 else {})}
                for n in range(count)
            ],
        )
    return folder


def saved_at_once(index: ShardIndex, path: Path) -> bytes:
    """As NumPy writes it."""
    np.savez(
        path,
        version=np.int64(2),
        shards=np.array([Path(shard).name for shard in index.shards]),
        shard_sha256=np.array(index.shard_sha256),
        fields=np.array(index.fields),
        shard_left_out=np.array([json.dumps(x) for x in index.shard_left_out]),
        classes=np.array(json.dumps(sorted(index.classes.items()))),
        **{name: getattr(index, name) for name in ARRAYS},
    )
    return path.read_bytes()


def test_the_file_is_that_of_numpy_however_it_was_made(folder, tmp_path):
    index = index_folder(folder)
    content = (folder / "index.npz").read_bytes()
    assert content == saved_at_once(index, tmp_path / "numpy.npz")
    assert index.fields == ("cls", "json", "txt")
    assert index.classes == {1: "one"}
    parts = [index.select([number]) for number in range(len(COUNTS))]
    save_index(concatenate(parts), folder / "other.npz")
    assert (folder / "other.npz").read_bytes() == content
    for options in ({"workers": 2, "full": True}, {}):
        index_folder(folder, **options)
        assert (folder / "index.npz").read_bytes() == content


def test_machines_index_a_part_each(folder, tmp_path, monkeypatch, capsys):
    """What they made is put together without a look into the tars."""
    content = (index_folder(folder), (folder / "index.npz").read_bytes())[1]
    (folder / "index.npz").unlink()
    for name, pattern in (("a", "{0..1}"), ("b", "{2..3}")):
        index_folder(f"{folder}/{pattern}.tar", tmp_path / f"{name}.npz")
    flags = [word for name in "ab" for word in ("--reuse", str(tmp_path / f"{name}.npz"))]
    assert main(["shards", "index", str(folder), *flags]) == 0
    assert "22 samples in 5 shards, of which 1 were read" in capsys.readouterr().out
    assert (folder / "index.npz").read_bytes() == content
    with pytest.raises(DataError, match="cannot be read"):
        index_folder(folder, reuse=[tmp_path / "nowhere.npz"])
    write_samples(folder / "2.tar", [{"__key__": "new", "cls": 3}])
    flags = {"reuse": [tmp_path / "a.npz", tmp_path / "b.npz"]}
    assert index_folder(folder, **flags).shard_samples.tolist() == [5, 0, 1, 1, 7]


def test_no_more_than_a_part_is_in_memory(folder, tmp_path):
    """30 parts of 0.9 MB each; the peak is that of a few."""
    index = index_folder(folder)
    samples, fields = 20_000, len(index.fields)
    shapes = {name: (samples, fields) if name.startswith("member") else (samples,) for name in
              ARRAYS if not name.startswith("shard")}  # fmt: skip
    rng = np.random.default_rng(0)
    tables = {name: rng.integers(0, 2**15, shape).astype(ARRAYS[name]) for name, shape in
              shapes.items()}  # fmt: skip
    size = sum(table.nbytes for table in tables.values())
    tracemalloc.start()
    with IndexWriter(tmp_path / "large.npz") as writer:
        for number in range(30):
            writer.add(
                ShardIndex(
                    shards=(f"{folder}/{number}.tar",),
                    shard_bytes=np.array([2**30]),
                    shard_sha256=("0" * 64,),
                    shard_samples=np.array([samples]),
                    fields=index.fields,
                    **{name: table.copy() for name, table in tables.items()},
                )
            )
        writer.save({})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "large.npz").stat().st_size > 30 * size
    assert peak < 5 * size
    with np.load(tmp_path / "large.npz") as file:
        for name, table in tables.items():
            assert np.array_equal(file[name], np.concatenate([table] * 30))


def test_a_shard_stands_once_in_an_index(folder, tmp_path):
    index = index_folder(folder)
    with IndexWriter(tmp_path / "twice.npz") as writer:
        writer.add(index)
        writer.add(index.select([3]))
        with pytest.raises(DataError, match=r"3\.tar is given twice"):
            writer.save({})
    assert not (tmp_path / "twice.npz").exists()
    assert len(load_index(folder)) == sum(COUNTS)
