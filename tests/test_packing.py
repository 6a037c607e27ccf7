"""Packing of one's own data: what is written is what was there, in bounded shards, whole or not at
all; merging and listing."""

import csv
import gc
import hashlib
import io
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import command, environment, refused, run
from PIL import Image

from dist_contrastive.cli import main
from dist_contrastive.data import ShardIndex, ShardStream, load_index
from dist_contrastive.data.keyed_random import keyed_permutation
from dist_contrastive.data.packing import writer
from dist_contrastive.data.packing.arrays import pack_arrays
from dist_contrastive.data.packing.hub import pack_dataset
from dist_contrastive.data.packing.images import pack_images
from dist_contrastive.data.packing.merge import merge_shards
from dist_contrastive.data.packing.options import PackOptions, ShardBounds, key_of_path
from dist_contrastive.data.packing.pairs import pack_pairs
from dist_contrastive.data.packing.writer import pack_samples
from dist_contrastive.data.shards.encoding import decode_field, encode_field
from dist_contrastive.data.shards.tars import tar_bytes, write_samples
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample
from dist_contrastive.pack_options import TextFormat

IN_ORDER = PackOptions(seed=None)
COUNT = 40
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def options(**changed) -> PackOptions:
    """In the order of the source, with bounds by `samples` and `mib`."""
    bounds = ShardBounds(changed.pop("samples", None), changed.pop("mib", None))
    return PackOptions(**{"seed": None, "bounds": bounds, **changed})


def digit_pixels(number: int) -> np.ndarray:
    """Digit `number` of scikit-learn, uint8 [8, 8]."""
    return np.rint(load_digits().images[number] * (255 / 16)).astype(np.uint8)


@cache
def load_digits():
    from sklearn import datasets

    return datasets.load_digits()


def encoded(number: int, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(digit_pixels(number)).save(stream, format=kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def labels() -> list[int]:
    return load_digits().target[:COUNT].tolist()


@pytest.fixture(scope="module")
def png() -> list[bytes]:
    return [encoded(number, "PNG") for number in range(COUNT)]


@pytest.fixture(scope="module")
def jpeg() -> list[bytes]:
    return [encoded(number, "JPEG") for number in range(COUNT)]


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read_back(folder: Path) -> list[dict]:
    """The samples as bytes, in their order, of which the index, webdataset and the stream must
    tell the same."""
    index = load_index(folder)
    ours = [index.read_contents(number) for number in range(len(index))]
    gc.freeze()  # what was there before need not be looked through
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files to the collector
        theirs = list(webdataset.WebDataset(list(index.shards), shardshuffle=False))
        gc.collect()
    gc.unfreeze()
    for sample in theirs:
        del sample["__url__"], sample["__local_path__"]
    assert theirs == ours
    assert streamed(index) == (list(range(len(ours))) if len(ours) > 1 else [])
    return ours


def streamed(index: ShardIndex) -> list[int]:
    """The numbers of the samples that the stream gives in an epoch, sorted; those are as by the
    index, in the fields that all have."""
    if len(index) < 2:  # no batch
        return []
    counts = index.field_counts().sum(axis=0)
    common = [name for name, n in zip(index.fields, counts, strict=True) if n == len(index)]
    stream = ShardStream(index, global_batch_size=2, lanes=1, seed=3, epochs=1, only=common)
    numbers = []
    for batch in stream:
        for row, number in enumerate(batch["__index__"].tolist()):
            numbers.append(number)
            decoded = index.read(number, common)
            for name, value in decoded.items():
                assert str(as_lists(batch[name][row])) == str(as_lists(value))
    return sorted(numbers)


def as_lists(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(folder.glob("*.tar"))]


# ---------------------------------------------------------------------------- images


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg")])
def test_images_in_folders_of_classes(tmp_path, labels, kind, extension):
    files = {
        f"{NAMES[label]}/{number:03d}.{extension}": encoded(number, kind)
        for number, label in enumerate(labels)
    }
    write_tree(tmp_path / "source", files)
    packed = pack_images(tmp_path / "source", tmp_path / "shards", options(samples=15, seed=0))
    assert packed.left_out == []
    assert packed.index.shard_samples.tolist() == [15, 15, 10]
    assert [Path(s).name for s in packed.index.shards] == [f"shards-{n:05d}.tar" for n in range(3)]
    paths, classes = sorted(files), sorted({path.split("/")[0] for path in files})
    samples = read_back(tmp_path / "shards")
    for sample, number in zip(samples, keyed_permutation(COUNT, 0), strict=True):
        name = paths[number].split("/")[0]
        assert sample == {
            "__key__": paths[number].rpartition(".")[0],
            extension: files[paths[number]],
            "cls": str(classes.index(name)).encode(),
            "json": json.dumps(
                {"class": name, "label": classes.index(name), "path": paths[number]}
            ).encode(),
        }
    pack_images(tmp_path / "source", tmp_path / "sorted", IN_ORDER)
    assert [json.loads(s["json"])["path"] for s in read_back(tmp_path / "sorted")] == paths


def test_images_of_several_kinds_and_depths(tmp_path, png, jpeg):
    files = {
        "a.v1.PNG": png[0],
        "b/c.jpeg": jpeg[1],
        "b/d.e/f.jpg": png[2],  # not what its name says
        ".hidden.png": png[3],
        "b/.trash/x.png": png[4],
        "__x__/g.png": png[5],  # webdataset skips members of such folders
        "notes.txt": b"no image",
    }
    source = write_tree(tmp_path / "source", files)
    (source / "linked").symlink_to(write_tree(tmp_path / "elsewhere", {"h.png": png[6]}))
    pack_images(source, tmp_path / "shards", IN_ORDER)
    samples = read_back(tmp_path / "shards")
    assert [(s["__key__"], *(k for k in s if k not in ("__key__", "json"))) for s in samples] == [
        ("x__/g", "png"),
        ("a_v1", "png"),
        ("b/c", "jpg"),
        ("b/d.e/f", "png"),
        ("linked/h", "png"),
    ]
    assert [json.loads(s["json"]) for s in samples] == [
        {"path": p} for p in ("__x__/g.png", "a.v1.PNG", "b/c.jpeg", "b/d.e/f.jpg", "linked/h.png")
    ]
    assert [s["jpg"] for s in samples if "jpg" in s] == [jpeg[1]]
    pack_images(source, tmp_path / "one", IN_ORDER, field="input.jpg")
    same = [s["input.jpg"] for s in read_back(tmp_path / "one")]
    assert same == [png[5], png[0], jpeg[1], png[2], png[6]]
    deep = write_tree(tmp_path / "deep", {"a/b/1.png": png[0], "c/2.png": png[1]})
    pack_images(deep, tmp_path / "unclassed")  # a and c are not the classes of all
    assert all("cls" not in sample for sample in read_back(tmp_path / "unclassed"))
    (tmp_path / "elsewhere" / "again").symlink_to(source)
    with refused(DataError, "again", "links to a folder that holds it"):
        pack_images(source, tmp_path / "loop")


def test_every_kind_of_image_is_decoded(tmp_path):
    kinds = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
    kinds |= {"TIFF": "tif", "PPM": "pgm"}
    files = {f"{kind}.{extension}": encoded(0, kind) for kind, extension in kinds.items()}
    pack_images(write_tree(tmp_path / "source", files), tmp_path / "shards", IN_ORDER)
    for sample in read_back(tmp_path / "shards"):
        (field,) = sample.keys() - {"__key__", "json"}
        assert field == kinds[sample["__key__"]].replace("pgm", "ppm")
        assert tuple(decode_field(field, sample[field]).shape[1:]) == (8, 8)


@pytest.mark.parametrize(
    ("files", "field", "error", "words"),
    [
        (None, None, DataError, ["source", "does not exist"]),
        (["a.txt", "b/.c.png"], None, DataError, ["source", "0 images", ".png, .jpg"]),
        (["x/k.png", "x/k.jpg"], None, DataError, ["x/k.jpg", "x/k.png", "'x/k'", "rename"]),
        (["x/k.png"], "image", ConfigError, ["field='image'", "png"]),
    ],
)
def test_folders_without_images(tmp_path, png, files, field, error, words):
    for name in files or ():
        write_tree(tmp_path / "source", {name: png[0]})
    before = os.listdir(tmp_path)
    with refused(error, *words):
        pack_images(tmp_path / "source", tmp_path / "shards", field=field)
    assert os.listdir(tmp_path) == before


@pytest.fixture
def damaged(tmp_path, png) -> Path:
    """Eleven images: two do not open, one has a byte changed, one has lost its end, one has 32 bits
    a channel."""
    wide = io.BytesIO()
    Image.new("F", (4, 4)).save(wide, format="TIFF")
    files = {f"{n}.png": png[n] for n in range(6)}
    large = io.BytesIO()
    Image.fromarray(digit_pixels(0)).resize((99, 99)).save(large, format="JPEG")
    files |= {"c.png": b"", "d.jpg": b"no image", "f.png": wide.getvalue()}
    files["e.jpg"] = large.getvalue()[:-99]
    files["g.png"] = png[0][:60] + bytes([png[0][60] ^ 1]) + png[0][61:]
    return write_tree(tmp_path / "source", files)


def test_unreadable_images_are_named_and_counted(damaged, tmp_path, capsys):
    with refused(DataError, "4 of 11 ", "image c.png (0 bytes)", "--skip-unreadable"):
        pack_images(damaged, tmp_path / "shards", IN_ORDER)
    with refused(DataError, "5 of 11 "):
        pack_images(damaged, tmp_path / "shards", options(verify="decode", workers=3))
    assert os.listdir(tmp_path) == ["source"]
    arguments = ["shards", "pack", "images", str(damaged), str(tmp_path / "shards")]
    assert main([*arguments, "--skip-unreadable", "--no-shuffle"]) == 0
    said = capsys.readouterr()
    assert "7 samples in 1 shards, 4 left out" in said.out
    assert [line.split()[3] for line in said.err.splitlines()] == [
        "c.png",
        "d.jpg",
        "f.png",
        "g.png",
    ]
    assert "mode F has more than 16 bits a channel; store it as npy" in said.err
    samples = [s["__key__"] for s in map(dict, read_back_keys(tmp_path / "shards"))]
    assert samples == ["0", "1", "2", "3", "4", "5", "e"]
    decoding = options(verify="decode", skip_unreadable=True, overwrite=True)
    packed = pack_images(damaged, tmp_path / "shards", decoding)
    assert len(packed.index) == 6
    assert "image e.jpg cannot be decoded (OSError: image file is truncated" in packed.left_out[2]
    read_back(tmp_path / "shards")


def read_back_keys(folder: Path) -> list[dict]:
    index = load_index(folder)
    return [index.read_contents(number, ()) for number in range(len(index))]


def test_nothing_is_written_after_an_unreadable_sample(tmp_path, monkeypatch):
    made, written = [], []

    class Noting(writer.ShardWriter):
        def write(self, sample):
            written.append(sample["__key__"])
            super().write(sample)

    def make(number: int) -> dict:
        made.append(number)
        if number in (5, 50):
            raise UnreadableSample(f"number {number} is odd")
        return {"__key__": str(number), "bin": b""}

    monkeypatch.setattr(writer, "ShardWriter", Noting)
    with refused(DataError, "2 of 99 ", "number 5 is odd"):
        pack_samples(range(99), make, tmp_path / "shards", options(workers=3))
    assert sorted(made) == list(range(99))
    assert written == list("01234")


def test_nothing_is_left(damaged, tmp_path):
    for path in damaged.glob("?.png"):
        path.write_bytes(b"")
    (damaged / "e.jpg").unlink()
    with refused(DataError, "nothing to pack", "all 10 samples"):
        pack_images(damaged, tmp_path / "shards", options(skip_unreadable=True))
    with refused(DataError, "nothing to pack", "no samples"):
        pack_samples([], make_random, tmp_path / "shards")


# ---------------------------------------------------------------------------- the writer


def make_random(number: int) -> dict:
    """A sample of 0 to 3 KiB, made in a time that does not depend on it."""
    time.sleep(random.random() / 1000)
    rng = np.random.default_rng(number)
    data = rng.bytes(int(rng.integers(3000)))
    return {"__key__": f"k{number:03d}", "bin": data, "cls": number}


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    written = []
    for workers in (1, 3, 3):
        folder = tmp_path / str(len(written))
        name = options(samples=30, workers=workers, name="same")
        pack_samples(range(100), make_random, folder, name, total=100)
        assert load_index(folder).shard_samples.tolist() == [30, 30, 30, 10]
        written.append(contents(folder))
    assert written[0] == written[1] == written[2]
    assert [s["cls"] for s in read_back(tmp_path / "0")] == [str(n).encode() for n in range(100)]


def test_shards_end_at_their_bounds(tmp_path):
    sizes = [tar_bytes(encode_all(make_random(number))) for number in range(200)]
    mib = 50 * 1024 / 2**20
    pack_samples(range(200), make_random, tmp_path / "size", options(mib=mib))
    index = load_index(tmp_path / "size")
    assert all(size <= 50 * 1024 for size in shard_sizes(tmp_path / "size"))
    assert index.shard_bytes.tolist() == shard_sizes(tmp_path / "size")
    for start, stop in zip(index.shard_starts, index.shard_starts[1:-1], strict=False):
        assert sum(sizes[start : stop + 1]) + 1024 > 50 * 1024  # one more would be too many
    pack_samples(range(200), make_random, tmp_path / "both", options(samples=14, mib=mib))
    both = load_index(tmp_path / "both").shard_samples
    assert max(both) == 14
    assert min(both[:-1]) < 14
    assert max(shard_sizes(tmp_path / "both")) <= 50 * 1024
    pack_samples(range(9), make_random, tmp_path / "tiny", options(mib=0.001))
    assert load_index(tmp_path / "tiny").shard_samples.tolist() == [1] * 9
    big = [{"__key__": "a", "bin": b"x"}, {"__key__": "b", "bin": bytes(90_000)}]
    big.append({"__key__": "c", "bin": b"x"})
    pack_samples(big, dict, tmp_path / "big", options(mib=mib))
    assert load_index(tmp_path / "big").shard_samples.tolist() == [1, 1, 1]


def encode_all(sample: dict) -> list[bytes]:
    return [encode_field(name, value) for name, value in sample.items() if name != "__key__"]


@pytest.mark.parametrize("workers", [1, 3])
def test_source_is_read_only_a_little_ahead(tmp_path, monkeypatch, workers):
    taken, ahead = [0], []

    class Counting(writer.ShardWriter):
        def write(self, sample):
            ahead.append(taken[0] - len(ahead))
            super().write(sample)

    def items() -> Iterator[int]:
        for number in range(300):
            taken[0] = number + 1
            yield number

    monkeypatch.setattr(writer, "ShardWriter", Counting)
    pack_samples(items(), make_random, tmp_path / "shards", options(workers=workers))
    assert len(ahead) == 300
    assert workers < max(ahead) <= 4 * workers


def test_too_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_MAX_SHARDS", 3)
    pack_samples(range(3), make_random, tmp_path / "three", options(samples=1))
    with refused(DataError, "more than 3 shards", "--samples-per-shard (now 1)"):
        pack_samples(range(4), make_random, tmp_path / "four", options(samples=1))
    assert os.listdir(tmp_path) == ["three"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["a", "b", "a"], ["two samples", "'a'"]),
        ([*map(str, range(300)), "7"], ["two samples", "'7'"]),
        (["x/a.b"], ["'x/a.b'", "dot", "FOLDER/KEY"]),
        (["x/"], ["'x/'", "last part"]),
        (["__x__/a"], ["'__x__/a'", "webdataset skips"]),
    ],
)
def test_keys_that_cannot_be(tmp_path, keys, words):
    samples = [{"__key__": key, "bin": b""} for key in keys]
    with refused(DataError, *words):
        pack_samples(samples, dict, tmp_path / "shards")
    assert os.listdir(tmp_path) == []


def test_keys_of_paths(tmp_path, png):
    names = ["é" * 60, "x" * 200, "a.b." + "z" * 200, "日本 1", f"{'d' * 150}/{'e' * 150}/f"]
    files = {f"{name}.png": png[number] for number, name in enumerate(names)}
    pack_images(write_tree(tmp_path / "source", files), tmp_path / "shards")
    found = {s["__key__"]: s["png"] for s in read_back(tmp_path / "shards")}
    names[2] = names[2].replace(".", "_")
    assert found == {name: png[number] for number, name in enumerate(names)}
    assert key_of_path("___a__/b.c.png") == "a__/b_c"


def test_long_keys_count_in_the_size_of_a_shard(tmp_path):
    keys = [f"{number}{text}" for number in range(40) for text in ("é", "x" * 150, "ü" * 900)]
    samples = [{"__key__": key, "bin": b"", "cls": 1} for key in keys]
    pack_samples(samples, dict, tmp_path / "shards", options(mib=20 / 1024))
    sizes = shard_sizes(tmp_path / "shards")
    assert set(sizes[:-1]) == {20 * 1024}
    assert sizes[-1] <= 20 * 1024
    index = load_index(tmp_path / "shards")
    assert [index.key(number) for number in range(len(index))] == keys


# ---------------------------------------------------------------------------- whole or not at all


def failing(error: Exception, at: int = 20) -> Callable[[int], dict]:
    def make(number: int) -> dict:
        if number == at:
            raise error
        return make_random(number)

    return make


def test_failed_packing_leaves_all_as_before(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    with pytest.raises(RuntimeError, match="broken"):
        pack_samples(range(100), failing(RuntimeError("broken")), folder, options(samples=5))
    assert os.listdir(tmp_path) == []
    pack_samples(range(10), make_random, folder, options(samples=5))
    before = contents(tmp_path)
    again = options(samples=5, overwrite=True)
    with refused(DataError, "packing into", "disk full"):
        pack_samples(range(100), failing(OSError(28, "disk full")), folder, again)
    assert contents(tmp_path) == before
    rename = Path.rename

    def fail_second(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no move")
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail_second)
        with pytest.raises(DataError, match="no move"):
            pack_samples(range(3), make_random, folder, again)
    assert contents(tmp_path) == before
    pack_samples(range(3), make_random, folder, again)
    assert sorted(os.listdir(folder)) == ["index.npz", "shards-00000.tar"]
    assert os.listdir(tmp_path) == ["shards"]
    assert len(read_back(folder)) == 3


def test_folders_that_hold_something(tmp_path):
    folder = tmp_path / "shards"
    pack_samples(range(3), make_random, folder)
    before = contents(folder)
    with refused(DataError, "'index.npz' (2 files)", "--overwrite"):
        pack_samples(range(3), make_random, folder)
    with refused(DataError, "shards-00000.tar'", "packing other did not write"):
        pack_samples(range(3), make_random, folder, options(name="other", overwrite=True))
    (folder / "notes.txt").write_text("mine")
    with refused(DataError, "'notes.txt'", "packing shards did not write"):
        pack_samples(range(3), make_random, folder, options(overwrite=True))
    (folder / "notes.txt").unlink()
    assert contents(folder) == before
    with refused(DataError, "index.npz", "is a file", "empty folder"):
        pack_samples(range(3), make_random, folder / "index.npz")
    (tmp_path / "empty").mkdir()
    pack_samples(range(3), make_random, tmp_path / "empty")
    for name in ("a{b", "a/b", "*", ""):
        with refused(ConfigError, f"name={name!r}", "letters and digits"):
            options(name=name)
    with refused(ConfigError, "a[b]", "--name NAME"):
        pack_samples(range(3), make_random, tmp_path / "a[b]")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"samples": 0}, ["samples_per_shard=0", "1 or more"]),
        ({"mib": 0.0}, ["shard_mb=0", "above 0"]),
        ({"mib": float("nan")}, ["shard_mb=nan", "above 0"]),
        ({"workers": 0}, ["workers=0", "below 1"]),
        ({"seed": -1}, ["seed=-1", "0 or more"]),
    ],
)
def test_options_that_cannot_be(wrong, words):
    with refused(ConfigError, *words):
        options(**wrong)


_SLOW = """
import sys, time
from pathlib import Path
from dist_contrastive.data.packing.options import PackOptions
from dist_contrastive.data.packing.writer import pack_samples

def make(number):
    if number == 20:
        print("busy", flush=True)
    if number >= 20:
        time.sleep(0.2)
    return {"__key__": f"k{number}", "bin": bytes(100)}

pack_samples(range(10**6), make, sys.argv[1], PackOptions(workers=1))
"""


def test_killed_packing(tmp_path):
    """SIGTERM clears up; what SIGKILL leaves loads as nothing and goes with the next packing."""
    argv = [sys.executable, "-c", _SLOW]
    ends = {signal.SIGTERM: tmp_path / "term" / "x", signal.SIGKILL: tmp_path / "kill" / "x"}
    started = {
        number: subprocess.Popen(
            [*argv, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        for number, folder in ends.items()
    }
    for number, process in started.items():
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        (partial,) = os.listdir(ends[number].parent)
        assert partial.startswith(".x.")
        process.send_signal(number)
    assert started[signal.SIGTERM].wait(120) == 143
    started[signal.SIGKILL].wait(120)
    for process in started.values():
        process.stdout.close()
    assert os.listdir(tmp_path / "term") == []
    (left,) = os.listdir(tmp_path / "kill")
    assert left.startswith(".x.")
    pack_samples(range(3), make_random, ends[signal.SIGKILL])
    assert os.listdir(tmp_path / "kill") == ["x"]


def test_leftovers_of_a_process_that_runs_stay(tmp_path):
    others = [f".x.{socket.gethostname()}-{os.getppid()}.partial", ".x.elsewhere-1.old"]
    dead = f".x.{socket.gethostname()}-{2**22 + 1}.old"  # beyond the largest process number
    for name in (*others, dead):
        (tmp_path / name).mkdir()
    (tmp_path / dead / "old").touch()
    with pytest.raises(RuntimeError):
        pack_samples(range(3), failing(RuntimeError(), 0), tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "x"])  # put back: a move was cut short
    assert os.listdir(tmp_path / "x") == ["old"]


# ---------------------------------------------------------------------------- data sets


@pytest.fixture
def quiet_datasets(tmp_path_factory, monkeypatch):
    """The library, with a cache of its own and no bars."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


@pytest.fixture
def digits_dataset(quiet_datasets, labels, png):
    """Digits of `datasets`, with columns of many kinds."""
    kinds = quiet_datasets
    digits = load_digits()
    columns = {
        "picture": (kinds.Image(), [{"bytes": data, "path": None} for data in png]),
        "digit": (kinds.ClassLabel(names=list(NAMES)), labels),
        "note": (kinds.Value("string"), [f"a handwritten {NAMES[label]}" for label in labels]),
        "pixels": (kinds.Array2D((8, 8), "float32"), digits.images[:COUNT].tolist()),
        "day": (kinds.Value("date32"), [np.datetime64("2024-02-01").item()] * COUNT),
        "tags": (kinds.Sequence(kinds.Value("string")), [["a", "b"]] * COUNT),
        "place": ({"x": kinds.Value("int8")}, [{"x": number} for number in range(COUNT)]),
    }
    features = kinds.Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    return kinds.Dataset.from_dict(values, features, split="train")


def check_digits_dataset(folder: Path, labels: list[int], png: list[bytes]) -> None:
    samples = read_back(folder)
    assert len(samples) == COUNT
    for number, (sample, label) in enumerate(zip(samples, labels, strict=True)):
        assert sorted(sample) == ["__key__", "cls", "json", "npy", "png", "txt"]
        assert sample["__key__"] == f"{number:09d}"
        assert sample["png"] == png[number]
        assert sample["cls"] == str(label).encode()
        assert sample["txt"] == f"a handwritten {NAMES[label]}".encode()
        pixels = decode_field("npy", sample["npy"])
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels, load_digits().images[number])
        assert json.loads(sample["json"]) == {
            "index": number,
            "label": label,
            "class": NAMES[label],
            "day": "2024-02-01",
            "tags": ["a", "b"],
            "place": {"x": number},
        }


def test_dataset_saved_and_in_files(tmp_path, digits_dataset, quiet_datasets, labels, png):
    digits_dataset.save_to_disk(tmp_path / "saved")
    before = contents(tmp_path / "saved")
    digits_dataset.to_parquet(tmp_path / "files" / "digits.parquet")
    both = {"train": digits_dataset, "test": digits_dataset.select(range(3))}
    quiet_datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    for source, split in (
        ("saved", None),
        ("files/digits.parquet", None),
        ("files", "train"),
        ("both", "train"),
    ):
        folder = tmp_path / "shards" / source.replace("/", "-")
        pack_dataset(tmp_path / source, folder, options(name="digits"), split=split)
        check_digits_dataset(folder, labels, png)
    packed = [contents(folder) for folder in sorted((tmp_path / "shards").iterdir())]
    assert packed[0] == packed[1] == packed[2] == packed[3]
    assert contents(tmp_path / "saved") == before
    pack_dataset(tmp_path / "both", tmp_path / "mixed", split="test")
    numbers = [json.loads(s["json"])["index"] for s in read_back(tmp_path / "mixed")]
    assert numbers == keyed_permutation(3, 0).tolist()
    with refused(DataError, "both has several splits", "--split", "train, test"):
        pack_dataset(tmp_path / "both", tmp_path / "no")
    with refused(DataError, "both has no split val", "--split"):
        pack_dataset(tmp_path / "both", tmp_path / "no", split="val")
    with refused(DataError, "train only, not test", "leave --split out"):
        pack_dataset(tmp_path / "saved", tmp_path / "no", split="test")


def saved(datasets, folder: Path, columns: dict[str, list], **features) -> Path:
    known = datasets.Dataset.from_dict(columns)
    if features:
        known = known.cast(datasets.Features({**known.features, **features}))
    known.save_to_disk(folder)
    return folder


def test_dataset_with_things_missing(tmp_path, quiet_datasets, png, jpeg):
    kinds = quiet_datasets
    source = saved(
        kinds,
        tmp_path / "saved",
        {
            "a": [{"bytes": png[0], "path": "a.jpg"}, {"bytes": jpeg[0], "path": None}],
            "b": [None, {"bytes": jpeg[1], "path": None}],
            "Caption": ["x", None],
            "other": ["y", "z"],
            "label": [None, 3],
            "v": [[1, 2], None],
            "w.1": [[0.5], [float("nan")]],
            "score": [float("nan"), 2.0],
        },
        a=kinds.Image(),
        b=kinds.Image(),
    )
    pack_dataset(source, tmp_path / "shards", IN_ORDER, image="a")
    first, second = read_back(tmp_path / "shards")
    assert sorted(first) == sorted(["__key__", "cls", "json", "png", "txt", "v.npy", "w_1.npy"])
    assert sorted(second) == sorted(["__key__", "b.jpg", "cls", "jpg", "json", "w_1.npy"])
    assert (first["png"], second["jpg"], second["b.jpg"]) == (png[0], jpeg[0], jpeg[1])
    assert decode_field("npy", first["v.npy"]).tolist() == [1, 2]
    assert decode_field("npy", first["v.npy"]).dtype == np.int64
    assert [s["cls"] for s in (first, second)] == [b"-1", b"3"]
    assert json.loads(first["json"]) == {"index": 0, "label": None, "other": "y", "score": None}
    assert json.loads(second["json"]) == {"index": 1, "label": 3, "other": "z", "score": 2.0}
    with refused(DataError, "1 of 2 ", "no image in column 'b'"):
        pack_dataset(source, tmp_path / "no", IN_ORDER, image="b", text="-", label="-")
    left = {"text": "-", "label": "-", "drop": ["b", "v", "w.1", "Caption"], "field": "jpg"}
    pack_dataset(source, tmp_path / "few", IN_ORDER, image="a", **left)
    first, second = read_back(tmp_path / "few")
    assert sorted(first) == sorted(second) == ["__key__", "jpg", "json"]
    assert set(json.loads(first["json"])) == {"index", "label", "other", "score"}


def test_dataset_of_image_files(tmp_path, quiet_datasets, png, jpeg):
    import pyarrow as pa
    import pyarrow.parquet

    source = write_tree(tmp_path / "tree", {"b/1.png": png[0], "a/2.jpg": jpeg[0]})
    pack_dataset(source, tmp_path / "shards", IN_ORDER)
    first, second = read_back(tmp_path / "shards")
    assert (first["jpg"], first["cls"], second["png"], second["cls"]) == (
        jpeg[0], b"0", png[0], b"1"
    )  # fmt: skip
    assert json.loads(second["json"]) == {"index": 1, "label": 1, "class": "b"}
    paths = [str(source / name) for name in ("b/1.png", "a/2.jpg")]
    stored = [{"bytes": None, "path": path} for path in paths]  # as pandas writes them
    pa.parquet.write_table(pa.table({"picture": stored}), tmp_path / "p.parquet")
    pack_dataset(tmp_path / "p.parquet", tmp_path / "paths", IN_ORDER)
    first, second = read_back(tmp_path / "paths")
    assert (first["png"], second["jpg"]) == (png[0], jpeg[0])
    (source / "a" / "2.jpg").unlink()
    with refused(DataError, "1 of 2 ", "a/2.jpg of column 'picture' of row 1", "No such file"):
        pack_dataset(tmp_path / "p.parquet", tmp_path / "no")


def test_dataset_with_bytes_pixels_and_names(tmp_path, quiet_datasets, png):
    columns = {
        "data": png[:3],
        "pixels": [digit_pixels(number).tolist() for number in range(3)],
        "kind": ["b", "a", "b"],
        "grade": [0.5, float("nan"), 1.0],
    }
    source = saved(quiet_datasets, tmp_path / "saved", columns)
    with refused(ConfigError, "'data'", "no field", "--drop data", "--image data"):
        pack_dataset(source, tmp_path / "no")
    pack_dataset(source, tmp_path / "bytes", IN_ORDER, image="data", label="kind", drop=["pixels"])
    samples = read_back(tmp_path / "bytes")
    assert [s["png"] for s in samples] == png[:3]
    assert [s["cls"] for s in samples] == [b"1", b"0", b"1"]
    assert json.loads(samples[1]["json"]) == {
        "index": 1, "label": 0, "class": "a", "grade": None
    }  # fmt: skip
    pixels = {"image": "pixels", "text": "-", "label": "grade", "drop": ["data"]}
    pack_dataset(source, tmp_path / "pixels", IN_ORDER, **pixels)
    for number, sample in enumerate(read_back(tmp_path / "pixels")):
        assert np.array_equal(decode_field("png", sample["png"])[0], digit_pixels(number))
        assert "cls" not in sample
    assert json.loads(sample["json"]) == {"index": 2, "label": 1.0, "kind": "b"}
    wrong = saved(quiet_datasets, tmp_path / "wrong", {"p": [[[0.5, 1.0]]]})
    with refused(
        DataError, "column 'p' of row 0", "float64", "0.5 to 1.0", "0 to 255", "--image -"
    ):
        pack_dataset(wrong, tmp_path / "no", image="p")
    ragged = saved(quiet_datasets, tmp_path / "ragged", {"p": [[[1], [1, 2]]]})
    with refused(DataError, "column 'p' of row 0", "no array", "--drop"):
        pack_dataset(ragged, tmp_path / "no")


def test_columns_that_are_not_clear(tmp_path, quiet_datasets, digits_dataset):
    kinds = quiet_datasets
    source, to = tmp_path / "saved", tmp_path / "no"
    more = digits_dataset.add_column("title", ["t"] * COUNT).add_column("text", ["t"] * COUNT)
    more = more.add_column("class", [1] * COUNT).add_column("digit2", digits_dataset["digit"][:])
    more = more.cast_column("digit2", kinds.ClassLabel(num_classes=10))
    more = more.add_column("other", [{"bytes": b"", "path": ""}] * COUNT)
    more.save_to_disk(source)
    cases: list[tuple[dict, list[str]]] = [
        ({}, ["picture, other", "image", "--image COLUMN", "--image -"]),
        ({"image": "picture"}, ["title, text", "the text", "--text COLUMN", "--text -"]),
        ({"image": "-", "text": "note"}, ["digit, digit2", "the label"]),
        ({"image": "-", "text": "-", "label": "digit"}, ["'class'", "hidden", "--drop class"]),
        ({"image": "huge"}, ["'huge'", "picture, digit, note"]),
        ({"drop": ["huge"]}, ["'huge'", "picture, digit, note"]),
        ({"image": "picture", "text": "digit"}, ["'digit'", "the text", "kind class"]),
        ({"image": "picture", "drop": ["picture"]}, ["'picture'", "the image", "dropped"]),
    ]
    for chosen, words in cases:
        with refused(ConfigError, *words):
            pack_dataset(source, to, **chosen)
    clip = kinds.Dataset.from_dict({"clip": [{"bytes": b"", "path": ""}]})
    clip.cast_column("clip", kinds.Audio()).save_to_disk(source)
    with refused(ConfigError, "'clip' holds Audio", "--drop clip"):
        pack_dataset(source, to)
    saved(kinds, source, {"V": [[1]], "v": [[1]]})
    with refused(ConfigError, "V, v", "fields v, v", "--drop"):
        pack_dataset(source, to)
    assert not to.exists()


def test_datasets_that_cannot_be_loaded(tmp_path, quiet_datasets, digits):
    to = tmp_path / "no"
    files = write_tree(tmp_path, {"x.pkl": b"", "x.json": b"{", "x.parquet": b"{"})
    for source, words in (
        (tmp_path / "nowhere", ["nowhere does not exist", "name of the hub"]),
        ("nowhere.parquet", ["nowhere.parquet does not exist"]),
        ("no such name!", ["HFValidationError", "save_to_disk"]),
        (files / "x.pkl", ["x.pkl", ".parquet"]),
        (files / "x.json", ["line 1 of", "x.json is no JSON"]),
        (files / "x.parquet", ["x.parquet cannot be loaded"]),
        (digits / "train", ["webdataset", "not allowed"]),
    ):
        with refused(DataError, *words):
            pack_dataset(source, to)
    assert not to.exists()


def test_dataset_of_pickles_is_not_read(tmp_path, quiet_datasets):
    trap = tmp_path / "executed"
    write_tree(tmp_path / "source", {"x.pkl": pickle.dumps(Bomb(trap))})
    with pytest.raises(DataError, match="cannot be loaded"):
        pack_dataset(tmp_path / "source", tmp_path / "no")
    assert not trap.exists()


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# ---------------------------------------------------------------------------- arrays


def test_arrays(tmp_path, labels):
    gray = np.stack([digit_pixels(number) for number in range(COUNT)])
    last = np.stack([gray, gray // 2, gray // 3], axis=3)
    vectors = load_digits().data[:COUNT].astype(">f4")
    np.save(tmp_path / "gray.npy", gray)
    np.save(tmp_path / "last.npy", last)
    np.save(tmp_path / "labels.npy", np.array(labels, np.int16))
    grades = np.where(np.arange(COUNT) == 1, np.nan, 0.5)
    np.savez(tmp_path / "all.npz", x=np.moveaxis(last, 3, 1), v=vectors, y=grades)
    names = [str(tmp_path / name) for name in ("gray.npy", "last.npy", "all.npz:x")]
    for number, image in enumerate(names):
        folder = tmp_path / str(number)
        files = {"array": f"{tmp_path}/all.npz:v", "label": f"{tmp_path}/labels.npy"}
        pack_arrays(folder, IN_ORDER, image=image, **files)
        for row, sample in enumerate(read_back(folder)):
            pixels = gray[row][None] if number == 0 else np.moveaxis(last[row], 2, 0)
            assert np.array_equal(decode_field("png", sample["png"]), pixels)
            vector = decode_field("npy", sample["npy"])
            assert (vector.dtype, vector.tolist()) == (np.dtype(">f4"), vectors[row].tolist())
            assert sample["cls"] == str(labels[row]).encode()
            assert json.loads(sample["json"]) == {"index": row, "label": labels[row]}
    pack_arrays(
        tmp_path / "x", image=f"{tmp_path}/all.npz:v", label=f"{tmp_path}/all.npz:y"
    )  # shuffled
    for sample, row in zip(read_back(tmp_path / "x"), keyed_permutation(COUNT, 0), strict=True):
        assert sorted(sample) == ["__key__", "json", "npy"]
        assert decode_field("npy", sample["npy"]).tolist() == vectors[row].tolist()
        label = None if row == 1 else 0.5
        assert json.loads(sample["json"]) == {"index": row, "label": label}


def test_arrays_that_cannot_be_packed(tmp_path):
    trap = tmp_path / "executed"
    objects = np.array([Bomb(trap)])
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb(trap)))
    np.savez(tmp_path / "z.npz", a=np.zeros(3), o=objects)
    for name, array in {
        "four": np.zeros((4, 5, 5), np.uint8),
        "float": np.zeros((3, 2)),
        "rgba": np.zeros((3, 5, 5, 4), np.uint8),
        "unclear": np.zeros((3, 3, 5, 3), np.uint8),
        "none": np.zeros((0, 5, 5), np.uint8),
        "text": np.array(["a"]),
        "point": np.zeros(()),
        "bool": np.zeros(3, bool),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    cases: list[tuple[dict, type[Exception], list[str]]] = [
        ({}, ConfigError, ["--image FILE.npy", "--array FILE.npy"]),
        ({"image": "x.npy"}, DataError, ["x.npy of --image", "No such file"]),
        ({"image": "objects.npy"}, DataError, ["objects.npy of --image", "Python obj"]),
        ({"image": "pickle.npy"}, DataError, ["pickle.npy of --image", "pickle"]),
        ({"array": "z.npz:o"}, DataError, ["z.npz of --array", "pickle"]),
        ({"array": "z.npz"}, DataError, ["z.npz of --array", "a, o", "z.npz:a"]),
        ({"array": "z.npz:b"}, DataError, ["z.npz:b of --array", "a, o"]),
        ({"image": "four.npy", "label": "float.npy"}, DataError, ["4 of", "3 of"]),
        ({"image": "float.npy", "array": "float.npy"}, ConfigError, ["field npy", "uint8"]),
        ({"image": "rgba.npy"}, DataError, ["[5, 5, 4]", "no image", "C = 1 or 3"]),
        ({"image": "unclear.npy"}, DataError, ["could be [C, H, W] and [H, W, C]"]),
        ({"image": "none.npy"}, DataError, ["none.npy have 0 rows", "1 or more"]),
        ({"array": "text.npy"}, DataError, ["text.npy", "<U1", "[n, ...]"]),
        ({"array": "point.npy"}, DataError, ["float64", "shape []", "[n, ...]"]),
        ({"array": "float.npy", "label": "bool.npy"}, DataError, ["type bool", "[n]"]),
        ({"array": "float.npy", "label": "float.npy"}, DataError, ["shape [3, 2]", "[n]"]),
    ]
    for files, error, words in cases:
        with refused(error, *words):
            pack_arrays(tmp_path / "no", **{k: str(tmp_path / v) for k, v in files.items()})
    assert not trap.exists()
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------- pairs

TEXTS = ['a "quoted" one', "two\nlines", "a, comma", "ünï", "."]


def test_pairs(tmp_path, png, jpeg):
    root = write_tree(tmp_path, {"pictures/a.png": png[0], "pictures/b.jpg": jpeg[1]})
    paths = ["pictures/a.png", str(tmp_path / "pictures/b.jpg"), *["pictures/a.png"] * 3]
    rows = [
        {"Image": path, "caption": text, "n": str(number)}
        for number, (path, text) in enumerate(zip(paths, TEXTS, strict=True))
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (root / "p.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    for name, delimiter in (("p.csv", ","), ("p.TSV", "\t")):
        with (root / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, ["Image", "caption", "n"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    written = []
    for name in ("p.jsonl", "p.csv", "p.TSV"):
        folder = tmp_path / "shards" / name
        form = TextFormat(quotes="csv") if name == "p.TSV" else None  # there they may be text
        pack_pairs(root / name, folder, options(name="same", workers=3), form=form)
        written.append(contents(folder))
        for number, sample in enumerate(read_back(folder)):
            image = {"jpg": jpeg[1]} if number == 1 else {"png": png[0]}
            assert sample == {
                "__key__": f"{number:09d}",
                "json": json.dumps({"Image": paths[number], "n": str(number)}).encode(),
                "txt": TEXTS[number].encode(),
                **image,
            }
    assert written[0] == written[1] == written[2]
    pack_pairs(root / "p.csv", tmp_path / "labels", label="n", text="caption", field="jpg")
    for sample in read_back(tmp_path / "labels"):
        number = int(sample["__key__"])
        assert sample["cls"] == str(number).encode()
        assert json.loads(sample["json"]) == {"Image": paths[number], "label": number}
        assert sample["jpg"] == (jpeg[1] if number == 1 else png[0])
        assert sample["txt"] == TEXTS[number].encode()
    (root / "l.csv").write_text("file,y\npictures/a.png,3\n")
    pack_pairs(root / "l.csv", tmp_path / "only", label="y")
    assert sorted(read_back(tmp_path / "only")[0]) == ["__key__", "cls", "json", "png"]


def test_pairs_with_images_missing(tmp_path, png, capsys):
    write_tree(tmp_path, {"a.png": png[0], "bad.png": b"x"})
    rows = ["image,text", "a.png,x", "b.png,y", '"c.png","z', 'z"', "bad.png,w"]
    (tmp_path / "p.csv").write_text("\n".join(rows))
    words = ["line 3 of", "b.png", "2 of 4 rows", f"from {tmp_path}", "--skip-unreadable"]
    with refused(DataError, *words):
        pack_pairs(tmp_path / "p.csv", tmp_path / "no")
    packed = pack_pairs(tmp_path / "p.csv", tmp_path / "some", options(skip_unreadable=True))
    assert len(packed.index) == 1
    places = (("b", 3), ("c", 4), ("bad", 6))
    starts = [f"image {n}.png of column 'image' of line {k}" for n, k in places]
    for reason, start in zip(packed.left_out, starts, strict=True):
        assert reason.startswith(f"{start} of {tmp_path}")
    (tmp_path / "b.png").write_bytes(png[1])
    (tmp_path / "c.png").write_bytes(png[1])
    with refused(DataError, "1 of 4 ", "image bad.png of column 'image' of line 6 of"):
        pack_pairs(tmp_path / "p.csv", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "text", "chosen", "words"),
    [
        ("p.txt", "[]", {}, ["p.txt", "no known kind", ".csv, .tsv, .json, .jsonl"]),
        ("p.json", "[]", {}, ["p.json has 0 rows"]),
        ("p.json", "[3", {}, ["p.json is no JSON", "list of objects"]),
        ("p.csv", "", {}, ["p.csv has 0 rows", "1 or more"]),
        ("p.csv", "image,text\n", {}, ["p.csv has 0 rows"]),
        ("p.csv", "a,a\n1,2\n", {}, ["a, a", "name of its own"]),
        ("p.csv", "image,text\nx\n", {}, ["line 2 of", "1 cells", "header has 2"]),
        ("p.csv", 'image,text\nx,"y\n', {}, ["line 2 of", "unexpected end"]),
        ("p.csv", b"image,text\nx,\xff\n", {}, ["line 2 of", "--encoding"]),
        ("p.jsonl", '{"image": "x"\n', {}, ["line 1 of", "no JSON", "one object a line"]),
        ("p.jsonl", "\n\n[1]\n", {}, ["line 3 of", "no object", "one a line"]),
        ("p.csv", "a,text\nx,y\n", {}, ["which column is the image", "--image", "a, text"]),
        ("p.csv", "path,file,text\nx,y,z\n", {}, ["--image", "path, file, text"]),
        ("p.csv", "image,b\nx,y\n", {}, ["which column is the text", "--text"]),
        ("p.csv", "image,b\nx,y\n", {"text": "c"}, ["'c'", "image, b"]),
        ("p.jsonl", '{"image": 3, "text": ""}', {}, ["'image' cannot be", "kind integer"]),
        ("p.jsonl", '{"image": "x"}\n{"text": 1}', {}, ["'text' cannot be", "kind integer"]),
        ("p.jsonl", '{"image": "x"}\n{"image": 3, "text": "a"}', {}, ["2 of 2 rows", "image x of"]),
        ("p.csv", "image,k\nx,1.5\n", {"label": "k"}, ["1 of 1 rows", "image x of"]),
        ("p.csv", "image,k,label\nx,1,2\n", {"label": "k"}, ["'label'", "--label k", "hidden"]),
    ],
)
def test_tables_that_cannot_be_packed(tmp_path, name, text, chosen, words):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
    with refused((DataError, ConfigError), *words):
        pack_pairs(tmp_path / name, tmp_path / "no", **chosen)
    assert os.listdir(tmp_path) == [name]


# ---------------------------------------------------------------------------- merging and listing


@pytest.fixture
def many(tmp_path) -> Path:
    """Ten shards of six samples."""
    pack_samples(range(60), make_random, tmp_path / "many", options(samples=6))
    return tmp_path / "many"


def test_merging_keeps_all_bytes(many, tmp_path):
    before = read_back(many)
    merge_shards([many], tmp_path / "two", options(samples=40))
    assert read_back(tmp_path / "two") == before
    assert load_index(tmp_path / "two").shard_samples.tolist() == [40, 20]
    merge_shards([many], tmp_path / "back", options(samples=6, name="many"))
    assert contents(tmp_path / "back") == contents(many)
    size = 64 * 1024
    merge_shards([many], tmp_path / "size", options(mib=size / 2**20))
    assert max(shard_sizes(tmp_path / "size")) <= size
    assert 1 < len(shard_sizes(tmp_path / "size")) < 10
    (many / "index.npz").unlink()  # and without an index
    pattern = f"{many}/many-0000{{3..4}}.tar"
    merge_shards([pattern, many / "many-00000.tar"], tmp_path / "some")
    assert read_back(tmp_path / "some") == [*before[18:30], *before[:6]]


def test_merging_tars_of_others(tmp_path):
    write_tree(tmp_path / "in", {"a.jpg": b"1", "a.JSON": b"2", "b.x.bin": b"3", "README": b""})
    folder = tmp_path / "tars"
    folder.mkdir()
    names = ["README", "a.jpg", "a.JSON", "b.x.bin"]
    subprocess.run(["tar", "-cf", folder / "t.tar", "-C", tmp_path / "in", *names], check=True)
    write_samples(folder / "empty.tar", [])
    merge_shards([folder], tmp_path / "out")
    assert read_back(tmp_path / "out") == [
        {"__key__": "a", "jpg": b"1", "json": b"2"},
        {"__key__": "b", "x.bin": b"3"},
    ]


def test_keys_in_two_shards(many, tmp_path):
    other = tmp_path / "other"
    pack_samples(range(57, 90), make_random, other, options(name="many"))
    with refused(DataError, "'k057'", "many-00009.tar", "other/many-00000.tar", "--prefix-keys"):
        merge_shards([many, other], tmp_path / "no")
    merge_shards([many, other], tmp_path / "all", prefix_keys=True)
    expected = [
        {**s, "__key__": f"many/many-{number // 6:05d}/{s['__key__']}"}
        for number, s in enumerate(read_back(many))
    ]
    expected += [{**s, "__key__": f"other/many-00000/{s['__key__']}"} for s in read_back(other)]
    assert read_back(tmp_path / "all") == expected
    merge_shards([many], tmp_path / "one", prefix_keys=True)
    assert read_back(tmp_path / "one")[7]["__key__"] == "many-00001/k007"


def test_shards_that_cannot_be_merged(many, tmp_path):
    shard = many / "many-00002.tar"
    cases = [
        ([many, shard], "many-00002.tar is given 2 times"),
        ([tmp_path / "nowhere"], "nowhere does not exist"),
        ([many / "x.tar"], "does not exist"),
    ]
    for sources, words in cases:
        with refused(DataError, words):
            merge_shards(sources, tmp_path / "no")
    with refused(DataError, "many-00002.tar", "another folder"):
        merge_shards([shard], many, options(overwrite=True, name="many"))
    whole = shard.read_bytes()
    index = load_index(many)
    place = int(index.sample_offset[13]) + 600  # content of a field
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with refused(DataError, "many-00002.tar is damaged", "'bin'"):
        merge_shards([many], tmp_path / "no")
    shard.write_bytes(whole[: 2**12])
    with refused(DataError, "many-00002.tar", "truncated"):
        merge_shards([many], tmp_path / "no")
    assert os.listdir(tmp_path) == ["many"]


def test_list(many, tmp_path, capsys):
    write_samples(tmp_path / "x.tar", [make_random(0)])
    assert main(["shards", "list", str(many), f"{tmp_path}/*.tar"]) == 0
    said = capsys.readouterr()
    head, *lines = [line.split() for line in said.out.splitlines()]
    assert head == ["shard", "MiB", "samples"]
    shards = [*sorted(many.glob("*.tar")), tmp_path / "x.tar"]
    sizes = [f"{shard.stat().st_size / 2**20:.1f}" for shard in shards]
    assert lines == [
        *([str(s), size, "6"] for s, size in zip(shards[:-1], sizes[:-1], strict=True)),
        [str(shards[-1]), sizes[-1], "?"],
        ["11", "shards", lines[-1][2], "?"],
    ]
    assert "no samples counted" in said.err
    assert "shards index" in said.err
    assert main(["shards", "list", str(many)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 60")


# ---------------------------------------------------------------------------- the command


def test_commands(tmp_path, png, labels, quiet_datasets, capsys):
    files = {f"{label}/{n}.png": png[n] for n, label in enumerate(labels)}
    source = write_tree(tmp_path / "images", files)
    np.save(tmp_path / "x.npy", np.stack([digit_pixels(n) for n in range(5)]))
    (tmp_path / "p.csv").write_text(f"image,text\nimages/{labels[0]}/0.png,zero\n")
    saved(quiet_datasets, tmp_path / "saved", {"image": [digit_pixels(0).tolist()], "text": ["a"]})
    for arguments, samples in (
        (["pack", "images", source, "--samples-per-shard=20"], "40 samples in 2 shards"),
        (["pack", "images", source, "--shard-mb", "0.01", "--name=n"], "40 samples in"),
        (["pack", "pairs", tmp_path / "p.csv", "--workers", "1"], "1 samples in 1 shards"),
        (["pack", "dataset", tmp_path / "saved", "--image=image"], "1 samples in 1 shards"),
        (["merge", tmp_path / "0", tmp_path / "1", "--prefix-keys"], "80 samples in 1 shards"),
        (["pack", "arrays", "--image", tmp_path / "x.npy", "--seed=3"], "5 samples in 1 shards"),
    ):
        folder = tmp_path / str(len(list(tmp_path.glob("[0-9]"))))
        words = [str(a) for a in arguments]
        place = 3 if "arrays" not in words else 2
        assert main(["shards", *words[:place], str(folder), *words[place:]]) == 0
        assert f"{folder}: {samples}" in capsys.readouterr().out
        read_back(folder)
    assert (
        main(["shards", "pack", "images", str(source), str(tmp_path / "0"), "--no-shuffle"]) == 64
    )
    assert main(["shards", "pack", "images", str(source), str(tmp_path / "0"), "--overwrite"]) == 0
    write_tree(source, {f"{labels[0]}/z.jpg": encoded(0, "JPEG")})
    assert main(["shards", "pack", "images", str(source), str(tmp_path / "z")]) == 0
    out = capsys.readouterr().out
    assert "fields: cls, jpg (1), json, png (40)" in out
    assert "--field png gives all images that one" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pack images nowhere OUT", "the image folder nowhere does not exist"),
        ("pack images . OUT --shard-mb 0", "shard_mb=0 is not above 0"),
        ("pack images . OUT --workers 0", "workers=0 is below 1"),
        ("pack pairs nowhere.csv OUT", "the table nowhere.csv cannot be read (No such file"),
        ("pack dataset nowhere.parquet OUT", "nowhere.parquet does not exist"),
        ("pack arrays OUT", "give --image FILE.npy or --array FILE.npy"),
        ("merge nowhere OUT", "the shard folder nowhere does not exist"),
        ("merge OTHER OTHER OUT", "is given 2 times"),
        ("list nowhere", "the shard folder nowhere does not exist"),
    ],
)
def test_refusals_of_the_command(arguments, words, tmp_path, capsys):
    write_samples(tmp_path / "other.tar", [make_random(0)])
    places = {"OUT": str(tmp_path / "out"), "OTHER": str(tmp_path / "other.tar")}
    assert main(["shards", *(places.get(word, word) for word in arguments.split())]) == 64
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert os.listdir(tmp_path) == ["other.tar"]


def test_help_and_what_is_imported():
    helps = [command("shards", "pack", "--help"), command("shards", "pack", "dataset", "--help")]
    for argv in helps:
        done = run([argv[0], "-X", "importtime", *argv[1:]])
        assert done.returncode == 0
        assert "SOURCE" in done.stdout or "Images with texts or labels" in done.stdout
        for package in ("torch", "numpy", "datasets", "PIL"):
            assert f" {package}\n" not in done.stderr
    modules = "hub, images, arrays, pairs, merge"
    code = f"import sys; from dist_contrastive.data.packing import {modules}; "
    code += "sys.exit('datasets' in sys.modules or 'pyarrow' in sys.modules)"
    assert run([sys.executable, "-c", code]).returncode == 0
