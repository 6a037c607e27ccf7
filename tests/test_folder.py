"""A folder of images as it lies, against the same images packed."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from test_engines import config_of

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.data import ShardStream, load_index, pack_dataset, pack_images
from dist_contrastive.data.folder import ImageFolder
from dist_contrastive.data.rows_source import Rows
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer import loop

STEPS = ("train.steps=3", "train.save_every=2", "data.image=png", "data.label=cls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits) -> Path:
    """120 digits as files, in the folders of their classes, some with texts, some as JPEG."""
    root = tmp_path_factory.mktemp("folder") / "images"
    index = load_index(digits / "train")
    for number in range(120):
        sample = index.read(number)
        place = root / f"class {sample['cls'] if 'cls' in sample else sample['json']['label']}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(sample["png"][0].numpy())
        image.save(place / (f"{number}.jpg" if number % 5 == 0 else f"{number}.png"))
        if number % 4:
            (place / f"{number}.txt").write_text(" " if number % 12 == 1 else sample["txt"])
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    """The same packed, with the fields of the formats under one name."""
    packed = tmp_path_factory.mktemp("shards") / "packed"
    pack_images(folder, packed, field="png")
    return packed


def read_in(folder: Path, *more: str) -> tuple[str, ...]:
    name = f"{{name: folder, path: '{folder}'}}"
    return (f"data.train={name}", f"data.test={name}", *more)


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_those_of_the_packed_images(world_size, folder, shards):
    settings = {"global_batch_size": 24, "lanes": 6, "seed": 7, "epochs": 2, "num_workers": 0}
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size, "only": {"png", "cls", "json"}}
        packed = ShardStream(shards, **settings, **ranks)
        files = ShardStream(ImageFolder(ImageFolder.Config(path=str(folder))), **settings, **ranks)
        count = 0
        for a, b in zip(packed, files, strict=True):
            count += 1
            assert a.keys() == b.keys()
            assert a["__key__"] == b["__key__"]
            assert a["json"] == b["json"]
            assert all(torch.equal(a[name], b[name]) for name in ("png", "cls", "__index__"))
        assert count == 10


def test_what_lies_beside_an_image(folder, shards):
    source, index = ImageFolder(ImageFolder.Config(path=str(folder))), load_index(shards)
    assert len(source) == len(index) == 120
    assert source.classes == index.classes
    blank = {f"{number}" for number in range(120) if number % 12 == 1}
    for number in range(120):
        packed, file = index.read(number), source.read(number)
        assert file.keys() == packed.keys()
        assert file.get("txt") == packed.get("txt")
        if Path(source.key(number)).name in blank:
            with pytest.raises(UnreadableSample, match="txt"):
                source.read(number, {"txt"})
    without = {source.key(number) for number in source.lacking("txt")}
    assert without == {source.key(n) for n in range(120) if int(Path(source.key(n)).name) % 4 == 0}


def trained(config) -> dict[str, torch.Tensor]:
    assert trainer.train(config) == 0
    return checkpoint.newest(config.run_dir / "checkpoints").weights()


def test_a_run_on_files_is_the_run_on_shards(folder, shards, overrides, tmp_path):
    """Bitwise; and it goes on with another number of ranks."""
    packed = f"data.train={shards}", f"data.test={shards}"
    expected = trained(config_of("labelled", overrides, tmp_path / "a", *STEPS, *packed))
    config = config_of("labelled", overrides, tmp_path / "b", *STEPS, *read_in(folder))
    found = trained(config)
    assert all(torch.equal(found[name], x) for name, x in expected.items())

    config = config_of("labelled", overrides, tmp_path / "c", *STEPS, *read_in(folder))
    trainer.train(config, stop_after=1)
    assert run_ranks(trainer.train, 2, config) == [0, 0]
    assert configs.load_run(tmp_path / "c").data.train.path == str(folder)
    for name, x in checkpoint.newest(tmp_path / "c" / "checkpoints").weights().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def test_another_image_is_another_data_set(folder, overrides, tmp_path):
    """A resumed run must find the same; what is unreadable is replaced as in shards."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    changed = next(copy.glob("*/*.png"))
    changed.write_bytes(changed.read_bytes()[:60])
    none = "data.max_skipped=0"
    config = config_of("two_view", overrides, tmp_path / "run", *STEPS, *read_in(copy, none))
    with pytest.raises(DataError, match=changed.stem):
        trainer.train(config)
    more = config_of(
        "two_view", overrides, tmp_path / "run2", *STEPS, *read_in(copy, "data.max_skipped=1")
    )
    trainer.train(more, stop_after=1)
    next(copy.glob("*/*.jpg")).unlink()
    with pytest.raises(ConfigError, match="samples"):
        trainer.train(more)


def test_a_mixture_of_kinds_is_that_of_what_is_packed(folder, shards, tmp_path):
    """Files, rows and shards in one stream, with and without weights, resumed by other ranks."""
    table = tmp_path / "rows.csv"
    table.write_text("caption,label\n" + "\n".join(f"text {n},{n % 5}" for n in range(50)))
    pack_dataset(table, tmp_path / "rows")
    kinds = [ImageFolder(ImageFolder.Config(path=str(folder))), Rows(Rows.Config(path=str(table)))]
    settings = {"global_batch_size": 12, "lanes": 6, "seed": 7, "only": {"json", "cls"}}

    def rows(sources, world_size, steps, **more) -> list:
        ranks = []
        for rank in range(world_size):
            stream = ShardStream(sources, **settings, rank=rank, world_size=world_size, **more)
            ranks.append([])
            for x in itertools.islice(stream, steps):
                numbers = torch.as_tensor(x["cls"]).tolist(), x["__index__"].tolist()
                ranks[-1].append(list(zip(x["__key__"], x["json"], *numbers, strict=True)))
        return [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]

    for weights in ((2, 1), None):
        expected = rows([shards, tmp_path / "rows"], 1, 20, weights=weights)
        assert rows(kinds, 2, 12, weights=weights) == expected[:12]
        later = rows(kinds, 3, 8, weights=weights, consumed=144, num_workers=2)
        assert later == expected[12:]


def test_what_can_only_be_read_one_after_the_other_is_refused():
    endless = datasets.Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    words = "a IterableDataset is no source .* write it to files"
    with pytest.raises(ConfigError, match=words):
        ShardStream(endless, global_batch_size=2, lanes=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{name: folder}", "path"),
        ("{name: folder, path: nowhere}", "does not exist"),
        ("{name: folder, path: FOLDER, classes: [class 1]}", "none of the 1 classes"),
        ("{name: folder, path: EMPTY}", "0 images"),
    ],
)
def test_folders_that_cannot_be_used(settings, words, folder, overrides, tmp_path):
    (tmp_path / "empty").mkdir()
    settings = settings.replace("FOLDER", f"'{folder}'").replace("EMPTY", f"'{tmp_path}/empty'")
    with pytest.raises((ConfigError, DataError), match=words):
        trainer.train(
            config_of("two_view", overrides, tmp_path / "run", *STEPS, f"data.train={settings}")
        )


def changed_file(path: Path) -> None:
    """Another image of the same size in bytes, written a minute later."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    other, later_s = path.with_name("other"), time.time() + 60
    other.write_bytes(data)
    os.utime(other, (later_s, later_s))
    other.replace(path)  # at once: a run may be reading it


@pytest.mark.parametrize("how", [changed_file, Path.unlink])
def test_an_image_that_changes_during_the_run_is_named(how, folder, overrides, tmp_path):
    """Replaced by another one and written down, up to data.max_skipped; then the run ends."""
    own = tmp_path / "images"
    shutil.copytree(folder, own)
    words = "has changed since" if how is changed_file else "No such file"
    source = ImageFolder(ImageFolder.Config(path=str(own)))
    key = source.key(7)
    assert source.read(7)["png"].shape[0] == 1
    (path,) = own.rglob(f"{Path(key).name}.*g")
    how(path)
    with pytest.raises(UnreadableSample, match=words) as raised:
        source.read(7)
    assert path.name in str(raised.value)
    assert source.read(8)["__key__"] != key


@pytest.mark.parametrize("allowed", [10, 0])
def test_a_run_on_a_folder_that_changes(allowed, folder, overrides, tmp_path, monkeypatch):
    own = tmp_path / "images"
    shutil.copytree(folder, own)
    more = f"data.max_skipped={allowed}", "data.prefetch_factor=1"
    config = config_of("two_view", overrides, tmp_path / "run", *STEPS, *read_in(own), *more)
    train_step, changed = loop.train_step, []

    def changing(run, *rest):
        if not changed:
            changed.extend(sorted(own.rglob("*.[jp][pn]g"))[::12])
            for path in changed[::2]:
                changed_file(path)
            for path in changed[1::2]:
                path.unlink()
        return train_step(run, *rest)

    monkeypatch.setattr(loop, "train_step", changing)
    words = "has changed since the folder was opened", "No such file or directory"
    if not allowed:
        with pytest.raises(DataError, match="|".join(words)):
            trainer.train(config)
        return
    assert trainer.train(config) == 0
    rows = [json.loads(x) for x in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert Path(row["key"]).name in {path.stem for path in changed}
        assert any(text in row["reason"] for text in words)
