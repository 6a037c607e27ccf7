"""Configs, tars, indexes and run directories changed at random: each is read, or is one sentence.

Seeded, in one process. `make test` has 300 changes of each, `make test-all` many times that.
"""

import io
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import yaml
from conftest import CONFIGS

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.data import index_folder, load_index
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.shards.verify import verify_shards
from dist_contrastive.errors import DataError, UserError
from dist_contrastive.runs import export
from launch.slurm.control import status, table

ENCODER = CONFIGS / "digits_encoder.yaml"
NUMBERS = (None, True, -1, 0, 10**9, 10**30, -0.0, 1e308, float("inf"), float("nan"))
TEXTS = ("", "x" * 5000, "\x1b[2J\n", "\udc80", "a:b", "1e5", "null", "https://me:pass@x/?sig=1")
ODD: tuple[Any, ...] = (*NUMBERS, *TEXTS, [], [[]], {}, {"name": "x"}, {1: 2}, [0] * 99)
MOST_MB = 400  # that reading any of them may add to the memory of the process


@pytest.fixture(params=[300, pytest.param(5000, marks=pytest.mark.slow)], ids=["few", "many"])
def changes(request) -> int:
    return request.param


def one_sentence(read: Callable[[], object], what: str) -> bool:
    """Whether it was read; it was refused in one sentence else."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
    except UserError as error:
        message = str(error)
        assert message.isprintable(), what
        assert 10 < len(message) < 2000, f"{what}: {message}"
        return False
    except Exception as error:
        raise AssertionError(what) from error
    finally:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MOST_MB, f"{what}: {grown:.0f} MiB"
    return True


def changed(data: bytes, random: random.Random) -> bytes:
    """Bytes as disks, copies and editors change them."""
    at = random.randrange(len(data) + 1)
    length = random.choice((1, 2, 8, 100, 512, len(data)))
    some = random.randbytes(min(length, 600))
    match random.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + some + data[at:]
        case 3:
            return data[:at] + bytes(length) + data[at + length :]
        case 4:
            return data[:at] + some + data[at + len(some) :]
    flipped = bytearray(data)
    for _ in range(random.choice((1, 3, 20))):
        flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(flipped)


# ------------------------------------------------------------------ configs


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree: what holds it, and its key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = [(tree, key) for key, _ in items]
    inner = tree.values() if isinstance(tree, dict) else tree
    return parts + [place for x in inner if isinstance(x, dict | list) for place in leaves(x)]


def odd_config(text: str, random: random.Random) -> bytes:
    if random.random() < 0.4:
        return changed(text.encode(), random)
    tree = yaml.safe_load(text)
    for _ in range(random.choice((1, 1, 3))):
        holder, key = random.choice(leaves(tree))
        match random.randrange(4):
            case 0 if isinstance(holder, dict):
                holder.pop(key)
            case 1 if isinstance(holder, dict):
                holder[random.choice(("nam", "name", 1, None, "encoder"))] = holder.pop(key)
            case _:
                holder[key] = random.choice(ODD)
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def test_configs(changes, tmp_path):
    texts = [path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))]
    draw, path = random.Random(1), tmp_path / "c.yaml"
    read = 0
    for number in range(changes):
        path.write_bytes(odd_config(draw.choice(texts), draw))
        read += one_sentence(lambda: configs.load(path), f"{number}: {path.read_bytes()!r}")
    assert 0 < read < changes


# ------------------------------------------------------------------ tars


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    image = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    samples = [
        {"__key__": f"s{n}" * (1 + 60 * (n == 3)), "cls": n, "png": image, "json": {"n": n}}
        | {"npy": np.arange(n + 2.0), "txt": "text"}
        for n in range(6)
    ]
    write_samples(folder / "a.tar", samples)
    write_samples(folder / "b.tar", samples[:2])
    index_folder(folder)
    return folder


def odd_tar(data: bytes, random: random.Random) -> bytes:
    """As `changed`, or a header that lies, with the right checksum."""
    if random.random() < 0.4:
        return changed(data, random)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = random.choice(headers)
    header = bytearray(data[at : at + 512])
    match random.randrange(4):
        case 0:
            sizes = (2**33 - 1, 512, 0, 10**6, 10**9)
            header[124:136] = b"%011o\0" % random.choice(sizes)
        case 1:
            header[124:136] = random.choice((b"\x80", b"\xff")) + random.randbytes(11)
        case 2:
            header[156:157] = random.choice((b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"5", b"\0"))
        case 3:
            header[: random.randrange(1, 100)] = random.randbytes(random.randrange(1, 100))[:99]
            header = header[:512].ljust(512, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) * random.choice((1, 1, 1, 2, 2000)) + data[at + 512 :]


def read_whole(folder: Path) -> None:
    index = load_index(folder)
    for number in range(len(index)):
        one_sentence(lambda number=number: index.read(number), f"sample {number}")


def test_tars(changes, shards, tmp_path):
    draw, sound = random.Random(2), (shards / "a.tar").read_bytes()
    path = tmp_path / "a.tar"
    read = 0
    for number in range(changes):
        path.write_bytes(odd_tar(sound, draw))
        if one_sentence(lambda: index_folder(tmp_path, full=True), f"tar {number}"):
            read_whole(tmp_path)
            read += 1
        one_sentence(lambda: verify_shards(path, decode=True), f"tar {number}, verified")
    assert 0 < read < changes


# ------------------------------------------------------------------ indexes


def odd_index(data: bytes, random: random.Random) -> bytes:
    """As `changed`, or an index that lies in the right form."""
    if random.random() < 0.3:
        return changed(data, random)
    with np.load(io.BytesIO(data)) as stored:
        arrays = dict(stored)
    name = random.choice(list(arrays))
    array = arrays[name]
    lies = [
        lambda: array[:-1] if array.ndim else array[None],
        lambda: np.concatenate([array, array]) if array.ndim else array[None],
        lambda: array.astype(np.float64) if array.dtype.kind in "iu" else array,
        lambda: np.zeros((0,), array.dtype),
        lambda: array.reshape(1, *array.shape),
    ]
    if array.dtype.kind in "iu" and array.size:

        def other() -> np.ndarray:
            copy = array.copy()
            limits = np.iinfo(array.dtype)
            odd = (limits.min, limits.max, limits.max - 1, 0, 1, 512, 10**4)
            copy.flat[random.randrange(copy.size)] = random.choice(odd)
            return copy

        lies += [other] * 6
    if array.dtype.kind == "U":
        lies += [lambda: np.full(array.shape, random.choice(("", "../../x", "/dev/zero", "a.tar")))]
    arrays[name] = random.choice(lies)()
    stream = io.BytesIO()
    (np.savez_compressed if random.random() < 0.1 else np.savez)(stream, **arrays)
    return stream.getvalue()


def test_indexes(changes, shards, tmp_path):
    for name in ("a.tar", "b.tar", "index.npz"):
        shutil.copy2(shards / name, tmp_path)
    draw, path = random.Random(3), tmp_path / "index.npz"
    sound = path.read_bytes()
    read = 0
    for number in range(changes):
        path.write_bytes(odd_index(sound, draw))
        read += one_sentence(lambda: read_whole(tmp_path), f"index {number}")
        one_sentence(lambda: verify_shards(tmp_path), f"index {number}, verified")
        if number % 10 == 0:  # indexed again it is as it was
            index_folder(tmp_path, full=True)
            assert path.read_bytes() == sound
    assert 0 < read < changes


def npy(shape: str, content: bytes, kind: str = "<i8") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


LIES = [
    *(("(999999999999,)", "<i8"), ("(-1,)", "<i8"), ("(2,)", "<i8"), ("(10**9,)", "<i8")),
    *(("(1,) * 40", "<i8"), ("((((", "<i8"), ("-" * 9000 + "1", "<i8"), ("(True,)", "|O")),
    *(("(999999999999,)", "<U0"), ("(999999999999,)", "|V0"), ("(999999999999,)", "|S0")),
]


@pytest.mark.parametrize(("shape", "kind"), LIES)
def test_arrays_that_tell_of_more_than_they_hold(shape, kind, tmp_path):
    content = b"" if kind[-1] == "0" else bytes(8)
    write_samples(tmp_path / "a.tar", [{"__key__": "a", "npy": npy(shape, content, kind)}])
    index = index_folder(tmp_path)
    with pytest.raises(DataError, match="cannot be decoded"):
        index.read(0)
    sound = (tmp_path / "index.npz").read_bytes()
    with ZipFile(io.BytesIO(sound)) as read, ZipFile(tmp_path / "index.npz", "w") as written:
        for name in read.namelist():
            is_lie = name == "shards.npy"
            written.writestr(name, npy(shape, content, kind) if is_lie else read.read(name))
    with pytest.raises(DataError, match=r"the index .* cannot be read"):
        load_index(tmp_path)


@pytest.mark.parametrize("notes", ['{"links": "x"}', '{"links": 1e999}', "[" * 50_000])
def test_notes_of_an_index_that_are_none(notes, shards, tmp_path):
    shutil.copy2(shards / "a.tar", tmp_path)
    with np.load(shards / "index.npz") as stored:
        arrays = dict(stored) | {"shard_left_out": np.array([notes])}
    np.savez(tmp_path / "index.npz", **arrays)
    with pytest.raises(DataError, match=r"the index .* cannot be read"):
        load_index(tmp_path)


def test_an_index_larger_than_memory_is_mapped(shards, tmp_path):
    shutil.copy2(shards / "a.tar", tmp_path)
    with (tmp_path / "index.npz").open("wb") as file:
        file.truncate(1 << 43)  # sparse
    with pytest.raises(DataError, match="not a zip file"):
        load_index(tmp_path)
    assert len(index_folder(tmp_path)) == 6  # a new one repairs


# ------------------------------------------------------------------ run directories


@pytest.fixture(scope="module")
def trained(tmp_path_factory, overrides) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    small = (
        *("task.encoder={name: residual, widths: [8]}", "task.head={hidden: 4, out: 4}"),
        *("data.global_batch_size=16", "train.steps=2", "train.save_every=1", "train.trackers=[]"),
    )
    assert trainer.train(configs.load(ENCODER, overrides(run_dir, *small))) == 0
    job = dict.fromkeys(("submitted", "folder", "logs", "config", "cwd"), "x")
    line = json.dumps({**job, "job": "1", "cluster": "local", "options": {}})
    (run_dir / "jobs.jsonl").write_text(line + "\n")
    skipped = {"step": 0, "epoch": 0, "sample": 3, "shard": "s", "key": None, "reason": "r"}
    (run_dir / "skipped.jsonl").write_text(json.dumps({**skipped, "replaced_by": 4}) + "\n")
    return run_dir


def odd_record(data: bytes, random: random.Random) -> bytes:
    if random.random() < 0.6:
        return changed(data, random)
    try:
        tree = [json.loads(line) for line in data.splitlines()]
    except ValueError:
        return changed(data, random)
    holder, key = random.choice(leaves(tree))
    holder[key] = random.choice(ODD)
    return "".join(json.dumps(row) + "\n" for row in tree).encode()


def test_run_directories(changes, trained, tmp_path):
    draw, run_dir = random.Random(4), tmp_path / "runs" / "run"
    shutil.copytree(trained, run_dir)
    paths = [p for p in sorted(run_dir.rglob("*")) if p.is_file() and p.stat().st_size]
    config = configs.load_run(trained).model_copy(update={"run_dir": run_dir})
    for number in range(changes):
        path = draw.choice(paths)
        sound = path.read_bytes()
        path.write_bytes(odd_record(sound, draw))
        what = f"{number}: {path.relative_to(run_dir)} as {path.read_bytes()[:3000]!r}"
        assert one_sentence(lambda: table(tmp_path / "runs", ["loss"]), what)
        assert one_sentence(lambda: status(run_dir), what)
        one_sentence(lambda: newest(run_dir), what)
        if number % 5 == 0:
            one_sentence(lambda: export(run_dir, tmp_path / "out", "newest"), what)
        if number % 60 == 0:
            one_sentence(lambda: trainer.train(config), what)
        restore(trained, run_dir, path, sound)


def newest(run_dir: Path) -> None:
    found = checkpoint.run_newest(run_dir)
    found.weights()
    found.optimizer_state()


def restore(trained: Path, run_dir: Path, path: Path, sound: bytes) -> None:
    """A resume may have replaced a checkpoint that was damaged."""
    if path.parent.parent.name == "checkpoints":
        shutil.rmtree(run_dir / "checkpoints")
        shutil.copytree(trained / "checkpoints", run_dir / "checkpoints")
    path.write_bytes(sound)
