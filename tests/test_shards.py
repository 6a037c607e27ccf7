"""Shards: what is written, how tars are indexed, and that damage is found and named."""

import gc
import io
import itertools
import json
import mmap
import os
import pickle
import shutil
import subprocess
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import refused
from PIL import Image

from dist_contrastive.data import ShardIndex, index_folder, load_index, pack_digits
from dist_contrastive.data.collate import collate
from dist_contrastive.data.packing.demos import slant
from dist_contrastive.data.shards.index_file import save_index
from dist_contrastive.data.shards.tars import scan_samples, write_samples
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample


def build_index(folder: Path) -> ShardIndex:
    """The index of all tars of a folder, read anew."""
    return index_folder(folder, full=True)


def image_bytes(mode: str, image_format: str, size: tuple[int, int] = (5, 3)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 1).save(stream, format=image_format)
    return stream.getvalue()


def numbered(start: int, count: int) -> list[dict]:
    return [
        {"__key__": f"s{n:03d}", "cls": n, "txt": f"café {n}"} for n in range(start, start + count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three indexed shards of 4, 0 and 3 samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, start, count in (("a.tar", 0, 4), ("b.tar", 4, 0), ("c.tar", 4, 3)):
        write_samples(folder / name, numbered(start, count))
    index_folder(folder)
    return folder


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def read_by_webdataset(paths: list[str]) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the files to the collector
        samples = list(webdataset.WebDataset(paths, shardshuffle=False))
        gc.collect()
    return samples


# ---------------------------------------------------------------------------- digits


def test_digits_are_whole_and_invertible(digits: Path):
    from sklearn.datasets import load_digits

    original = load_digits()
    seen = set()
    for split, size, shards in (("train", 1437, 8), ("test", 360, 2)):
        index = load_index(digits / split)
        assert (len(index), len(index.shards)) == (size, shards)
        for number in range(len(index)):
            sample = index.read(number)
            place = sample["json"]["index"]
            assert sample["__key__"] == f"digit-{place:04d}"
            assert sample["json"]["label"] == original.target[place]
            assert sample["png"].shape == (1, 8, 8)
            values = torch.round(sample["png"][0].double() * 16 / 255)
            assert np.array_equal(values.numpy(), original.images[place])
            seen.add(place)
    assert seen == set(range(1797))


def test_digits_second_modalities_are_functions_of_the_digit(digits: Path):
    """Against sums written out, from the original values."""
    from sklearn.datasets import load_digits

    original, index = load_digits(), load_index(digits / "test")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    slants = []
    for number in range(len(index)):
        sample = index.read(number)
        image = original.images[sample["json"]["index"]].tolist()
        digit = original.target[sample["json"]["index"]]
        assert sample["txt"] == f"a handwritten {names[digit]}"
        assert sample["npy"].dtype == np.float32
        rows = [sum(row) / 128 for row in image]
        columns = [sum(row[i] for row in image) / 128 for i in range(8)]
        assert sample["npy"].tolist() == pytest.approx(rows + columns, abs=1e-7)
        ink = [(x, y, image[y][x]) for x in range(8) for y in range(8)]
        total = sum(w for _, _, w in ink)
        mean_x, mean_y = (sum(p[axis] * p[2] for p in ink) / total for axis in (0, 1))
        slope = sum((x - mean_x) * (y - mean_y) * w for x, y, w in ink)
        slope /= sum((y - mean_y) ** 2 * w for _, y, w in ink)
        assert sample["json"]["slant"] == pytest.approx(slope, abs=5.1e-5)
        slants.append(slope)
    assert min(slants) < -0.2
    assert max(slants) > 0.2
    batch = collate([index.read(number) for number in range(3)])
    assert batch["npy"].shape == (3, 16)
    assert batch["npy"].dtype == torch.float32


def test_slant_is_negative_where_the_stroke_leans_to_the_right():
    slash, upright = np.fliplr(np.eye(8)), np.zeros((8, 8))
    upright[:, 3] = 1
    assert [slant(ink) for ink in (slash, upright, np.eye(8))] == [-1, 0, 1]


def test_digits_split_keeps_class_proportions_and_mixes_shards(digits: Path):
    labels = {}
    for split in ("train", "test"):
        index = load_index(digits / split)
        labels[split] = np.array([index.read(n)["json"]["label"] for n in range(len(index))])
        for first, stop in itertools.pairwise(index.shard_starts.tolist()):
            assert len(set(labels[split][first:stop])) == 10
    train, test = (np.bincount(labels[split]) for split in ("train", "test"))
    assert np.all(np.abs(test - (train + test) * (360 / 1797)) <= 1)


def test_packing_again_gives_the_same_bytes(digits: Path, tmp_path: Path):
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    pack_digits(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert os.listdir(tmp_path) == ["digits"]


def test_packing_refuses_a_folder_of_others(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("mine")
    with refused(DataError, "'train/notes.txt'", "empty folder"):
        pack_digits(tmp_path)
    assert (tmp_path / "train" / "notes.txt").read_text() == "mine"
    with refused(ConfigError, "samples_per_shard=0", "1 or more"):
        pack_digits(tmp_path, samples_per_shard=0)


def test_packing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path):
        raise OSError("disk full")

    monkeypatch.setattr("dist_contrastive.data.packing.demos.index_folder", fail)
    with pytest.raises(OSError, match="disk full"):
        pack_digits(tmp_path / "digits")
    assert os.listdir(tmp_path) == []


def test_other_tools_read_the_shards(digits: Path):
    index = load_index(digits / "test")
    paths = list(index.shards)
    theirs = read_by_webdataset(paths)
    assert [sample["__key__"] for sample in theirs] == [
        index.read(n)["__key__"] for n in range(len(index))
    ]
    assert json.loads(theirs[0]["json"]) == index.read(0)["json"]
    with tarfile.open(paths[0]) as archive:
        key = theirs[0]["__key__"]
        assert archive.getnames()[:4] == [f"{key}.{e}" for e in ("json", "npy", "png", "txt")]


# ---------------------------------------------------------------------------- tars of others


def test_index_agrees_with_webdataset_on_tars_of_others(tmp_path: Path):
    long = "deep/" * 30
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add_member(archive, "__meta__/info.json", b"{}")
        for key in ("x/ä", long + "b", "c"):
            add_member(archive, f"{key}.TXT", key.encode())
            add_member(archive, "no-extension", b"skipped")
            add_member(archive, f"{key}.seg.cls", b"7")
    source = tmp_path / "source"
    (source / long).mkdir(parents=True)
    for name in ("k1.txt", "k1.cls", f"{long}k2.txt", f"{long}k2.cls"):
        (source / name).write_text("3")
    subprocess.run(
        ["tar", "--sort=name", "-cf", tmp_path / "gnu.tar", "-C", source, "."], check=True
    )
    index = build_index(tmp_path)
    paths = [str(tmp_path / name) for name in ("gnu.tar", "pax.tar")]
    theirs = read_by_webdataset(paths)
    ours = [index.read(n) for n in range(len(index))]
    assert len(ours) == 5
    assert [s["__key__"] for s in ours] == [s["__key__"] for s in theirs]
    assert [sorted(s) for s in ours] == [
        sorted(k for k in s if k not in ("__url__", "__local_path__")) for s in theirs
    ]
    assert ours[2] == {"__key__": "x/ä", "txt": "x/ä", "seg.cls": 7}


def test_decoded_fields(tmp_path: Path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    write_samples(
        tmp_path / "s.tar",
        [
            {
                "__key__": "k",
                "gray.png": image_bytes("L", "PNG"),
                "bits.png": image_bytes("1", "PNG"),
                "jpg": image_bytes("RGB", "JPEG"),
                "webp": image_bytes("RGBA", "WEBP"),
                "gif": image_bytes("P", "GIF"),
                "png": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
                "json": None,
                "npy": array,
                "cls": 4,
                "txt": "é",
                "bin": b"\x00",
            }
        ],
    )
    sample = build_index(tmp_path).read(0)
    shapes = {name: tuple(v.shape) for name, v in sample.items() if isinstance(v, torch.Tensor)}
    assert shapes == {
        "gray.png": (1, 3, 5),
        "bits.png": (1, 3, 5),
        "jpg": (3, 3, 5),
        "webp": (3, 3, 5),
        "gif": (3, 3, 5),
        "png": (3, 2, 2),
    }
    assert sample["png"].dtype == torch.uint8
    assert sample["png"].flatten().tolist() == list(range(12))
    assert build_index(tmp_path).read(0, only=["cls"]) == {"__key__": "k", "cls": 4}
    assert build_index(tmp_path).read(0, only=[]) == {"__key__": "k"}
    assert np.array_equal(sample["npy"], array)
    assert [sample[name] for name in ("json", "cls", "txt", "bin")] == [None, 4, "é", b"\x00"]


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "pt", "npz", "x.pyd"])
def test_nothing_is_unpickled(tmp_path: Path, extension: str):
    trap = tmp_path / "executed"
    payload = pickle.dumps(Bomb(trap))
    write_samples(tmp_path / "s.tar", [{"__key__": "k", extension: payload}])
    sample = build_index(tmp_path).read(0)
    assert sample[extension] == payload
    assert not trap.exists()
    pickle.loads(payload)
    assert trap.exists()  # the trap works


def test_arrays_of_objects_and_disguised_postscript_are_refused(tmp_path: Path):
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(tmp_path / "executed")]), allow_pickle=True)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    for name, data, reason in (
        ("npy", stream.getvalue(), "object"),
        ("png", eps, "UnidentifiedImageError"),
    ):
        write_samples(tmp_path / "s.tar", [{"__key__": "k", name: data}])
        with refused(DataError, f"{name!r} of sample 'k'", "s.tar", reason):
            build_index(tmp_path).read(0)
    assert not (tmp_path / "executed").exists()


def test_writing_what_cannot_be_written(tmp_path: Path):
    with refused(DataError, "int", "'jpg'", "bytes"):
        write_samples(tmp_path / "s.tar", [{"__key__": "k", "jpg": 3}])
    with refused(DataError, "[2, 2]", "float64", "uint8 [C, H, W]"):
        write_samples(tmp_path / "s.tar", [{"__key__": "k", "png": np.zeros((2, 2))}])


# ---------------------------------------------------------------------------- the index


def test_index_survives_saving(folder: Path):
    built = build_index(folder)
    for path in (folder, folder / "index.npz", str(folder)):
        loaded = load_index(path)
        assert loaded.shards == tuple(str(folder / f"{name}.tar") for name in "abc")
        assert loaded.shard_samples.tolist() == [4, 0, 3]
        assert loaded.shard_sha256 == built.shard_sha256
        for name in ("sample_offset", "member_start", "member_size", "member_crc32"):
            assert np.array_equal(getattr(loaded, name), getattr(built, name))
        assert loaded.read(5) == {"__key__": "s005", "cls": 5, "txt": "café 5"}
    sums = subprocess.run(["sha256sum", folder / "c.tar"], capture_output=True, check=True)
    assert sums.stdout.decode().split()[0] == built.shard_sha256[2]
    before = (folder / "index.npz").read_bytes()
    save_index(built, folder / "index.npz")
    assert (folder / "index.npz").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["a.tar", "b.tar", "c.tar", "index.npz"]


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index file counts as large."""
    monkeypatch.setattr("dist_contrastive.data.shards.index_file._MAPPED", 0)


def is_mapped(array: np.ndarray) -> bool:
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)


def test_a_large_index_is_mapped(folder: Path, mapped: None):
    built, loaded = build_index(folder), load_index(folder)
    for name in ("sample_offset", "member_start", "member_header", "member_size", "member_crc32"):
        assert is_mapped(getattr(loaded, name))
        assert np.array_equal(getattr(loaded, name), getattr(built, name))
    assert not loaded.member_size.flags.writeable
    assert [loaded.read(n) for n in range(7)] == [built.read(n) for n in range(7)]
    copy = pickle.loads(pickle.dumps(loaded))
    assert copy.read(6) == built.read(6)
    index_folder(folder)  # takes its place, and not that of what is mapped
    assert loaded.read(5) == built.read(5)


def test_a_mapped_index_that_is_wrong(folder: Path, mapped: None):
    """Of a part beyond its end, and of a place outside of its shard, which is found by reading."""
    content = (folder / "index.npz").read_bytes()
    with np.load(folder / "index.npz") as stored:
        arrays = dict(stored)
    for name in ("sample_offset", "shard_samples"):
        np.savez(folder / "index.npz", **{**arrays, name: arrays[name][:-1]})
        with refused(DataError, "index.npz", "do not fit each other"):
            load_index(folder)
    for cut in (len(content) // 2, 40):
        (folder / "index.npz").write_bytes(content[:cut])
        with refused(DataError, "index.npz cannot be read"):
            load_index(folder)
    first_part = content.index(b"sample_offset")
    (folder / "index.npz").write_bytes(
        content[: first_part - 30] + b"PK\x03\x05" + content[first_part - 26 :]
    )
    with refused(DataError, "index.npz cannot be read", "is not inside of it"):
        load_index(folder)
    offsets = arrays["sample_offset"].copy()
    offsets[1:3] = -1, 2**40
    np.savez(folder / "index.npz", **{**arrays, "sample_offset": offsets})
    wrong = load_index(folder)
    for number in (1, 2):
        with refused(UnreadableSample, f"sample {number}", "by the index", "a.tar"):
            wrong.read(number)
    assert wrong.read(0)["__key__"] == "s000"


def test_samples_that_lack_a_field_are_found_part_by_part(folder, monkeypatch):
    index = load_index(folder)
    starts = index.member_start.copy()
    cls, txt = (index.fields.index(name) for name in ("cls", "txt"))
    starts[[0, 3, 6], cls] = starts[[3, 4], txt] = np.iinfo(np.uint32).max
    index = replace(index, member_start=starts)
    monkeypatch.setattr("dist_contrastive.data.shards.index._ROWS", 2)
    assert index.lacking("cls").tolist() == [0, 3, 6]
    assert index.lacking("txt").tolist() == [3, 4]
    assert index.lacking("cls;txt").tolist() == [3]


def test_index_can_be_sent_to_a_process(folder: Path):
    index = load_index(folder)
    index.read(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(6) == index.read(6)
    with refused(IndexError, "7", "0..6"):
        index.read(7)


def test_more_shards_than_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dist_contrastive.data.shards.storage._MAX_OPEN", 1)
    index = load_index(folder)
    assert [index.read(n)["cls"] for n in (0, 4, 1, 5)] == [0, 4, 1, 5]


def test_missing_things_are_named(folder: Path, tmp_path: Path):
    with refused(DataError, "nowhere does not exist"):
        load_index(tmp_path / "nowhere")
    with refused(DataError, "0 files", f"as {folder}"):
        load_index(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(DataError, "0 files", "shards pack"):
        build_index(tmp_path / "empty")
    (folder / "index.npz").unlink()
    command = f"run `dist-contrastive shards index {folder}`"
    with refused(DataError, "3 shards but no index.npz", command):
        load_index(folder)
    (folder / "index.npz").write_bytes(b"PK not a zip")
    with refused(DataError, "index.npz cannot be read", command):
        load_index(folder)
    np.savez(folder / "index.npz", version=99)
    with refused(DataError, "format 99", "reads 2", command):
        load_index(folder)


def test_index_that_does_not_fit_its_tars(folder: Path):
    command = f"run `dist-contrastive shards index {folder}`"
    (folder / "d.tar").write_bytes((folder / "a.tar").read_bytes())
    with refused(DataError, "d.tar", "folder has 4 shards", "index lists 3", command):
        load_index(folder)
    (folder / "d.tar").unlink()
    size = (folder / "c.tar").stat().st_size
    with (folder / "c.tar").open("ab") as file:
        file.write(bytes(512))
    with refused(DataError, "c.tar", f"{size + 512} bytes but {size} were indexed", command):
        load_index(folder)
    (folder / "c.tar").unlink()
    with refused(DataError, "c.tar", "cannot be found", "lists 3 shards", command):
        load_index(folder)


def test_tars_without_samples(tmp_path: Path):
    write_samples(tmp_path / "a.tar", [])
    with refused(DataError, "1 shards", "0 samples", "KEY.EXTENSION"):
        build_index(tmp_path)


@pytest.mark.parametrize("location", [".", "./", "{a..c}.tar", "?.tar", "../shards", "index.npz"])
def test_relative_locations(folder: Path, monkeypatch: pytest.MonkeyPatch, location: str):
    monkeypatch.chdir(folder)
    assert load_index(location).read(5)["__key__"] == "s005"
    if location != "index.npz":
        made = index_folder(location, "../elsewhere.npz")
        assert made.read(5)["__key__"] == "s005"
        monkeypatch.chdir("/")
        assert load_index(folder.parent / "elsewhere.npz").read(5)["__key__"] == "s005"


def test_patterns_over_folders(folder: Path):
    shutil.copytree(folder, folder.parent / "more")
    index = load_index(f"{folder.parent}/*/a.tar")
    assert index.shards == (f"{folder.parent}/more/a.tar", f"{folder.parent}/shards/a.tar")
    part = load_index(f"{folder}/{{c,a}}.tar")
    assert [part.read(n)["cls"] for n in range(7)] == [4, 5, 6, 0, 1, 2, 3]
    for pattern, words in (
        ("{a,d}.tar", ["d.tar", "does not exist", "1 of 2"]),
        ("x*.tar", ["no shard matches", "x*.tar"]),
        ("{a,a}.tar", ["a.tar twice"]),
        ("{a..c.tar", ["close its braces"]),
    ):
        with refused(DataError, *words):
            load_index(folder / pattern)


def test_joined_tars_are_refused(folder: Path):
    joined = (folder / "a.tar").read_bytes() + (folder / "c.tar").read_bytes()
    (folder / "a.tar").write_bytes(joined)
    with refused(DataError, "a.tar ends at byte 8192", "shards merge"):
        build_index(folder)


def test_keys_held_twice(tmp_path: Path):
    write_samples(tmp_path / "a.tar", [*numbered(0, 2), *numbered(0, 1)])
    with refused(DataError, "a.tar", "'s000' twice", "--sort=name"):
        build_index(tmp_path)
    write_samples(tmp_path / "a.tar", [*numbered(0, 1), *numbered(0, 1)])
    with refused(DataError, "a.tar", "'cls' of sample 's000' twice"):
        build_index(tmp_path)


def test_truncated_and_damaged_tars(folder: Path):
    path = folder / "a.tar"
    whole = path.read_bytes()
    with path.open("rb") as file:
        slices = list(scan_samples(file, str(path)))
    boundary = slices[2].offset  # here `tarfile` and webdataset see an ordinary end
    for size in (0, 100, boundary + 100, boundary + 700, slices[1].offset):
        path.write_bytes(whole[:size])
        with refused(DataError, "a.tar", "truncated", "copy it again"):
            build_index(folder)
    path.write_bytes(whole[:boundary] + b"x" * 512 + whole[boundary + 512 :])
    with refused(DataError, "a.tar is damaged", f"at byte {boundary}"):
        build_index(folder)


def test_every_changed_byte_of_a_sample_is_found(folder: Path):
    index = load_index(folder)
    path, offset = folder / "a.tar", int(index.sample_offset[1])
    whole = path.read_bytes()
    for column, name in enumerate(index.fields):
        path.write_bytes(whole)
        start = offset + int(index.member_start[1, column])
        length = int(index.member_header[1, column] + index.member_size[1, column])
        assert length == 512 + len(index.read_contents(1)[name])
        for place in (*range(start, start + length, 97), start + length - 1):
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            words = ["a.tar is damaged", f"{name!r} of sample 1 at byte {start} "]
            with refused(UnreadableSample, *words):
                load_index(folder).read(1)
            assert load_index(folder).read(2)["cls"] == 2
    path.write_bytes(whole[: offset + 10])
    with refused(DataError, "10 bytes", "513 bytes"):
        index.read(1)


def test_shard_removed_while_in_use(folder: Path):
    index = load_index(folder)
    (folder / "a.tar").unlink()
    with refused(DataError, "a.tar", "No such file", "restore it"):
        index.read(0)


def test_fields_decode_as_by_webdataset(tmp_path: Path):
    """Written by its ShardWriter with its encoders, decoded by its decoders and by ours."""
    chance = np.random.default_rng(0)
    pattern = str(tmp_path / "theirs-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for n in range(7):
            pixels = chance.integers(0, 256, (5 + n, 9, 3), dtype=np.uint8)
            sample = {"jpg": pixels, "png": pixels, "webp": image_bytes("RGB", "WEBP")}
            text = {"txt": f"Größe {n}", "json": {"n": n, "x": [1.5, None]}, "cls": n}
            writer.write({"__key__": f"k{n}", **sample, **text, "npy": np.arange(n, dtype="f4")})
    index = index_folder(tmp_path)
    assert index.shard_samples.tolist() == [4, 3]
    theirs = webdataset.WebDataset(list(index.shards), shardshuffle=False).decode("torchrgb8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for number, expected in enumerate(theirs):
            ours = index.read(number)
            assert ours.keys() == {k for k in expected if k not in ("__url__", "__local_path__")}
            for name, value in ours.items():
                if isinstance(value, torch.Tensor | np.ndarray):
                    assert np.array_equal(np.asarray(value), np.asarray(expected[name])), name
                else:
                    assert value == expected[name]
        assert number == 6
        gc.collect()


def test_places_that_are_none_for_an_index(folder: Path, tmp_path: Path):
    for out, words in (
        (tmp_path / "name", ["name", "ends in .npz"]),
        (tmp_path, [str(tmp_path), "ends in .npz"]),
        (tmp_path / "no" / "x.npz", ["x.npz cannot be written", "--out FILE"]),
    ):
        with refused(DataError, *words):
            index_folder(folder, out)


def test_indexes_whose_parts_do_not_fit(folder: Path):
    with np.load(folder / "index.npz") as stored:
        arrays = dict(stored)
    for name in ("sample_offset", "member_size", "shard_samples", "shard_sha256"):
        np.savez(folder / "index.npz", **{**arrays, name: arrays[name][:-1]})
        with refused(DataError, "index.npz", "do not fit each other"):
            load_index(folder)


def test_sparse_members_are_refused(tmp_path: Path):
    (tmp_path / "hole.bin").write_bytes(bytes(10))
    os.truncate(tmp_path / "hole.bin", 1 << 20)
    argv = ["tar", "--sparse", "-cf", tmp_path / "a.tar", "-C", tmp_path, "hole.bin"]
    subprocess.run(argv, check=True)
    with refused(DataError, "'hole.bin'", "tar --sparse"):
        index_folder(tmp_path)
