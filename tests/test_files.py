"""Files as people have them: whatever lies in a folder or a tar is read, or counted by its kind;
pixels are what the picture shows; classes keep their numbers and names."""

import io
import json
import os
import random
import re
import struct
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, command, environment, num_colours, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dist_contrastive.cli import main
from dist_contrastive.data import (
    Fields,
    ShardIndex,
    ShardStream,
    index_folder,
    load_index,
    merge_shards,
    pack_arrays,
    pack_images,
    pack_pairs,
)
from dist_contrastive.data.classes import join_classes
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.labels import refuse_other_classes, with_class_names
from dist_contrastive.data.packing.images import class_names
from dist_contrastive.data.packing.options import PackOptions
from dist_contrastive.data.pixels import as_float, fit_image
from dist_contrastive.data.shards.encoding import decode_field, image_traits
from dist_contrastive.data.shards.index_file import save_index
from dist_contrastive.data.shards.inspect import inspect_shards
from dist_contrastive.data.shards.locations import counted, find_shards, other_files
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.shards.verify import verify_shards
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.report import sample_sheet
from dist_contrastive.testing import run_ranks

SKIP = PackOptions(seed=None, skip_unreadable=True)
ENCODER = str(CONFIGS / "digits_encoder.yaml")


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def png_of(width: int, height: int, depth: int, colours: int, rows: bytes) -> bytes:
    """A PNG with this header, whatever Pillow can write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        data += struct.pack(">I", len(content)) + name + content + checksum
    return data


def noise(seed: int = 0, size: tuple[int, int] = (6, 4)) -> Image.Image:
    """RGB, width x height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes | str | None]], mode: str = "w") -> Path:
    """Members with content; a text is the target of a symbolic link, None a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                info.linkname = content or ""
                archive.addfile(info)
    return path


def samples_of(index: ShardIndex) -> list[dict]:
    return [index.read(number) for number in range(len(index))]


# ---------------------------------------------------------------------------- tars


def test_links_are_counted_and_no_such_shard_is_sound(tmp_path, capsys):
    source = write_tree(
        tmp_path / "source", {f"{n}.{e}": b"cat" for n in "01" for e in ("txt", "x")}
    )
    for name in ("txt", "x"):
        os.link(source / f"0.{name}", source / f"2.{name}")  # hard
        (source / f"3.{name}").symlink_to(f"1.{name}")
    (tmp_path / "data").mkdir()
    subprocess.run(
        ["tar", "--sort=name", "-cf", tmp_path / "data/0.tar", "-C", source, "."], check=True
    )
    assert main(["shards", "index", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert "2 samples" in said
    assert "left out: 4 links" in said
    assert "--hard-dereference" in said
    assert load_index(tmp_path / "data").left_out == {"links": 4}
    assert "left out by the index: 4 links" in inspect_shards(tmp_path / "data").text()
    found = verify_shards(tmp_path / "data", decode=True)
    assert ["4 links" in problem for problem in found.problems] == [True]
    assert main(["shards", "verify", str(tmp_path / "data")]) == 64
    again = ["tar", "--sort=name", "--hard-dereference", "--dereference"]
    subprocess.run([*again, "-cf", tmp_path / "data/0.tar", "-C", source, "."], check=True)
    index = index_folder(tmp_path / "data")
    assert [sample["txt"] for sample in samples_of(index)] == ["cat"] * 4
    assert not index.left_out
    assert not verify_shards(tmp_path / "data").problems


def test_companions_of_macos_and_hidden_members_are_no_samples(tmp_path):
    members: list[tuple[str, bytes | str | None]] = [
        ("photos", None),
        ("photos/._1.txt", b"\0\5\26\7"),
        ("photos/1.txt", b"one"),
        ("photos/.DS_Store", b"?"),
        ("__MACOSX/photos/._1.txt", b"?"),
        ("__MACOSX/photos/2.txt", b"?"),
        ("photos/.hidden.txt", b"?"),
        ("._2.txt", b"?"),
        ("photos/2.txt", b"two"),
        ("README", b"?"),
        ("__meta__/x.json", b"{}"),
        ("photos/3.tar.gz", b"a field named so"),
    ]
    write_tar(tmp_path / "a.tar", members)
    index = index_folder(tmp_path)
    assert [s["__key__"] for s in samples_of(index)] == ["photos/1", "photos/2", "photos/3"]
    assert index.fields == ("tar.gz", "txt")
    assert index.left_out == {
        "macOS companions": 5,
        "hidden files": 1,
        "files without extension": 1,
        "files of folders named __...__": 1,
    }
    assert any("5 macOS companions" in note for note in verify_shards(tmp_path).notes)


def test_what_is_left_out_is_known_of_shards_that_were_not_read_again(tmp_path, capsys):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("1.txt", b"x"), ("LICENSE", b"?")])
        os.utime(tmp_path / f"{name}.tar", (1, 1))
    index_folder(tmp_path)
    write_tar(tmp_path / "b.tar", [("1.txt", b"x"), ("LICENSE", b"?"), ("z", b"?")])
    assert main(["shards", "index", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "of which 1 were read" in said
    assert "left out: 3 files without extension" in said
    index = load_index(tmp_path)
    assert [dict(x) for x in index.shard_left_out] == [
        {"files without extension": 1},
        {"files without extension": 2},
    ]
    assert index.select([1]).left_out == {"files without extension": 2}


def test_indexes_of_before_open_and_are_made_anew(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.txt", b"x"), ("README", b"?")])
    index_folder(tmp_path)
    with np.load(tmp_path / "index.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    for name in ("shard_left_out", "classes"):
        del arrays[name]
    np.savez(tmp_path / "index.npz", **arrays)
    old = load_index(tmp_path)
    assert samples_of(old) == [{"__key__": "1", "txt": "x"}]
    assert not old.left_out
    assert len(old.select([0])) == 1
    assert index_folder(tmp_path).left_out == {"files without extension": 1}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("w:gz", "tar.gz"), ("w:gz", "tgz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")],
)
def test_compressed_tars(tmp_path, capsys, mode, suffix):
    write_tar(tmp_path / "alone" / f"1.{suffix}", [("1.txt", b"x")], mode)
    for location in ("alone", f"alone/1.{suffix}", f"alone/{{1..2}}.{suffix}", "alone/*"):
        with refused(DataError, suffix, "decompress"):
            find_shards(f"{tmp_path}/{location}")
    write_tar(tmp_path / "beside" / f"1.{suffix}", [("1.txt", b"x")], mode)
    write_tar(tmp_path / "beside" / "0.tar", [("0.txt", b"x")])
    for location in (tmp_path / "beside", f"{tmp_path}/beside/*"):
        assert main(["shards", "index", str(location)]) == 0
        assert f"left out: 1 compressed tars .{suffix}" in capsys.readouterr().out
    write_tar(tmp_path / "named" / "0.tar", [("0.txt", b"x")], mode)
    with refused(DataError, "compressed", "decompress"):
        index_folder(tmp_path / "named")
    (tmp_path / "file").touch()
    with refused(DataError, "is a file"):
        index_folder(tmp_path / "file")


def test_files_beside_shards_are_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.txt", b"x")])
    write_tree(
        tmp_path, {"README.md": b"", "x.TAR": b"", "._0.tar": b"", "LICENSE": b"", "d/1.tar": b""}
    )
    assert other_files(str(tmp_path)) == {
        "files .md": 1,
        "files .tar": 1,
        "macOS companions": 1,
        "files without extension": 1,
        "tars in folders below": 1,
    }
    merged = merge_shards([tmp_path], tmp_path.parent / f"{tmp_path.name}-merged")
    assert merged.not_packed == other_files(str(tmp_path))


def test_of_many_kinds_the_largest_are_counted():
    text = counted({f"files .{n:03d}": 1 + (n == 7) for n in range(100)})
    assert text.startswith("1 files .000, ")
    assert "2 files .007" in text
    assert text.endswith(" and 80 of 80 other kinds")


def test_a_shard_of_links_alone_says_so(tmp_path):
    write_tar(tmp_path / "0.tar", [("1.jpg", "/photos/1.jpg"), ("2.jpg", "1.jpg")])
    with refused(DataError, "0 samples", "2 links"):
        index_folder(tmp_path)


def test_names_that_are_no_utf8(tmp_path):
    """In a locale whose output is strict."""
    names = [b"caf\xe9", "寺".encode(), "😀".encode(), b"\xff\xfe"]
    os.makedirs(os.fsencode(tmp_path / "photos"))
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path / "photos"), name + b".png")
        Path(os.fsdecode(path)).write_bytes(encoded(noise(number)))
    strict = {**environment(), "PYTHONIOENCODING": "utf-8:strict"}
    (tmp_path / "tar").mkdir()
    subprocess.run(
        ["tar", "-cf", tmp_path / "tar/0.tar", "-C", tmp_path / "photos", "."], check=True
    )
    index_folder(tmp_path / "tar")
    assert main(["shards", "verify", str(tmp_path / "tar"), "--decode"]) == 0
    for argv in (
        ["shards", "inspect", "tar", "--sheet", "sheet.png"],
        ["shards", "pack", "images", "photos", "packed"],
    ):
        done = subprocess.run(
            command(*argv), cwd=tmp_path, env=strict, capture_output=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    index = load_index(tmp_path / "packed")
    assert {os.fsencode(s["__key__"]) for s in samples_of(index)} == set(names)


# ---------------------------------------------------------------------------- folders


def test_folders_of_photos(tmp_path, capsys):
    """Every file is a sample, a text, or counted; a class that holds none keeps its number."""
    files = {
        "ant/1.jpg": encoded(noise(), "JPEG"),
        "ant/1.txt": "\ufeffan ant".encode(),
        "ant/2.JPEG": encoded(noise(1), "JPEG"),
        "ant/2.JPEG.txt": b"another\n",
        "ant/3": encoded(noise(2), "WEBP"),
        "ant/3.caption": b"third",
        "ant/notes.txt": b"beside no image",
        "ant/4": b"no image",
        "bee/1.heic": b"\0\0\0\x18ftypheic",
        "bee/2.HEIF": b"?",
        "cat/1.avif": encoded(noise(3), "AVIF"),
        "cat/clip.mp4": b"?",
        "cat/Thumbs.db": b"?",
        "cat/.DS_Store": b"?",
        "cat/._1.avif": b"?",
        "__MACOSX/cat/._1.avif": b"?",
        ".git/objects/ab": b"?",
        "classes.csv": b"?",
    }
    source = write_tree(tmp_path / "photos", files)
    os.mkfifo(source / "cat" / "pipe.jpg")
    arguments = ["shards", "pack", "images", str(source), str(tmp_path / "data")]
    assert main([*arguments, "--no-shuffle"]) == 0
    said = capsys.readouterr()
    assert "classes without images: 1 bee" in said.err
    assert "classes: 0 ant, 1 bee, 2 cat" in said.out
    assert "data.image=[jpg, webp, avif] reads all" in said.out
    index = load_index(tmp_path / "data")
    assert [(s["__key__"], s["cls"], s.get("txt")) for s in samples_of(index)] == [
        ("ant/1", 0, "an ant"),
        ("ant/2", 0, "another\n"),
        ("ant/3", 0, "third"),
        ("cat/1", 2, None),
    ]
    assert index.classes == {0: "ant", 1: "bee", 2: "cat"}
    (line,) = [line for line in said.out.splitlines() if line.startswith("left out")]
    assert line == (
        "left out: 1 devices and pipes, 1 files .csv, 1 files .db, 1 files .heic, 1 files .heif, "
        "1 files .mp4, 1 files .txt, 1 files without extension, 1 hidden files, 3 macOS companions"
    )


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    source = write_tree(tmp_path / "photos", {"a/1.heic": b"?", "a/2.heic": b"?", "a/x.txt": b"?"})
    with refused(DataError, "0 images", "2 files .heic", "1 files .txt", "convert"):
        pack_images(source, tmp_path / "data")


def test_a_folder_that_is_given_for_a_table_is_sent_to_the_right_command(tmp_path):
    source = write_tree(tmp_path / "photos", {"1.jpg": encoded(noise(), "JPEG"), "1.txt": b"one"})
    with refused(DataError, "is a folder", "shards pack images"):
        pack_pairs(source, tmp_path / "data")


def test_texts_that_are_blank_are_none_and_formats_have_several_names(tmp_path):
    files = {
        **{"1.pbm": encoded(noise().convert("1"), "PPM"), "2.pnm": encoded(noise(), "PPM")},
        **{"3.jfif": encoded(noise(), "JPEG"), "4.jpe": encoded(noise(), "JPEG")},
        **{"1.txt": b"", "2.txt": b" \n", "3.caption": b"\xef\xbb\xbf", "4.txt": b"four"},
        **{"5.png": png_of(9000, 8000, 8, 0, b""), "5.txt": b"large"},
    }
    packed = pack_images(write_tree(tmp_path / "photos", files), tmp_path / "data", SKIP)
    assert packed.field_counts() == {"jpg": 2, "json": 4, "ppm": 2, "txt": 1}
    assert packed.not_packed == {"texts that are blank or of images that were left out": 4}
    assert ["9000 x 8000 pixels" in reason for reason in packed.left_out] == [True]
    for name, data in files.items():
        if not name.endswith((".txt", ".caption", ".png")):
            assert decode_field(name, data).shape[1:] == (4, 6)
    for problem, path in (("is a file", tmp_path / "photos" / "1.txt"), ("not exist", "none")):
        with refused(DataError, problem):
            pack_images(path, tmp_path / "no")


def test_marks_and_blanks_in_tars(tmp_path):
    members: list[tuple[str, bytes | str | None]] = [
        *[("0.txt", b"\xef\xbb\xbfcat"), ("0.cls", b" ")],
        *[("1.txt", b"dog\n"), ("1.cls", b"2\n")],
    ]
    write_tar(tmp_path / "0.tar", members)
    index = index_folder(tmp_path)
    assert [s["txt"] for s in samples_of(index)] == ["cat", "dog\n"]
    assert Fields("txt", "cls", num_classes=3).labels(index, range(2)).tolist() == [-1, 2]


def test_texts_that_are_no_utf8_are_unreadable_samples(tmp_path):
    files = {"1.png": encoded(noise()), "1.txt": "é".encode("latin-1"), "2.png": encoded(noise())}
    source = write_tree(tmp_path / "photos", {**files, "2.txt": b"two"})
    with refused(DataError, "1 of 2", "1.txt", "UTF-8", "--skip-unreadable"):
        pack_images(source, tmp_path / "data")
    packed = pack_images(source, tmp_path / "data", SKIP)
    assert len(packed.index) == len(packed.left_out) == 1
    assert packed.not_packed == {"texts that are blank or of images that were left out": 1}


def test_classes_keep_the_numbers_of_other_shards(tmp_path, capsys):
    names = ("ant", "bee", "cat")
    for split, held in (("train", names), ("test", ("ant", "cat"))):
        files = {f"{name}/{n}.png": encoded(noise(n)) for name in held for n in range(2)}
        write_tree(tmp_path / split, files)
    pack = ["shards", "pack", "images"]
    assert main([*pack, str(tmp_path / "train"), str(tmp_path / "a")]) == 0
    assert class_names(str(tmp_path / "a")) == list(names)
    assert main([*pack, str(tmp_path / "test"), str(tmp_path / "b")]) == 0
    apart = load_index(tmp_path / "a"), load_index(tmp_path / "b")
    for refuse in (
        lambda: refuse_other_classes("cls", apart),
        lambda: merge_shards([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", prefix_keys=True),
    ):
        with refused(DataError, "class 1 is 'bee'", "'cat'", "--classes-of"):
            refuse()
    refuse_other_classes("json.class", apart)
    refuse_other_classes("cls", apart[:1], names)
    with refused(DataError, "class 0 is 'bee' in data.classes, but 'ant'"):
        refuse_other_classes("json.label", apart[:1], ["bee", "ant"])
    same = ["--classes-of", str(tmp_path / "a")]
    assert main([*pack, str(tmp_path / "test"), str(tmp_path / "c"), *same]) == 0
    index = load_index(tmp_path / "c")
    assert {s["json"]["class"]: s["cls"] for s in samples_of(index)} == {"ant": 0, "cat": 2}
    assert index.classes == {0: "ant", 1: "bee", 2: "cat"}
    merged = merge_shards([tmp_path / "a", tmp_path / "c"], tmp_path / "ac", prefix_keys=True)
    assert merged.index.classes == index.classes
    (tmp_path / "test" / "dog").mkdir()
    (tmp_path / "test" / "dog" / "1.png").write_bytes(encoded(noise()))
    assert main([*pack, str(tmp_path / "test"), str(tmp_path / "d"), *same]) == 64
    assert "the folder dog is none of the 3 classes ant, bee, cat" in capsys.readouterr().err


# What may lie in a folder of images: the name of the n-th of a kind, and its content.
KINDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "images": ("{n}.jpg", lambda n: encoded(noise(n), "JPEG")),
    "images of another format": ("w{n}.webp", lambda n: encoded(noise(n), "WEBP")),
    "images without extension": ("none{n}", lambda n: encoded(noise(n))),
    "damaged images": ("bad{n}.png", lambda n: b"\x89PNG" + bytes(n)),
    "files .heic": ("h{n}.heic", lambda n: b"?"),
    "files .mp4": ("v{n}.MP4", lambda n: b"?"),
    "files .txt": ("alone{n}.txt", lambda n: b"?"),
    "files without extension": ("license{n}", lambda n: b"?"),
    "macOS companions": ("._{n}.jpg", lambda n: b"?"),
    "hidden files": (".h{n}.png", lambda n: b"?"),
    "compressed tars .tar.gz": ("t{n}.tar.gz", lambda n: b"?"),
}
COUNTS = st.fixed_dictionaries({kind: st.integers(0, 2) for kind in KINDS})


@settings(max_examples=25, deadline=None)
@given(
    counts=COUNTS, with_text=st.integers(0, 2), folders=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_every_file_of_a_folder_is_accounted_for(
    tmp_path_factory, counts, with_text, folders, seed
):
    root = tmp_path_factory.mktemp("folder")
    counts["images"] += 1
    rng, files = random.Random(seed), dict[str, bytes]()
    for kind, count in counts.items():
        for n in range(count):
            name = KINDS[kind][0].format(n=n)
            files[f"{rng.randrange(folders)}/{name}"] = KINDS[kind][1](n)
    captioned = [path for path in files if path.endswith((".jpg", ".png"))][:with_text]
    captioned = [path for path in captioned if "/." not in path]
    files |= {f"{path.rpartition('.')[0]}.txt": b"text" for path in captioned}
    packed = pack_images(write_tree(root / "source", files), root / "data", SKIP)
    taken = ("images", "images of another format", "images without extension")
    assert len(packed.index) == sum(counts[kind] for kind in taken)
    assert len(packed.left_out) == counts["damaged images"]
    texts = packed.field_counts().get("txt", 0)
    known = {
        kind: count for kind, count in packed.not_packed.items() if not kind.startswith("texts")
    }
    assert known == {k: n for k, n in counts.items() if n and k not in (*taken, "damaged images")}
    total = len(packed.index) + texts + len(packed.left_out) + sum(packed.not_packed.values())
    assert total == len(files)


MEMBERS: dict[str, tuple[str, bytes | str]] = {
    "fields": ("k{n}.txt", b"x"),
    "links": ("l{n}.txt", "k0.txt"),
    "macOS companions": ("d/._{n}.txt", b"?"),
    "hidden files": ("d/.{n}.txt", b"?"),
    "files without extension": ("d/n{n}", b"?"),
    "files of folders named __...__": ("__m__/{n}.txt", b"?"),
}


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(
        st.fixed_dictionaries({kind: st.integers(0, 3) for kind in MEMBERS}), min_size=1, max_size=3
    ),
    seed=st.integers(0, 99),
)
def test_every_member_of_tars_is_accounted_for(tmp_path_factory, shards, seed):
    folder, total = tmp_path_factory.mktemp("tars"), Counter[str]()
    for number, counts in enumerate(shards):
        members = [
            (f"{MEMBERS[kind][0].format(n=n)}", MEMBERS[kind][1])
            for kind, count in counts.items()
            for n in range(count + (kind == "fields"))
        ]
        random.Random(seed + number).shuffle(members)
        write_tar(folder / f"{number}.tar", [("d", None), *members])
        total.update(counts)
    index = index_folder(folder)
    total["fields"] += len(shards)
    assert len(index) == total.pop("fields")
    assert index.left_out == +total
    merged = merge_shards([folder], folder / "merged", prefix_keys=True)
    assert len(merged.index) == len(index)
    assert merged.not_packed == +total


# ---------------------------------------------------------------------------- several image fields


@pytest.fixture
def mixed(tmp_path) -> Path:
    """16 samples whose images are jpg, png, jpeg, webp in turn, and sample 3 has a png too."""
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
    samples = [
        {
            "__key__": f"{n:02d}",
            kinds[n % 4][0]: encoded(noise(n, (8, 8)), kinds[n % 4][1]),
            "cls": n % 2,
        }
        for n in range(16)
    ]
    samples[3]["png"] = encoded(Image.new("RGB", (8, 8), "red"))
    (tmp_path / "mixed").mkdir()
    write_samples(tmp_path / "mixed" / "0.tar", samples)
    index_folder(tmp_path / "mixed")
    return tmp_path / "mixed"


def test_a_list_of_fields_reads_what_a_sample_has(mixed):
    index = load_index(mixed)
    first = Fields(["webp", "jpg", "png", "jpeg"])
    for fields in (
        first,
        Fields("jpg;png;jpeg;webp"),
        Fields(image=("png", "jpg", "jpeg", "webp")),
    ):
        fields.check(index)
        images = fields.read(index, range(16)).images
        for number in (0, 1, 2):
            own = next(v for k, v in index.read(number).items() if k in ("jpg", "png", "jpeg"))
            assert torch.equal(images[number], own / 255)
        is_red = torch.equal(images[3], torch.eye(3)[0, :, None, None].expand(3, 8, 8))
        assert is_red == (fields is not first)  # the first of the list that it has
    with refused(
        DataError, "11 of 16 samples have no field 'png'", "data.image=[jpeg, jpg, png, webp]"
    ):
        Fields("png").check(index)
    with refused(DataError, "4 of 16 samples have no field", "data.image=["):
        Fields(["png", "jpg", "webp"]).check(index)
    with refused(DataError, "no field 'tif;bmp'"):
        Fields(["tif", "bmp"]).check(index)
    names = frozenset({"jpg;png;jpeg;webp"})
    stream = ShardStream(
        index, global_batch_size=4, lanes=2, epochs=1, only=names, num_workers=2, seed=0
    )
    batches = list(stream)
    assert sum(len(batch["__key__"]) for batch in batches) == 16
    assert all(batch["jpg;png;jpeg;webp"].shape == (4, 3, 8, 8) for batch in batches)
    assert not stream.take_skipped()


@pytest.mark.parametrize("value", ["jpg,png", "jpg|png", "", [], ["jpg", 3], ["jpg", ""], ["a,b"]])
def test_names_of_fields_that_are_none(value):
    with refused(ConfigError, "image=", "no names of fields", "[jpg, png, webp]"):
        DataConfig.checked({"train": "x", "global_batch_size": 2, "image": value})
    with refused(ConfigError, "classes=", "twice"):
        DataConfig.checked({"train": "x", "global_batch_size": 2, "classes": ["a", "b", "a"]})


def test_training_on_several_image_fields(mixed, overrides, tmp_path, capsys):
    options = overrides(tmp_path / "run", f"data.train={mixed}", "data.test=null", "train.steps=2")
    options += ["data.global_batch_size=8", "data.lanes=2", "data.label=cls", "data.num_classes=2"]
    options += ["data.image_size=8", "data.image_channels=3"]
    assert main(["train", ENCODER, *options, "data.image=[jpg, png, jpeg, webp]"]) == 0
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    assert main(["train", ENCODER, *options, f"run_dir={tmp_path}/other", "data.image=jpg"]) == 64
    assert "data.image=[jpeg, jpg, png, webp]" in capsys.readouterr().err


# ---------------------------------------------------------------------------- pixels


def transparent(mode: str) -> Image.Image:
    """Red or black (hidden) where it is transparent, blue or white where it is not."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    if mode == "LA":
        image = Image.new("LA", (2, 1), (0, 0))
        image.putpixel((1, 0), (255, 255))
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "kind", "more"),
    [
        (transparent("RGBA"), "PNG", {}),
        (transparent("RGBA"), "WEBP", {"lossless": True}),
        (transparent("RGBA"), "TIFF", {}),
        (transparent("RGBA"), "AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        (transparent("P"), "PNG", {}),
        (transparent("P"), "GIF", {}),
        (
            Image.fromarray(np.array([[[9, 9, 9], [0, 0, 255]]], np.uint8)),
            "PNG",
            {"transparency": (9, 9, 9)},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize(("name", "rgb"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_what_is_transparent_shows_the_background(image, kind, more, name, rgb):
    data = encoded(image, kind, **more)
    pixels = decode_field("png", data, name)
    assert pixels.shape == (3, 1, 2)
    assert (pixels[:, 0, 0].int() - torch.tensor(rgb)).abs().max() <= 2
    assert (pixels[:, 0, 1].int() - torch.tensor([0, 0, 255])).abs().max() <= 2
    assert [trait.split(",")[0] for trait in image_traits(data)] == ["transparent in places"]


def test_gray_images_with_alpha_stay_gray_before_a_gray_background():
    data = encoded(transparent("LA"))
    assert decode_field("png", data).tolist() == [[[255, 255]]]
    assert decode_field("png", data, "#404040").tolist() == [[[64, 255]]]
    assert decode_field("png", data, "blue").tolist() == [[[0, 255]], [[0, 255]], [[255, 255]]]
    key = encoded(Image.fromarray(np.array([[7, 8]], np.uint8)), transparency=7)
    assert decode_field("png", key, "black").tolist() == [[[0, 8]]]


def test_half_transparent_pixels_are_blended_and_opaque_ones_are_kept():
    half = Image.new("RGBA", (1, 1), (100, 0, 200, 128))
    assert (
        decode_field("png", encoded(half)).flatten() - torch.tensor([177, 127, 227])
    ).abs().max() <= 1
    opaque = noise().convert("RGBA")
    assert torch.equal(decode_field("png", encoded(opaque)), decode_field("png", encoded(noise())))
    gray = Image.new("LA", (3, 2), (9, 255))
    assert decode_field("png", encoded(gray)).shape == (1, 2, 3)


def test_the_background_is_a_setting(tmp_path, capsys):
    files = {f"{n}.png": encoded(transparent("RGBA")) for n in range(3)}
    source = write_tree(tmp_path / "photos", files | {"3.png": encoded(noise(0, (2, 1)))})
    pack = ["shards", "pack", "images", str(source), str(tmp_path / "data"), "--no-shuffle"]
    assert main(pack) == 0
    assert "3 images transparent in places, in front of data.background" in capsys.readouterr().out
    keys = {"train": str(tmp_path / "data"), "global_batch_size": 2, "test": str(tmp_path / "data")}
    for name, value in (("black", 0.0), ("white", 1.0), ("#ffffff", 1.0), (None, 1.0)):
        config = DataConfig.checked({**keys, **({"background": name} if name else {})})
        for (source,) in (config.open_train(), config.open_test()):
            assert config.fields().read(source, range(3)).images[..., 0].unique().tolist() in (
                [value],
                [0.0, value],
            )
    with refused(ConfigError, "background=shite", "no such colour"):
        DataConfig.checked({**keys, "background": "shite"})
    assert "transparent" in inspect_shards(tmp_path / "data").text()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_upright_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(orientation, (8, 5)), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        theirs = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
    ours = decode_field("jpg", data)
    assert ours.shape == ((3, 5, 8) if orientation < 5 else (3, 8, 5))
    assert ours.tolist() == theirs.tolist()
    if kind in ("JPEG", "PNG", "WEBP") and orientation > 1:
        assert image_traits(data) == ["turned upright as EXIF says"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_is_damaged_leaves_the_image():
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert torch.equal(decode_field("jpg", data), decode_field("jpg", encoded(noise(), "JPEG")))
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode_field("jpg", encoded(noise(), "JPEG", exif=exif)).shape == (3, 4, 6)


WIDE = np.array([[0, 4095, 65535], [1, 300, 40000]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_images_of_16_bits(kind):
    data = encoded(Image.fromarray(WIDE), kind)
    pixels = decode_field("png", data)
    assert pixels.dtype == torch.uint16
    assert pixels.tolist() == [WIDE.tolist()]
    assert image_traits(data) == ["of 16 bits, scaled by data.image_range"]
    big = io.BytesIO()
    Image.fromarray(WIDE.astype(">u2")).save(big, "TIFF")
    assert decode_field("tif", big.getvalue()).tolist() == [WIDE.tolist()]


def test_colours_of_16_bits_are_read_as_8_and_said():
    rows = (b"\0" + WIDE[:1].astype(">u2").tobytes() * 3) * 2
    png = png_of(WIDE.shape[1], 2, 16, 2, rows)
    assert image_traits(png) == ["of colours of 16 bits, read as 8"]
    assert decode_field("png", png).shape == (3, 2, WIDE.shape[1])


@pytest.mark.parametrize(
    "values",
    [np.array([[70_000]], np.int32), np.array([[-1]], np.int32), np.ones((1, 1), np.float32)],
)
def test_images_of_more_than_16_bits_are_refused_with_the_fix(values):
    with refused(ValueError, "more than 16 bits", "npy"):
        decode_field("tif", encoded(Image.fromarray(values), "TIFF"))


def test_16_bits_are_scaled_as_stated(tmp_path):
    """In whole numbers of 16 bits up to the end, beside images of 8 bits in one batch."""
    gray = (WIDE // 257).astype(np.uint8)
    samples = [
        {"__key__": "a", "png": encoded(Image.fromarray(WIDE)), "npy": WIDE.astype(np.int32)},
        {"__key__": "b", "png": encoded(Image.fromarray(gray)), "npy": WIDE.astype(np.int32)},
    ]
    write_samples(tmp_path / "0.tar", samples)
    index = index_folder(tmp_path)
    wide, narrow = torch.from_numpy(WIDE.astype(np.float64)), torch.from_numpy(gray) / 255
    for ends, scaled in ((None, wide / 65535), ((0, 4095), (wide / 4095).clamp(max=1))):
        images = Fields("png", image_range=ends).read(index, range(2)).images
        torch.testing.assert_close(images, torch.stack([scaled.float(), narrow])[:, None])
        fitted = Fields("png", image_size=2, image_range=ends).read(index, range(2)).images
        assert fitted.shape == (2, 1, 2, 2)
        stream = ShardStream(index, global_batch_size=2, lanes=1, epochs=1, num_workers=2, seed=0)
        (batch,) = list(stream)
        again = Fields("png", image_range=ends).samples(batch).images
        assert torch.equal(again[batch["__index__"].argsort()], images)
    arrays = Fields("npy").read(index, range(2)).images
    assert torch.equal(arrays, torch.stack([wide, wide]).float())
    scaled_arrays = Fields("npy", image_range=(300, 40_000)).read(index, [0]).images
    torch.testing.assert_close(scaled_arrays[0], ((wide - 300) / 39_700).clamp(0, 1).float())
    with refused(ConfigError, "image_range", "[BLACK, WHITE]"):
        DataConfig.checked({"train": "x", "global_batch_size": 2, "image_range": [5, 5]})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("axis", [0, 2])
def test_arrays_of_pixels_are_images_whatever_their_layout(tmp_path, dtype, axis):
    white = np.iinfo(dtype).max
    pixels = np.full((3, 10, 8), white, dtype)
    pixels[1] = 0
    stored = np.moveaxis(pixels, 0, axis)
    write_samples(tmp_path / "0.tar", [{"__key__": "0", "npy": stored, "txt": "x", "bin": b"?"}])
    index = index_folder(tmp_path)
    images = Fields("npy").read(index, [0]).images
    assert torch.equal(images[0, :, 0, 0], torch.tensor([1.0, 0.0, 1.0]))
    assert images.shape == (1, 3, 10, 8)
    fitted = Fields("npy", image_size=4, image_channels=1).read(index, [0]).images
    assert fitted.shape == (1, 1, 4, 4)
    for name, kind in (("txt", "str"), ("bin", "bytes")):
        with refused(DataError, f"sample 0 holds {kind} in {name!r}", "jpg"):
            Fields(name).read(index, [0])


def test_arrays_of_other_numbers_are_not_scaled_without_a_word(tmp_path, overrides, capsys):
    np.save(tmp_path / "last.npy", np.random.default_rng(0).random((32, 8, 9, 3)))
    np.save(tmp_path / "gray.npy", np.zeros((32, 8, 9), np.uint16))
    pack_arrays(tmp_path / "image", image=str(tmp_path / "last.npy"))
    pack_arrays(tmp_path / "gray", image=str(tmp_path / "gray.npy"))
    pack_arrays(tmp_path / "array", array=str(tmp_path / "last.npy"))
    shapes = {"image": (3, 8, 9), "gray": (1, 8, 9), "array": (8, 9, 3)}
    for name, shape in shapes.items():
        index = load_index(tmp_path / name)
        assert Fields("npy").read(index, [0]).images.shape[1:] == shape
    with refused(DataError, "[8, 9, 3]", "[3, 4, 4]", "data.image_size"):
        Fields("npy", image_size=4, image_channels=3).read(index, [0])
    options = overrides(tmp_path / "run", f"data.train={tmp_path}/array", "data.image=npy")
    options += ["data.label=null", "data.num_classes=null", "data.test=null"]
    options += ["data.global_batch_size=16"]
    assert main(["train", ENCODER, *options]) == 64
    assert "[H, W, C] (shape [8, 9, 3])" in capsys.readouterr().err


def test_16_bits_are_fitted_as_8_are():
    wide = (torch.rand(3, 20, 30) * 65535).to(torch.uint16)
    narrow = (wide.float() / 257).round().to(torch.uint8)
    for size, channels in ((8, None), (None, 1), (24, 1)):
        ours, theirs = fit_image(wide, size, channels), fit_image(narrow, size, channels)
        assert ours.dtype == torch.uint16
        assert ours.shape == theirs.shape
        assert (as_float(ours[None]) - as_float(theirs[None])).abs().max() < 0.01


def test_training_on_16_bits_and_on_integer_arrays(tmp_path, overrides, capsys):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4096, (32, 1, 8, 8))
    samples = [
        {"__key__": f"{n:02d}", "png": encoded(Image.fromarray(x[0].astype(np.uint16))), "npy": x}
        for n, x in enumerate(values)
    ]
    (tmp_path / "data").mkdir()
    write_samples(tmp_path / "data" / "0.tar", samples)
    index_folder(tmp_path / "data")
    options = overrides(tmp_path / "run", f"data.train={tmp_path}/data", "data.test=null")
    options += ["data.global_batch_size=16", "data.lanes=2", "train.steps=2", "data.label=null"]
    options += ["data.num_classes=null", "data.num_workers=1", "train.micro_batch_size=16"]
    for field in ("png", "npy"):
        run = [f"run_dir={tmp_path}/{field}", f"data.image={field}"]
        assert main(["train", ENCODER, *options, *run, "data.image_range=[0, 4095]"]) == 0
    assert main(["train", ENCODER, *options, f"run_dir={tmp_path}/x", "data.image=npy"]) == 64
    assert "data.image_range=[LOW, HIGH]" in capsys.readouterr().err


# ---------------------------------------------------------------------------- names of classes


@pytest.fixture
def animals(tmp_path) -> Path:
    """Folders of three classes, of 6 pictures each, packed."""
    files = {
        f"{name}/{n}.png": encoded(noise(n, (8, 8)).convert("L"))
        for name in ("ant", "bee", "cat_$5")
        for n in range(6)
    }
    pack_images(write_tree(tmp_path / "photos", files), tmp_path / "animals")
    return tmp_path / "animals"


def test_names_of_classes_are_stored_and_shown(animals, tmp_path, capsys):
    names = {0: "ant", 1: "bee", 2: "cat_$5"}
    for index in (load_index(animals), index_folder(animals, full=True)):
        assert index.classes == names
    assert load_index(animals).select([0]).classes == names
    assert main(["shards", "inspect", str(animals), "--sheet", str(tmp_path / "s.png")]) == 0
    assert "0 ant: 6   1 bee: 6   2 cat_$5: 6" in capsys.readouterr().out
    write_samples(animals / "x.tar", [{"__key__": "x", "json": {"label": 1, "class": "dog"}}])
    assert index_folder(animals).classes == {}  # of which names to trust none


def test_the_sheet_shows_names_of_classes(animals, tmp_path):
    index = load_index(animals)
    sample_sheet(index, tmp_path / "named.png")
    nameless = [{k: v for k, v in s.items() if k != "json"} for s in samples_of(index)]
    (tmp_path / "nameless").mkdir()
    write_samples(tmp_path / "nameless" / "0.tar", nameless)
    sample_sheet(index_folder(tmp_path / "nameless"), tmp_path / "nameless.png")
    ink = [
        (np.asarray(Image.open(tmp_path / f"{n}.png")) != 255).sum() for n in ("named", "nameless")
    ]
    assert ink[0] > ink[1]
    assert num_colours(tmp_path / "named.png") > 2


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, "ant"), (0, "bee")],
        [(0, "ant"), (1, "ant")],
        [(n, str(n)) for n in range(100_001)],
    ],
)
def test_names_that_contradict_each_other_are_none(pairs):
    assert join_classes(pairs) == {}
    assert join_classes(pairs[:1]) == dict(pairs[:1])


def labelled(folder: Path, labels: list, field: str = "json") -> ShardIndex:
    folder.mkdir(exist_ok=True)
    picture = np.zeros((1, 2, 2), np.uint8)
    values = [{"kind": x} if field == "json" else x for x in labels]
    samples = [{"__key__": f"{n:03d}", "png": picture, field: x} for n, x in enumerate(values)]
    for start in range(0, len(samples), 4):
        write_samples(folder / f"{start:03d}.tar", samples[start : start + 4])
    return index_folder(folder)


@pytest.mark.parametrize(("field", "path"), [("cls", "cls"), ("txt", "txt"), ("json", "json.kind")])
def test_labels_that_are_texts(tmp_path, field, path):
    index = labelled(tmp_path / "data", ["cat", "ant", "寺", "ant", "x 1", "cat"], field)
    fields = with_class_names(Fields("png", path, num_classes=4), index)
    assert fields.labels(index, range(6)).tolist() == [1, 0, 3, 0, 2, 1]
    assert fields.read(index, range(6)).labels.tolist() == [1, 0, 3, 0, 2, 1]
    assert fields.class_names(index) == {0: "ant", 1: "cat", 2: "x 1", 3: "寺"}
    with refused(DataError, "num_classes=2", "4 classes: 0 ant, 1 cat", "data.num_classes=4"):
        with_class_names(Fields("png", path, num_classes=2), index)
    chosen = Fields("png", path, num_classes=4, classes=("cat", "ant", "x 1", "寺"))
    assert with_class_names(chosen, index).labels(index, [0, 4]).tolist() == [0, 2]
    with refused(DataError, "'ant'", "none of the 1 classes", "data.classes"):
        Fields("png", path, num_classes=4, classes=("cat",)).labels(index, range(6))


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    index = labelled(tmp_path, ["001", "1", "01", "NA", "null"])
    fields = with_class_names(Fields("png", "json.kind", num_classes=5), index)
    assert fields.classes == ("001", "01", "1", "NA", "null")
    assert fields.labels(index, range(5)).tolist() == [0, 2, 1, 3, 4]


def test_missing_labels_and_mixtures(tmp_path):
    index = labelled(tmp_path / "a", [None, "", "b", "a"])
    fields = with_class_names(Fields("png", "json.kind", num_classes=2), index)
    assert fields.labels(index, range(4)).tolist() == [-1, -1, 1, 0]
    with refused(DataError, "001", "label 3", "others have texts"):
        with_class_names(
            Fields("png", "json.kind", num_classes=2), labelled(tmp_path / "b", ["a", 3])
        )
    numbers = labelled(tmp_path / "c", [3, "a"])
    fields = with_class_names(Fields("png", "json.kind", num_classes=5), numbers)
    with refused(DataError, "'a'", "or all texts"):
        fields.labels(numbers, range(2))
    continuous = Fields("png", "json.kind")
    with refused(DataError, "'b'", "data.num_classes"):
        continuous.labels(index, range(4))


def _names_on_rank(folder: Path) -> tuple[str, ...] | None:
    return with_class_names(Fields("png", "json.kind", num_classes=9), load_index(folder)).classes


def test_ranks_collect_the_names_together(tmp_path):
    labelled(tmp_path / "data", ["f", "e", "d", "c", "b", "a", "a"])
    assert run_ranks(_names_on_rank, 3, tmp_path / "data") == [tuple("abcdef")] * 3


def test_training_and_eval_by_names(animals, overrides, tmp_path, capsys):
    """Numbers stored with the names, held-out shards that lack a class included."""
    files = {
        f"{name}/{n}.png": encoded(noise(n, (8, 8)).convert("L"))
        for name, n in (("ant", 6), ("ant", 7), ("cat_$5", 8), ("cat_$5", 9))
    }
    pack_images(write_tree(tmp_path / "held", files), tmp_path / "test")
    options = overrides(tmp_path / "run", f"data.train={animals}", f"data.test={tmp_path}/test")
    options += ["data.global_batch_size=8", "data.lanes=2", "train.steps=2", "data.num_classes=3"]
    config = str(CONFIGS / "digits_encoder.yaml")
    assert main(["train", config, *options, "data.label=cls"]) == 64
    assert "class 1 is 'bee'" in capsys.readouterr().err
    assert main(["train", config, *options, "data.label=json.class"]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert num_colours(tmp_path / "run" / "plots" / "embedding.png") > 2


def test_arrays_with_labels_that_are_texts(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 2, 2), np.uint8))
    for kind in ("U", "S"):
        np.save(tmp_path / "y.npy", np.array(["dog", "cat", "dog", "ant"], kind))
        packed = pack_arrays(
            tmp_path / kind,
            PackOptions(seed=None),
            image=f"{tmp_path}/x.npy",
            label=f"{tmp_path}/y.npy",
        )
        assert [s["cls"] for s in samples_of(packed.index)] == [2, 1, 2, 0]
        assert packed.index.classes == {0: "ant", 1: "cat", 2: "dog"}
    assert json.loads(packed.index.read_contents(0)["json"]) == {
        "class": "dog",
        "index": 0,
        "label": 2,
    }


def test_index_files_with_damaged_names_are_refused(tmp_path):
    index = labelled(tmp_path / "data", ["a", "b"])
    with np.load(tmp_path / "data" / "index.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    for value in ("{", "7", '[["x", "y"]]', "[1]"):
        np.savez(tmp_path / "data" / "index.npz", **{**arrays, "classes": np.array(value)})
        with refused(DataError, "cannot be read", "shards index"):
            load_index(tmp_path / "data")
    save_index(index, tmp_path / "data" / "index.npz")
    assert re.fullmatch(r"[0-9a-f]{64}", load_index(tmp_path / "data").fingerprint)
