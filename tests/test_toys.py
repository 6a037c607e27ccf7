"""Toy points: their distributions, the shards they are packed in, and arrays in place of images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from scipy import stats
from sklearn.datasets import make_swiss_roll

from dist_contrastive.cli import main
from dist_contrastive.data import (
    Fields,
    ShardStream,
    index_folder,
    load_index,
    pack_toy,
    toy_points,
)
from dist_contrastive.data.packing.toys import TOYS
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import ConfigError, DataError

POINTS = Fields("npy", "json.label", 8)


def draw(name: str, count: int = 16_000) -> tuple[np.ndarray, np.ndarray]:
    points, parts = toy_points(name, count, seed=3)
    assert (points.dtype, points.shape) == (torch.float32, (count, 2))
    assert (parts.dtype, parts.shape) == (torch.int64, (count,))
    return points.double().numpy(), parts.numpy()


def check_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low <= values.min()
    assert values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def packed_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("name", TOYS)
def test_parts_are_equally_probable(name: str):
    counts = np.bincount(draw(name)[1], minlength=8)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 1e-3


def test_eight_gaussians_have_their_means_and_deviations():
    points, parts = draw("eight_gaussians")
    angles = np.arange(8) * math.tau / 8
    noise = points - 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)[parts]
    assert abs(noise.std() - 0.1) < 0.1 * 0.015  # four standard errors
    for part in range(8):
        x, y = noise[parts == part].T / 0.1
        for axis in (x, y, (x + y) / math.sqrt(2)):
            assert stats.kstest(axis, stats.norm.cdf).pvalue > 1e-3


def test_checkerboard_fills_its_black_squares_evenly():
    points, parts = draw("checkerboard")
    black = [(row, column) for row in range(4) for column in range(4) if (row + column) % 2 == 0]
    for part, (row, column) in enumerate(black):
        x, y = points[parts == part].T
        check_uniform(x, column - 2, column - 1)
        check_uniform(y, row - 2, row - 1)
        assert abs(stats.spearmanr(x, y).statistic) < 0.1


def test_swiss_roll_is_that_of_scikit_learn():
    """Part by part, in x, y and the distance from the origin; 16,000 points of each."""
    points, parts = draw("swiss_roll")
    scale = 2 / (4.5 * math.pi)
    theirs, angle = make_swiss_roll(16_000, noise=0.05 / scale, random_state=0)
    theirs = theirs[:, [0, 2]] * scale
    eighth = np.floor((angle / math.pi - 1.5) / 3 * 8)
    for part in range(8):
        mine, other = points[parts == part], theirs[eighth == part]
        for measure in (lambda p: p[:, 0], lambda p: p[:, 1], lambda p: np.hypot(*p.T)):
            assert stats.ks_2samp(measure(mine), measure(other)).pvalue > 1e-3


@pytest.mark.parametrize("name", TOYS)
def test_a_point_depends_on_seed_and_place_alone(name: str):
    few, many, others = toy_points(name, 5, 0), toy_points(name, 9, 0), toy_points(name, 9, 1)
    assert all(torch.equal(a, b[:5]) for a, b in zip(few, many, strict=True))
    assert (many[0] != others[0]).all()
    assert [len(column) for column in toy_points(name, 0, 0)] == [0, 0]


# ---------------------------------------------------------------------------- packed


def test_packed_points_come_back_as_they_are(tmp_path: Path):
    folder = tmp_path / "toy"
    indexes = pack_toy("swiss_roll", folder, 70, 30, samples_per_shard=20)
    splits = {}
    for seed, (split, count) in enumerate({"train": 70, "test": 30}.items()):
        index = load_index(folder / split)
        assert index.shards == indexes[split].shards
        assert index.shard_samples.tolist() == ([20, 20, 20, 10] if split == "train" else [20, 10])
        splits[split] = read = POINTS.read(index, range(count))
        points, parts = toy_points("swiss_roll", count, seed)
        assert read.labels is not None
        assert torch.equal(read.images, points)
        assert torch.equal(read.labels, parts)
        assert index.read(21)["json"]["index"] == 21
    assert not torch.isin(splits["test"].images, splits["train"].images).any()
    stream = ShardStream(load_index(folder / "train"), global_batch_size=10, lanes=2, seed=0)
    rows = POINTS.samples(next(iter(stream)))
    assert torch.equal(rows.images, splits["train"].images[rows.index])


def test_packing_a_toy_again_gives_the_same_bytes(tmp_path: Path):
    folder = tmp_path / "toy"
    pack_toy("checkerboard", folder, 30, 10)
    before = packed_files(folder)
    assert sorted(before) == [
        *("test/checkerboard-test-00000.tar", "test/index.npz"),
        *("train/checkerboard-train-00000.tar", "train/index.npz"),
    ]
    pack_toy("checkerboard", folder, 30, 10)
    assert packed_files(folder) == before
    pack_toy("checkerboard", folder, 20, 10)
    assert len(load_index(folder / "train")) == 20


def test_the_command_packs_whole_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["shards", "pack", "checkerboard", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/train: 8192 samples in 8 shards" in printed
    assert f"{tmp_path}/test: 2048 samples in 2 shards" in printed
    found = POINTS.read(load_index(tmp_path / "test"), range(8))
    assert torch.equal(found.images, toy_points("checkerboard", 8, 1)[0])


# ---------------------------------------------------------------------------- refusals


def test_what_cannot_be_drawn_or_packed(tmp_path: Path):
    with pytest.raises(ConfigError, match="the toy 'moons' is not known; use one of eight_gauss"):
        toy_points("moons", 3, 0)
    with pytest.raises(ConfigError, match="count=-1 is below 0"):
        toy_points("checkerboard", -1, 0)
    with pytest.raises(ConfigError, match="the toy 'moons' is not known"):
        pack_toy("moons", tmp_path / "toy")
    for split in ("train", "test"):
        with pytest.raises(ConfigError, match=f"{split}_samples=0 is below 1; set 1 or more"):
            pack_toy("checkerboard", tmp_path / "toy", **{f"{split}_samples": 0})
    assert not list(tmp_path.iterdir())


def test_every_source_leaves_a_folder_of_another_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pack_toy("checkerboard", tmp_path, 3, 2)
    before = packed_files(tmp_path)
    for source in ("eight_gaussians", "swiss_roll", "digits", "glyphs"):
        assert main(["shards", "pack", source, str(tmp_path)]) == 64
        words = f"'test/checkerboard-test-00000.tar', which packing the {source} did not write"
        assert words in capsys.readouterr().err
    assert packed_files(tmp_path) == before


ARRAYS = {
    "nan": ([np.array([0, math.nan]), np.zeros(2)], "sample s0 holds NaN or infinity in 'npy'"),
    "large": ([np.zeros(2), np.array([1e300, 0])], "sample s1 holds NaN or infinity in 'npy'"),
    "shapes": ([np.zeros(2), np.zeros(3)], "field 'npy' does not hold images of one size"),
    "numbers": ([np.zeros(())] * 2, "field 'npy' does not hold images of one size"),
}


@pytest.mark.parametrize(("arrays", "words"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_no_points(arrays: list[np.ndarray], words: str, tmp_path: Path):
    write_samples(
        tmp_path / "a.tar", [{"__key__": f"s{n}", "npy": array} for n, array in enumerate(arrays)]
    )
    with pytest.raises(DataError, match=words):
        Fields("npy").read(index_folder(tmp_path), range(2))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_of_any_shape_are_kept_as_they_are(dtype: type, tmp_path: Path):
    arrays: list[np.ndarray] = [np.arange(8).reshape(2, 4).astype(dtype) - 5 * n for n in range(3)]
    write_samples(
        tmp_path / "a.tar", [{"__key__": f"s{n}", "npy": a} for n, a in enumerate(arrays)]
    )
    images = Fields("npy").read(index_folder(tmp_path), range(3)).images
    assert images.dtype == torch.float32
    assert images.tolist() == [array.tolist() for array in arrays]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full(2, 0.5), "(shape [2], first values from 0.5 to 0.5)"),
        (np.full((1, 8, 8), -3.0), "(shape [1, 8, 8], first values from -3 to -3)"),
        (np.full((1, 8, 8), 1.25), "(shape [1, 8, 8], first values from 1.25 to 1.25)"),
    ],
)
def test_an_encoder_of_images_refuses_arrays(
    array: np.ndarray, words: str, tmp_path: Path, overrides, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "train").mkdir()
    samples = [{"__key__": f"s{n:03d}", "npy": array, "json": {"label": 0}} for n in range(64)]
    write_samples(tmp_path / "train" / "a.tar", samples)
    index_folder(tmp_path / "train")
    data = [f"data.train={tmp_path}/train", "data.image=npy"]
    run = overrides(tmp_path / "run", *data)
    assert main(["train", str(CONFIGS / "digits_encoder.yaml"), *run]) == 64
    message = capsys.readouterr().err
    assert f"data.image names a field of arrays {words}" in message
    assert "name a field of images, as png" in message
    assert len(message.strip().splitlines()) == 1
