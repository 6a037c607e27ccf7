"""Tables and data sets of `datasets` as they lie, against the same rows packed."""

import csv
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_engines import config_of

from dist_contrastive import checkpoint, trainer
from dist_contrastive.data import ShardStream, load_index, pack_dataset
from dist_contrastive.data.rows_source import Rows
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample
from dist_contrastive.testing import run_ranks

COUNT = 96
STEPS = ("train.steps=3", "train.save_every=2", "data.image=png")


@pytest.fixture(scope="module")
def tables(tmp_path_factory, digits) -> dict[str, Path]:
    """The same digits in a .csv beside their files, in Parquet and saved by `datasets`."""
    root = tmp_path_factory.mktemp("tables")
    index, rows = load_index(digits / "train"), []
    (root / "files").mkdir()
    for number in range(COUNT):
        sample = index.read(number)
        picture = Image.fromarray(sample["png"][0].numpy())
        path = root / "files" / (f"{number}.jpg" if number % 7 == 0 else f"{number}.png")
        picture.save(path)
        rows.append((f"files/{path.name}", sample["txt"], sample["json"]["label"]))
    with (root / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "label"), *rows])
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(10)
    )
    columns = {
        "image": [{"bytes": (root / path).read_bytes(), "path": None} for path, _, _ in rows],
        "caption": [text for _, text, _ in rows],
        "label": [label for *_, label in rows],
    }
    data = datasets.Dataset.from_dict(columns, features)
    data.to_parquet(root / "rows.parquet")
    data.save_to_disk(root / "saved")
    return {"csv": root / "rows.csv", "parquet": root / "rows.parquet", "saved": root / "saved"}


def rows_of(path: Path, **settings) -> Rows:
    return Rows(Rows.Config(path=str(path), **settings))


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_batches_are_those_of_the_packed_rows(kind, tables, tmp_path):
    image = "image" if kind == "csv" else None  # a column of paths might be one of texts
    packed, source = tmp_path / "packed", rows_of(tables[kind], image=image)
    pack_dataset(tables[kind], packed, field="png", image=image)
    index = load_index(packed)
    assert set(source.fields) == set(index.fields)
    settings = {"global_batch_size": 24, "lanes": 4, "seed": 3, "epochs": 2, "num_workers": 0}
    for rank in (0, 1):
        both = {"rank": rank, "world_size": 2, "only": {"png", "cls", "txt", "json"}}
        streams = ShardStream(packed, **settings, **both), ShardStream(source, **settings, **both)
        count = 0
        for a, b in zip(*streams, strict=True):
            count += 1
            assert a["__key__"] == b["__key__"]
            assert a["txt"] == b["txt"]
            assert a["json"] == b["json"]
            assert torch.equal(a["png"], b["png"])
            assert torch.equal(torch.as_tensor(a["cls"]), torch.as_tensor(b["cls"]))
        assert count == 8


def test_a_run_on_parquet_is_the_run_on_shards(tables, overrides, tmp_path):
    """With data workers, and on two ranks after a stop."""
    pack_dataset(tables["parquet"], tmp_path / "packed", field="png")
    name = f"{{name: rows, path: '{tables['parquet']}'}}"
    runs = {"packed": str(tmp_path / "packed"), "rows": name, "stopped": name}
    found = {}
    for run, train in runs.items():
        data = f"data.train={train}", f"data.test={train}", "data.label=cls", "data.balance=null"
        config = config_of(
            "labelled", overrides, tmp_path / run, *STEPS, *data, "data.num_workers=2"
        )
        if run == "stopped":
            trainer.train(config, stop_after=1)
            assert run_ranks(trainer.train, 2, config) == [0, 0]
        else:
            assert trainer.train(config) == 0
        found[run] = checkpoint.newest(tmp_path / run / "checkpoints").weights()
    for key, x in found["packed"].items():
        assert torch.equal(found["rows"][key], x)
        torch.testing.assert_close(found["stopped"][key], x, rtol=1e-4, atol=1e-5)


def test_arrays_and_what_a_row_lacks(tmp_path):
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    data = datasets.Dataset.from_dict(
        {"vector": vectors.tolist(), "text": ["a", None, "c", "d"]},
        datasets.Features(
            vector=datasets.List(datasets.Value("float32")), text=datasets.Value("string")
        ),
    )
    data.to_parquet(tmp_path / "x.parquet")
    source = rows_of(tmp_path / "x.parquet")
    assert set(source.fields) == {"json", "npy", "txt"}
    found = {source.read(n)["json"]["index"]: source.read(n) for n in range(4)}
    for number, sample in found.items():
        assert torch.equal(torch.as_tensor(sample["npy"]), torch.from_numpy(vectors[number]))
    assert "txt" not in found[1]
    missing = next(n for n in range(4) if source.read(n)["json"]["index"] == 1)
    with pytest.raises(UnreadableSample, match="txt"):
        source.read(missing, {"txt"})


def test_other_rows_have_another_fingerprint(tables, tmp_path):
    text = tables["csv"].read_text().splitlines()
    same, fewer, other = (tables["csv"].with_name(f"{name}.csv") for name in ("s", "f", "o"))
    same.write_text("\n".join(text) + "\n")
    fewer.write_text("\n".join(text[:-1]) + "\n")
    other.write_text("\n".join([*text[:-1], text[1]]) + "\n")
    prints = [rows_of(path).fingerprint for path in (tables["csv"], same, fewer)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "nowhere.parquet"}, "does not exist"),
        ({"path": "CSV", "image": "picture"}, "no column 'picture'"),
        ({"path": "EMPTY"}, "no rows|no columns|empty"),
    ],
)
def test_tables_that_cannot_be_used(settings, words, tables, tmp_path):
    (tmp_path / "empty.csv").write_text("image,caption\n")
    places = {"CSV": str(tables["csv"]), "EMPTY": str(tmp_path / "empty.csv")}
    settings = {**settings, "path": places.get(settings["path"], settings["path"])}
    with pytest.raises((ConfigError, DataError), match=words):
        Rows(Rows.Config(**settings))


def test_an_image_that_is_broken_is_named(tmp_path):
    """It is replaced by the stream, as one in shards is."""
    whole = io.BytesIO()
    Image.new("L", (4, 4)).save(whole, "PNG")
    images = [{"bytes": whole.getvalue(), "path": None}] * 3 + [{"bytes": b"no", "path": None}]
    data = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()))
    data.to_parquet(tmp_path / "x.parquet")
    source, broken = rows_of(tmp_path / "x.parquet"), []
    for number in range(4):
        try:
            source.read(number, {"png"})
        except UnreadableSample as error:
            broken.append(str(error))
    assert len(broken) == 1
    assert "row 3" in broken[0]
