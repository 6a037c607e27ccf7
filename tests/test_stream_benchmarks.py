"""The benchmarks of the stream: both sides read the same, and every table runs at a tiny size."""

import gc
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import stream
import stream_runs
import stream_shards
import stream_shuffle

LAYOUT = stream.QUICK.shuffle


@pytest.fixture(autouse=True)
def files_left_open():
    """webdataset leaves files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return stream_shards.photographs(tmp_path_factory.mktemp("crops") / "crops", 32, 2, 16)


def contents(epoch):
    """The sum of the pixels of every sample, and its label, sorted."""
    return sorted(
        (int(image.sum()), int(label))
        for images, labels in epoch
        for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("server", [stream_shards.NGINX, None], ids=["default", "range_server"])
def test_both_sides_give_the_same_samples(shards, tmp_path, monkeypatch, server):
    monkeypatch.setattr(stream_shards, "NGINX", server)
    expected = contents(stream_runs.plain(str(shards), 8, 0, seed=1, shards=2))
    assert len(expected) == 32
    assert contents(stream_runs.ours(str(shards), 8, 0, seed=1)) == expected
    with stream_shards.served(shards) as url:
        assert contents(stream_runs.plain(url, 8, 0, seed=1, shards=2)) == expected
        assert contents(stream_runs.ours(url, 8, 0, seed=1, cache=str(tmp_path))) == expected


def test_a_seek_reads_one_batch(tmp_path):
    folder = stream_shards.random_bytes(tmp_path / "small", 1024, 4, 64)
    found = stream_runs.seek(str(folder), 4, 16, 0, turns=1)
    (half,), (sought,), (plain,) = (found[f"{x} bytes"] for x in ("half", "seek", "plain"))
    assert min(half, plain) > 128 * 1024
    assert 16 * 1024 < sought < half / 2


@pytest.mark.parametrize(
    "epoch",
    [
        stream_shuffle.ours(LAYOUT, 8, 16),
        stream_shuffle.plain(LAYOUT, 16),
        stream_shuffle.full(LAYOUT),
    ],
    ids=["ours", "plain", "full"],
)
def test_an_order_has_every_sample_once(epoch):
    for which in (0, 1):
        assert np.array_equal(np.sort(epoch(which)[0]), np.arange(LAYOUT.samples))
    assert not np.array_equal(epoch(0)[0], epoch(1)[0])


def test_quality_of_no_shuffle_and_of_a_full_one():
    unshuffled = np.arange(LAYOUT.samples), np.zeros(LAYOUT.samples)
    found = stream_shuffle.quality(LAYOUT, lambda _: unshuffled)
    assert min(found.neighbours, found.within_lane, found.epochs) > 0.99
    assert found.classes < 2
    full = stream_shuffle.quality(LAYOUT, stream_shuffle.full(LAYOUT))
    assert max(abs(x) for x in (full.neighbours, full.within_lane, full.epochs)) < 0.1
    assert full.classes == pytest.approx(stream_shuffle.expected_classes(LAYOUT), abs=0.2)
    assert full.distance < found.distance / 2


def test_ratios_are_of_the_same_turn():
    assert stream.ratio(np.array([1.0, 20.0, 6.0]), np.array([2.0, 10.0, 2.0])) == "2.00"


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != "throughput")) for x in stream.TABLES],
)
def test_a_table_is_printed(name, capsys):
    stream.main(["--quick", "--tables", name])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{name}, at a load of ")
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 2
    assert "nan" not in "".join(rows)
