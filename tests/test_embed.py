"""Vectors of a data set in a file: rows and keys together, whatever ranks and interruptions."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from test_engines import config_of

from dist_contrastive import checkpoint, embed, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.data import index_folder, load_index
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.tasks import Task
from dist_contrastive.testing import run_ranks

TRAIN = ("train.steps=1", "train.save_every=1")


@pytest.fixture(scope="module")
def source(tmp_path_factory, digits) -> Path:
    """100 digits, of which three cannot be read."""
    folder = tmp_path_factory.mktemp("source")
    index = load_index(digits / "test")
    samples = [index.read_contents(number) for number in range(100)]
    for number in (0, 41, 42):
        samples[number]["png"] = samples[number]["png"][:50]
    write_samples(folder / "digits.tar", samples)
    index_folder(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, overrides) -> Path:
    """An encoder of one step."""
    folder = tmp_path_factory.mktemp("embed") / "run"
    assert trainer.train(config_of("two_view", overrides, folder, *TRAIN)) == 0
    return folder


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(embed, "PART", 16)


def network(run: Path) -> tuple[Task, Samples, list[str]]:
    """The task with its weights, the samples that can be read, and their keys."""
    config = configs.load_run(run)
    numbers = [n for n in range(100) if n not in (0, 41, 42)]
    test = load_index(config.data.test)
    samples = config.fields.read(test, numbers)
    task = config.build_task(samples).eval()
    task.load_state_dict(checkpoint.run_weights(run))
    return task, samples, [test.key(n) for n in numbers]


def keys_in(out: Path) -> list[str]:
    return [json.loads(line) for line in out.with_suffix(".keys.jsonl").read_text().splitlines()]


def test_vectors_stand_beside_their_keys(run, source, small_parts, tmp_path, capsys):
    """Three samples are named and left out of both."""
    out = tmp_path / "vectors.npy"
    assert main(["embed", str(run), str(source), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "97 vectors" in told
    assert told.count("left out: ") == 3
    task, samples, keys = network(run)
    assert keys_in(out) == keys
    torch.testing.assert_close(torch.from_numpy(np.load(out)), task.represent(samples.images))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vectors.keys.jsonl", "vectors.npy"]


def test_a_table_of_what_the_loss_compares(run, source, small_parts, tmp_path):
    out = tmp_path / "vectors.parquet"
    assert embed.embed(run, str(source), out, "embedding").rows == 97
    table = parquet.read_table(out)
    task, samples, keys = network(run)
    assert table["key"].to_pylist() == keys
    found = torch.tensor(table["vector"].to_pylist())
    torch.testing.assert_close(found, task.embed_representations(task.represent(samples.images)))


def on_ranks(run: Path, source: Path, out: Path) -> int:
    embed.PART = 16
    return embed.embed(run, str(source), out).rows


def test_two_ranks_write_the_file_of_one(run, source, small_parts, tmp_path):
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    embed.embed(run, str(source), one)
    assert run_ranks(on_ranks, 2, run, source, two) == [97, 97]
    assert two.read_bytes() == one.read_bytes()
    assert keys_in(two) == keys_in(one)


def interrupted(run: Path, source: Path, out: Path, monkeypatch) -> list[int]:
    """An embedding with Ctrl-C at part 3; what is read from then on is put into the list."""
    read: list[int] = []
    read_some = embed._Work._read

    def reading(work, numbers: range):
        if 3 * embed.PART in numbers:
            raise KeyboardInterrupt
        return read_some(work, numbers)

    def counting(work, numbers: range):
        read.extend(numbers)
        return read_some(work, numbers)

    monkeypatch.setattr(embed._Work, "_read", reading)
    with pytest.raises(KeyboardInterrupt):
        embed.embed(run, str(source), out)
    assert not out.exists()
    monkeypatch.setattr(embed._Work, "_read", counting)
    return read


def test_an_interrupted_one_goes_on(run, source, small_parts, tmp_path, monkeypatch):
    """What was embedded is not again, and the file is that of an unbroken run."""
    whole, out = tmp_path / "whole.npy", tmp_path / "out.npy"
    embed.embed(run, str(source), whole)
    read = interrupted(run, source, out, monkeypatch)
    embed.embed(run, str(source), out)
    assert sorted(read) == list(range(48, 100))
    assert out.read_bytes() == whole.read_bytes()
    assert keys_in(out) == keys_in(whole)


def test_parts_of_other_work_are_refused(run, source, small_parts, tmp_path):
    out = tmp_path / "out.npy"
    (tmp_path / ".out.npy.parts").mkdir()
    (tmp_path / ".out.npy.parts" / "about.json").write_text(json.dumps({"part": 16}))
    with pytest.raises(ConfigError, match="other weights"):
        embed.embed(run, str(source), out)


def test_a_part_that_is_damaged_is_named(run, source, small_parts, tmp_path, monkeypatch):
    out = tmp_path / "out.npy"
    interrupted(run, source, out, monkeypatch)
    (tmp_path / ".out.npy.parts" / "0000002.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="0000002"):
        embed.embed(run, str(source), out)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out", "vectors.csv"), "npy, .parquet"),
        (("--out", "there.npy"), "there already"),
        (("--out", "new.npy", "--what", "partner"), "paired"),
    ],
)
def test_what_cannot_be_written_is_refused(
    flags, words, run, source, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("there.npy").touch()
    assert main(["embed", str(run), str(source), *flags]) == 64
    assert words in capsys.readouterr().err
    assert not Path("new.npy").exists()


def test_both_modalities(overrides, source, tmp_path):
    config = config_of("paired", overrides, tmp_path / "run", *TRAIN)
    assert trainer.train(config) == 0
    task, samples, _ = network(tmp_path / "run")
    for what, expected in (
        ("embedding", task.embed_images(samples.images)),
        ("partner", task.embed_pair(samples.pair)),
    ):
        out = tmp_path / f"{what}.npy"
        embed.embed(tmp_path / "run", str(source), out, what)
        torch.testing.assert_close(torch.from_numpy(np.load(out)), expected)


@pytest.mark.parametrize("task", ["two_view", "paired"])
def test_the_training_data_need_not_be_there(task, overrides, source, tmp_path, monkeypatch):
    """The run directory knows the shapes of a sample."""
    config = config_of(task, overrides, tmp_path / "run", *TRAIN)
    assert trainer.train(config) == 0

    def gone(*_):
        raise AssertionError("data.train was opened")

    monkeypatch.setattr(type(config.data), "open_train", gone)
    assert embed.embed(tmp_path / "run", str(source), tmp_path / "out.npy").rows == 97
    (tmp_path / "run" / "data.json").write_text("[{}]")
    with pytest.raises(AssertionError, match="was opened"):
        embed.embed(tmp_path / "run", str(source), tmp_path / "other.npy")


def test_several_threads_read_by_sources_of_their_own(
    run, source, small_parts, tmp_path, monkeypatch
):
    """An interpreter's identity of each that reads."""
    sources: dict[int, set[int]] = {}
    read_some = embed.usable_row

    def watched(fields, opened, number):
        sources.setdefault(threading.get_ident(), set()).add(id(opened))
        return read_some(fields, opened, number)

    monkeypatch.setattr(embed, "usable_row", watched)
    monkeypatch.setattr(embed, "_READERS", 3)
    monkeypatch.setattr(embed, "BATCH", 4)
    embed.embed(run, str(source), tmp_path / "out.npy")
    assert all(len(found) == 1 for found in sources.values())
    assert len(set().union(*sources.values())) == len(sources)
