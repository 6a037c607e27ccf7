"""`shards verify`, `index` and `inspect`: damage of every kind is found and named, all of it, and
nothing else; only changed shards are indexed again; what is told of shards is so."""

import io
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import pixels_of, refused
from PIL import Image

from dist_contrastive import report
from dist_contrastive.cli import main
from dist_contrastive.data import index_folder, load_index
from dist_contrastive.data.shards import indexing, remote
from dist_contrastive.data.shards.index_file import save_index
from dist_contrastive.data.shards.inspect import inspect_shards, spread
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.shards.verify import verify_shards
from dist_contrastive.errors import DataError, UnreachableError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from range_server import RangeServer


def numbered(start: int, count: int, **more: object) -> list[dict]:
    numbers = range(start, start + count)
    return [{"__key__": f"s{n:03d}", "cls": n, "txt": f"sample {n}", **more} for n in numbers]


def age(folder: Path) -> None:
    """Let all tars be older than any index."""
    for path in folder.glob("*.tar"):
        os.utime(path, (1, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three indexed shards of 4, 4 and 3 samples, two of one size."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, start, count in (("a", 0, 4), ("b", 4, 4), ("c", 8, 3)):
        write_samples(folder / f"{name}.tar", numbered(start, count))
    age(folder)
    index_folder(folder)
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Serves the folder; blocks are kept apart from those of other tests, and patience is short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    monkeypatch.setattr(remote, "retries", remote.Retries(2, 0.01, 0.01, 5.0))
    with RangeServer(folder) as server:
        yield server


def problems(location: Path | str, decode: bool = False) -> list[str]:
    return list(verify_shards(location, decode).problems)


def the_problem(location: Path | str, decode: bool = False) -> str:
    (found,) = problems(location, decode)
    return found


def assert_sentences(found: Sequence[str], *words: Sequence[str]) -> None:
    """One sentence for each list of words, which holds them, in this order."""
    assert len(found) == len(words), found
    for sentence, parts in zip(found, words, strict=True):
        assert all(part in sentence for part in parts), (sentence, parts)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def photo(width: int, height: int, image_format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(stream, format=image_format)
    return stream.getvalue()


# ---------------------------------------------------------------------------- sound data


def test_sound_data_have_no_problems(folder: Path, digits: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    for location in (folder, folder / "index.npz", f"{folder}/{{a,b,c}}.tar", ".", "*.tar"):
        found = verify_shards(location, decode=True)
        assert (found.problems, found.notes) == ((), ())
        assert (found.shards, found.samples, len(found.index_files)) == (3, 11, 1)
    assert verify_shards(f"{folder}/[ab].tar").shards == 2
    assert verify_shards(digits / "train", decode=True).problems == ()


def test_without_an_index_less_is_compared_and_that_is_assert_sentences(folder: Path):
    (folder / "index.npz").unlink()
    found = verify_shards(folder)
    assert (found.problems, found.index_files, found.samples) == ((), (), 11)
    (note,) = found.notes
    assert note.startswith(f"{folder} has no index.npz: sizes, checksums and which tars there are")
    path = folder / "a.tar"
    path.write_bytes(path.read_bytes()[:3000])
    assert "truncated" in the_problem(folder)


def test_what_is_not_there_is_refused(tmp_path: Path, folder: Path):
    for location, words in (
        (tmp_path / "nowhere", ["nowhere does not exist"]),
        (folder / "no.npz", ["no.npz does not exist"]),
        (tmp_path / "index.npz", ["index.npz does not exist"]),
        (f"{folder}/x-{{0..3}}.tar", ["x-0.tar", "does not exist", "4 of 4"]),
        (f"{folder}/{{a.tar", ["close its braces"]),
        (tmp_path, ["0 files"]),
    ):
        with refused(DataError, *words):
            verify_shards(location)


def test_shards_without_samples(tmp_path: Path, folder: Path):
    write_samples(folder / "b.tar", [])
    age(folder)
    index_folder(folder)
    found = verify_shards(folder)
    assert found.problems == ()
    assert found.notes == (f"shard {folder}/b.tar holds no samples",)
    write_samples(tmp_path / "empty.tar", [])
    assert "1 shards of" in (message := the_problem(tmp_path))
    assert "hold 0 samples; write tars whose members are named KEY.EXTENSION" in message


# ---------------------------------------------------------------------------- broken tars


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_cut_anywhere(folder: Path, indexed: bool):
    path = folder / "a.tar"
    whole = path.read_bytes()
    samples = load_index(folder).select([0])
    end = 4 * 2 * 1024  # four samples of two fields, each a header and a block
    assert not any(whole[end:])
    if not indexed:
        (folder / "index.npz").unlink()
    for size in [*range(0, len(whole), 512), 100, 600, 1000, end - 1, end + 511]:
        path.write_bytes(whole[:size])
        found = problems(folder)
        if size >= end + 512:  # an end mark is there, and nothing is lost
            assert len(found) == indexed
            assert all("all of its 4 indexed samples can be read" in x for x in found)
        else:
            assert f"a.tar ({size} bytes) is truncated" in found[0] or (
                f"a.tar is truncated: its {size} bytes lack the end mark" in found[0]
            )
        if indexed:
            assert f"it has {size} bytes" in found[-1]
            assert (
                f"indexed were {len(whole)} bytes with sha256 {samples.shard_sha256[0]}"
                in (found[-1])
            )
        if indexed and size < end:
            # The last bytes of a sample's block are padding.
            stops = samples.sample_offset + samples.member_start[:, 1] + 512
            lost = int((stops + samples.member_size[:, 1] > size).sum())
            words = f"{lost} of its 4 indexed samples cannot be read by the index"
            assert (words if lost else "all of its 4") in found[-1]
            assert not lost or f"the first is number {4 - lost};" in found[-1]


def test_whatever_follows_the_end_is_found(folder: Path):
    path, other = folder / "a.tar", folder / "b.tar"
    whole = path.read_bytes()
    (folder / "index.npz").unlink()
    for tail, size in ((b"x", 1), (bytes(2_000_000) + b"rest" + bytes(9), 13)):
        path.write_bytes(whole + tail)
        at = len(whole) + len(tail) - size
        assert f"ends at byte 8192, but {size} bytes follow from byte {at} on" in the_problem(
            folder
        )
    path.write_bytes(whole + other.read_bytes())  # as `cat` joins them
    message = the_problem(f"{path}")
    assert f"{len(whole)} bytes follow from byte {len(whole)} on, which nobody reads" in message
    assert verify_shards(str(path)).samples == 0
    path.write_bytes(whole + bytes(512))
    assert problems(folder) == []


def test_tars_that_are_none(folder: Path):
    (folder / "a.tar").write_bytes(b"not a tar" * 1000)
    (folder / "b.tar").unlink()
    (folder / "b.tar").mkdir()
    with tarfile.open(folder / "c.tar", "w:gz") as archive:
        archive.add(folder / "index.npz")
    first, _, second, third, _ = problems(folder)
    assert "a.tar (9000 bytes) is truncated or not a plain tar" in first
    assert "b.tar cannot be read (Is a directory)" in second
    assert "c.tar" in third
    assert "is compressed by gzip; decompress it" in third


def test_every_changed_byte_is_found(folder: Path):
    path, part = folder / "a.tar", load_index(folder).select([0])
    whole = path.read_bytes()
    start = part.sample_offset[:, None] + part.member_start
    stop = start + part.member_header + part.member_size
    for place in [*range(0, len(whole), 97), 8191, 8192, len(whole) - 1]:
        path.write_bytes(whole)
        flip(path, place)
        found = [message for message in problems(folder) if "is not as it was indexed" in message]
        lost = np.flatnonzero(((start <= place) & (place < stop)).any(axis=1))
        assert len(found) == 1
        assert (
            f"{len(lost)} of its 4 indexed samples cannot be read by the index, the first is "
            f"number {lost[0]};"
            if len(lost)
            else "all of its 4 indexed samples can be read by the index"
        ) in found[0]
    path.write_bytes(whole)
    assert problems(folder) == []


# ---------------------------------------------------------------------------- against the index


def test_tars_that_are_missing_or_new(folder: Path):
    shutil.copy(folder / "c.tar", folder / "d.tar")
    write_samples(folder / "e.tar", numbered(50, 2))
    (folder / "a.tar").unlink()
    found = problems(folder)
    command = f"run `dist-contrastive shards index {folder}`"
    assert_sentences(found[:2], [f"{folder}/d.tar", command], [f"{folder}/e.tar", command])
    assert_sentences(found[2:], [f"{folder}/a.tar", "No such file"])
    assert [x for x in problems(f"{folder}/{{a..e}}.tar") if x != found[2]] == found[:2]
    assert_sentences(problems(f"{folder}/{{b,c,zz}}.tar"), [f"{folder}/zz.tar", "No such file"])
    index_folder(folder)
    assert problems(folder) == []
    for path in folder.glob("*.tar"):
        path.unlink()
    assert len(problems(folder)) == 4


def test_a_shard_swapped_for_another_of_its_size(folder: Path):
    shutil.copy(folder / "b.tar", folder / "a.tar")
    os.utime(folder / "a.tar", (1, 1))
    load_index(folder)  # which looks at sizes and times
    found = verify_shards(folder)
    (message,) = found.problems
    assert f"shard {folder}/a.tar is not as it was indexed: it has 10240 bytes with" in message
    assert (
        "4 of its 4 indexed samples cannot be read by the index, the first is number 0" in message
    )
    assert found.notes == (
        f"shards {folder}/a.tar and {folder}/b.tar both hold the key 's004' and 3 more keys",
    )


def test_an_index_that_is_wrong(folder: Path):
    index = load_index(folder)
    for name in ("sample_offset", "member_start", "member_header", "member_size", "member_crc32"):
        table = getattr(index, name).copy()
        table[5] += 1
        save_index(replace(index, **{name: table}), folder / "index.npz")
        message = the_problem(folder)
        assert f"the index tells other samples of shard {folder}/b.tar than its tar" in message
        assert f"shards index {folder} --full`" in message
    save_index(replace(index, fields=("cls", "text")), folder / "index.npz")
    assert len(problems(folder)) == 3
    whole = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(whole[:-100])
    found = verify_shards(folder)
    assert "index.npz cannot be read" in found.problems[0]
    assert (len(found.problems), found.samples) == (1, 11)


def test_an_index_elsewhere(folder: Path, tmp_path: Path):
    out = tmp_path / "some.npz"
    index_folder(f"{folder}/{{a,c}}.tar", out)
    found = verify_shards(out)
    assert (found.problems, found.shards, found.index_files) == ((), 2, (str(out),))
    (folder / "c.tar").unlink()
    assert "c.tar cannot be read" in the_problem(out)


def test_fields_of_other_shards_are_no_difference(folder: Path):
    write_samples(folder / "c.tar", numbered(8, 3, bin=b"1"))
    index_folder(folder)
    (message,) = problems(folder)
    assert "c.tar has other fields than the rest" in message


# ---------------------------------------------------------------------------- samples


def test_keys_held_twice_by_a_shard(folder: Path):
    write_samples(folder / "c.tar", [*numbered(8, 3), *numbered(9, 2), *numbered(8, 1)])
    (folder / "index.npz").unlink()
    message = the_problem(folder)
    assert (
        "c.tar holds the key 's009' twice, at byte 2048 and again at byte 6144 (3 samp" in message
    )
    with refused(DataError, "'s009' twice", "byte 6144"):
        index_folder(folder)
    write_samples(folder / "c.tar", [*numbered(8, 1), *numbered(8, 1)])
    assert "gives the field 'cls' of sample 's008' twice" in the_problem(folder)


def test_keys_held_by_several_shards_are_noted(folder: Path):
    write_samples(folder / "c.tar", [*numbered(8, 1), *numbered(1, 5), *numbered(20, 1)])
    write_samples(folder / "d.tar", numbered(4, 1))
    index_folder(folder)
    found = verify_shards(folder)
    assert found.problems == ()
    assert found.notes == tuple(
        f"shards {folder}/{one}.tar and {folder}/{two}.tar both hold the key {keys}"
        for one, two, keys in (
            ("a", "c", "'s001' and 2 more keys"),
            ("b", "c", "'s004' and 1 more keys"),
            ("c", "d", "'s004'"),
        )
    )


def test_long_keys_are_told_as_they_are(tmp_path: Path):
    long = "deep/" * 40 + "ä.b"
    for name in "xy":
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for key in (f"{name}1", long):
                member = tarfile.TarInfo(f"{key}.txt")
                member.size = 1
                archive.addfile(member, io.BytesIO(b"1"))
    (note,) = [note for note in verify_shards(tmp_path).notes if "both" in note]
    assert note.endswith(f"both hold the key {long.removesuffix('.b')!r}")


def test_fields_that_samples_or_shards_lack(folder: Path):
    samples = numbered(8, 4, bin=b"1")
    del samples[1]["txt"], samples[2]["txt"], samples[3]["bin"]
    write_samples(folder / "c.tar", samples)
    write_samples(folder / "d.tar", [{"__key__": "d", "npy": np.zeros(2), "cls": 1}])
    index_folder(folder)
    assert_sentences(
        problems(folder),
        ["1 of 4 samples", f"{folder}/c.tar", "'bin'", "'s011'"],
        ["2 of 4 samples", f"{folder}/c.tar", "'txt'", "'s009'"],
        [f"{folder}/c.tar", "have 'bin' besides", "2 of 4 shards"],
        [f"{folder}/d.tar", "lack 'txt' and have 'npy' besides", "2 of 4 shards"],
    )


def test_fields_that_cannot_be_decoded(tmp_path: Path):
    good = photo(40, 30)
    samples = [{"__key__": f"k{n}", "jpg": good, "cls": n} for n in range(4)]
    samples[1]["jpg"], samples[3]["jpg"], samples[3]["cls"] = good[:200], b"GIF89a", b"\xff"
    write_samples(tmp_path / "a.tar", samples)
    index_folder(tmp_path)
    assert problems(tmp_path) == []
    found = problems(tmp_path, decode=True)
    assert_sentences(
        sorted(found),
        ["'cls' of sample 'k3'", f"{tmp_path}/a.tar", "invalid"],
        ["'jpg' of sample 'k1'", f"{tmp_path}/a.tar", "OSError"],
        ["'jpg' of sample 'k3'", f"{tmp_path}/a.tar", "UnidentifiedImage"],
    )
    write_samples(tmp_path / "a.tar", [{**x, "jpg": b"?"} for x in numbered(0, 30)])
    index_folder(tmp_path)
    found = problems(tmp_path, decode=True)
    assert len(found) == 21
    assert_sentences(found[-1:], ["10 more fields", f"{tmp_path}/a.tar"])


def test_all_problems_are_listed_together(folder: Path, capsys: pytest.CaptureFixture[str]):
    write_samples(folder / "d.tar", [*numbered(20, 2, png=b"?"), *numbered(20, 1, png=b"?")])
    write_samples(folder / "e.tar", numbered(30, 2))
    flip(folder / "a.tar", 1024 + 512)  # content
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[: 3 * 1024])
    with (folder / "c.tar").open("ab") as file:
        file.write(b"rest")
    expected = [
        "d.tar is not in the index",
        "e.tar is not in the index",
        "a.tar is not as it was indexed",
        "b.tar is truncated",
        "b.tar is not as it was indexed: it has 3072 bytes",
        "c.tar ends at byte 6144, but 4 bytes follow",
        "c.tar is not as it was indexed: it has 10244 bytes",
        "d.tar holds the key 's020' twice",
        *3 * ["field 'png' of sample 's02"],
        "d.tar has other fields than the rest",
    ]
    assert main(["shards", "verify", str(folder), "--decode"]) == 64
    out, err = capsys.readouterr()
    assert_sentences(err.splitlines(), *([words] for words in expected))
    assert out == (
        f"{folder}: 9 samples in 5 shards read, every field decoded, compared with "
        f"{folder}/index.npz: 12 problems\n"
    )


# ---------------------------------------------------------------------------- remote


def test_remote_shards(folder: Path, server: RangeServer):
    for location in (server.url, f"{server.url}/", f"{server.url}/{{a,b,c}}.tar"):
        found = verify_shards(location, decode=True)
        assert (found.problems, found.notes, found.samples) == ((), (), 11)
    flip(folder / "b.tar", 512)  # content
    (folder / "c.tar").write_bytes((folder / "c.tar").read_bytes()[:1024])
    (folder / "a.tar").unlink()
    a, b, c, changed = problems(server.url)
    assert f"{server.url}/a.tar is not there or may not be read" in a
    assert f"shard {server.url}/b.tar is not as it was indexed" in b
    assert "1 of its 4 indexed samples cannot be read by the index" in b
    assert f"shard {server.url}/c.tar is truncated: its 1024 bytes lack" in c
    assert "it has 1024 bytes, indexed were 10240" in changed
    assert "3 of its 3 indexed" in changed


def test_what_the_server_holds_is_verified_not_what_a_cache_kept(folder: Path, server: RangeServer):
    index = load_index(server.url)
    assert index.read(0)["cls"] == 0
    shutil.copy(folder / "b.tar", folder / "a.tar")
    assert index.read(0)["cls"] == 0  # kept
    assert "a.tar is not as it was indexed" in the_problem(server.url)
    assert not list(Path(os.environ["TMPDIR"]).iterdir())


@pytest.fixture(autouse=True)
def _temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_a_server_that_lists_nothing(server: RangeServer):
    server.fault = lambda path, _: "404" if path in ("", "/") else None
    found = verify_shards(server.url)
    assert (found.problems, found.samples) == ((), 11)
    assert "lists no tars" in found.notes[0]
    server.fault = lambda path, _: "404" if path in ("", "/", "/index.npz") else None
    with pytest.raises(DataError, match=r"not there|0 files"):
        verify_shards(server.url)
    found = verify_shards(f"{server.url}/{{a,b,c}}.tar")
    assert (found.problems, found.samples) == ((), 11)
    assert "has no index.npz" in found.notes[0]


def test_a_server_that_does_not_answer(
    folder: Path, server: RangeServer, capsys: pytest.CaptureFixture[str]
):
    server.fault = lambda path, count: "503" if path == "/b.tar" and count else None
    with refused(UnreachableError, "b.tar", "2 attempts"):
        verify_shards(server.url)
    server.requests.clear()
    assert main(["shards", "verify", server.url]) == 75
    assert "b.tar could not be read in 2 attempts" in capsys.readouterr().err
    server.fault = lambda path, _: "503" if path == "/" else None
    with refused(UnreachableError, "2 attempts"):
        verify_shards(server.url)
    flip(folder / "b.tar", 512)  # a sample that does not fit is asked for again
    server.requests.clear()
    server.fault = lambda path, count: "503" if path == "/b.tar" and count > 2 else None
    with refused(UnreachableError, "b.tar", "2 attempts"):
        verify_shards(f"{server.url}/b.tar")


# ---------------------------------------------------------------------------- index


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars that were read whole, as they are."""
    found: list[str] = []
    index_shard = indexing.index_shard

    def counted(shard: str, *args, **kwargs):
        found.append(shard.rpartition("/")[2])
        return index_shard(shard, *args, **kwargs)

    monkeypatch.setattr(indexing, "index_shard", counted)
    return found


def test_only_changed_shards_are_indexed_again(
    folder: Path, read: list[str], capsys: pytest.CaptureFixture[str]
):
    def index(*options: str) -> list[str]:
        read.clear()
        assert main(["shards", "index", str(folder), *options]) == 0
        out, err = capsys.readouterr()
        samples, shards = len(load_index(folder)), len(list(folder.glob("*.tar")))
        assert out == (
            f"{folder}: {samples} samples in {shards} shards, of which {len(read)} were read\n"
        )
        assert err == ""  # no bar where there is no terminal
        assert problems(folder) == []
        return sorted(read)

    assert index() == []
    write_samples(folder / "b.tar", numbered(40, 4))  # of the same size, and newer
    assert index() == ["b.tar"]
    assert load_index(folder).read(4)["cls"] == 40
    write_samples(folder / "c.tar", numbered(8, 9))  # of another size, and older
    age(folder)
    assert index() == ["c.tar"]
    write_samples(folder / "b.tar", numbered(44, 4))  # of the same size, and older
    age(folder)
    assert index() == ["b.tar"]
    write_samples(folder / "d.tar", numbered(60, 1))
    age(folder)
    assert index() == ["d.tar"]
    (folder / "a.tar").unlink()
    assert index() == []
    assert index("--full") == ["b.tar", "c.tar", "d.tar"]
    (folder / "index.npz").write_bytes(b"?")
    assert index() == ["b.tar", "c.tar", "d.tar"]


def test_index_of_a_pattern(folder: Path, tmp_path: Path, read: list[str], capsys):
    pattern, out = f"{folder}/{{c,a}}.tar", tmp_path / "some.npz"
    assert main(["shards", "index", pattern]) == 64
    assert "say where to write it: --out FILE.npz" in capsys.readouterr().err
    assert main(["shards", "index", pattern, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{pattern}: 7 samples in 2 shards, of which 2 were read\n"
    index = load_index(out)
    assert [index.read(n)["cls"] for n in range(7)] == [8, 9, 10, 0, 1, 2, 3]
    assert main(["shards", "index", f"{folder}/*.tar", "--out", str(out)]) == 0
    assert sorted(read) == ["a.tar", "b.tar", "c.tar"]
    assert len(load_index(out)) == 11


def test_index_of_a_server_is_of_what_it_holds_now(folder: Path, server: RangeServer, tmp_path):
    out = str(tmp_path / "remote.npz")
    assert main(["shards", "index", server.url]) == 64  # nowhere to write
    assert main(["shards", "index", server.url, "--out", out]) == 0
    index = load_index(out)
    assert [index.read(n)["cls"] for n in range(11)] == list(range(11))  # fills the cache
    shutil.copy(folder / "b.tar", folder / "a.tar")
    assert main(["shards", "index", server.url, "--out", out, "--full"]) == 0
    assert problems(out) == []


def test_index_refuses_what_cannot_be_indexed(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = (folder / "index.npz").read_bytes()
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[:2048])
    assert main(["shards", "index", str(folder)]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.tar is truncated" in line
    (folder / "a.tar").unlink()
    (folder / "a.tar").mkdir()
    assert main(["shards", "index", str(folder)]) == 64
    assert "a.tar cannot be read (Is a directory)" in capsys.readouterr().err
    assert (folder / "index.npz").read_bytes() == before


# ---------------------------------------------------------------------------- inspect


def test_numbers_of_digits(digits: Path):
    index = load_index(digits / "test")
    found = inspect_shards(digits / "test")
    assert (found.shards, found.samples, found.shard_samples) == (2, 360, (180, 180, 180))
    assert found.tar_bytes == sum(path.stat().st_size for path in (digits / "test").glob("*.tar"))
    contents = [index.read_contents(n) for n in range(360)]
    for field in found.fields:
        sizes = [len(one[field.name]) for one in contents]
        assert (field.samples, field.max_bytes) == (360, max(sizes))
        assert field.mean_bytes == pytest.approx(np.mean(sizes))
    assert {field.name: field.kind for field in found.fields} == {
        "json": "object: index int, label int, slant float",
        "npy": "array float32 16",
        "png": "image uint8 1 x 8 x 8",
        "txt": "text of 17..19 characters",
    }
    labels = [index.read(n)["json"]["label"] for n in range(360)]
    assert (found.labels.path, found.labels.read) == ("json.label", 360)
    assert found.labels.counts == dict(enumerate(np.bincount(labels).tolist()))
    assert list(found.first_keys) == [one["__key__"] for one in contents[:3]]


def test_kinds_that_vary(tmp_path: Path):
    rng = np.random.default_rng(0)
    samples = [
        {
            "__key__": f"k{n}",
            "jpg": photo(200 + 10 * n, 180 + n),
            "cls": 5 - n,
            "npy": np.zeros((2, 3), np.float32 if n else np.int16),
            "bin": b"?",
            "x.json": {"a": n, **({"b": None} if n == 3 else {})} if n % 2 else [n],
        }
        for n in range(4)
    ]
    samples[2]["png"] = rng.integers(0, 9, (3, 5, 4)).astype(np.uint8)
    samples[3]["png"] = b"?"
    write_samples(tmp_path / "a.tar", samples)
    found = inspect_shards(index_folder(tmp_path))
    assert {field.name: field.kind for field in found.fields} == {
        "bin": "bytes, not decoded",
        "cls": "whole number 2..5",
        "jpg": "image uint8 1 x 180..183 x 200..230",
        "npy": "array int16 2 x 3 (1 of 4); array float32 2 x 3 (3 of 4)",
        "png": "image uint8 3 x 5 x 4; 1 of 2 cannot be decoded",
        "x.json": "list of 1 values (2 of 4); object: a int, b null (in 1) (2 of 4)",
    }
    png = next(field for field in found.fields if field.name == "png")
    assert (png.samples, png.mean_bytes) == (2, (png.max_bytes + 1) / 2)
    assert found.labels.counts == {5: 1, 4: 1, 3: 1, 2: 1}


def test_samples_are_spread():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(0, 4) == []


def test_inspect_prints_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sheet = tmp_path / "new" / "sheet.png"
    flip(folder / "c.tar", 1024 + 512)  # a text
    os.utime(folder / "c.tar", (1, 1))
    assert main(["shards", "inspect", str(folder), "--sheet", str(sheet)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "shards   3 of 3 to 4 samples (median 4), 30.7 kB",
        "samples  11, the first are s000, s001, s002",
        "",
        "field  samples  mean bytes  max bytes  decodes to (of 11 samples)",
        "cls         11           1          2  whole number 0..10",
        "txt         11           8          9  text of 8..9 characters",
        "1 of these samples cannot be read: see `dist-contrastive shards verify`",
        "",
        "cls: 11 different in 11 samples",
        "  0: 1   1: 1   2: 1   3: 1   4: 1   5: 1   6: 1   7: 1   8: 1   9: 1",
        "  10: 1",
        "",
        f"11 of 11 samples are drawn in {sheet}",
    ]
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert main(["shards", "inspect", str(tmp_path / "nowhere")]) == 64
    (folder / "index.npz").unlink()
    assert main(["shards", "inspect", str(folder)]) == 64
    assert f"run `dist-contrastive shards index {folder}`" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the sheet


def test_a_sheet_shows_its_samples(digits: Path, tmp_path: Path):
    index, path = load_index(digits / "test"), tmp_path / "sheet.png"
    assert report.sample_sheet(index, path, "title", rows=2, columns=3) == 6
    sheet = pixels_of(path)[..., 0]
    for place, number in enumerate(spread(len(index), 6)):
        image = index.read(number)["png"][0].numpy().repeat(21, 0).repeat(21, 1)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)[
            :, 16 + place % 3 * 184
        ]
        (row,) = np.flatnonzero((windows == image).all(axis=(1, 2)))
        below = sheet[row + 168 : row + 225, 16 + place % 3 * 184 :][:, :168]
        assert (row < 100) == (place < 3)
        assert below.min() < 100  # its key


def test_images_keep_their_aspect_ratio(tmp_path: Path):
    sizes = [(640, 320), (30, 90), (1, 4), (500, 500), (30, 50)]
    white = [Image.new("RGB", size, "red") for size in sizes]
    streams = [io.BytesIO() for _ in sizes]
    for image, stream in zip(white, streams, strict=True):
        image.save(stream, format="PNG")
    write_samples(
        tmp_path / "a.tar",
        [{"__key__": f"{n}", "png": x.getvalue()} for n, x in enumerate(streams)],
    )
    path = tmp_path / "sheet.png"
    assert report.sample_sheet(index_folder(tmp_path), path) == 5
    red = (pixels_of(path) == (255, 0, 0)).all(axis=2)
    for place, size in enumerate([(168, 84), (56, 168), (42, 168), (168, 168), (90, 150)]):
        rows, columns = np.nonzero(red[:, 16 + 184 * place :][:, :168])
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == size


def test_a_vector_is_drawn_as_a_curve(tmp_path: Path):
    values = np.array([0.0, np.nan, 8.0, np.inf, -8.0])
    write_samples(tmp_path / "a.tar", [{"__key__": "k", "npy": values}])
    path = tmp_path / "sheet.png"
    report.sample_sheet(index_folder(tmp_path), path)
    blue = (pixels_of(path) == (37, 99, 168)).all(axis=2)
    rows, columns = np.nonzero(blue)
    assert np.ptp(columns) > 140
    middle = rows[columns == columns.min()].mean()
    assert middle - rows.min() == pytest.approx(rows.max() - middle, abs=3)  # 0 between 8 and -8
    assert np.ptp(rows) > 100


@pytest.mark.parametrize(
    "sample",
    [
        {"npy": np.array([1.0, -np.inf, np.nan, 3e38, -3e38])},
        {"npy": np.full(7, 2)},
        {"npy": np.zeros((4, 9), bool)},
        {"npy": np.zeros((2, 3, 4))},
        {"npy": np.zeros((0, 4))},
        {"npy": np.array("text")},
        {"npy": np.float64(1.5)},
        {"bin": bytes(9), "json": {"label": "x" * 400}, "cls": b"no number"},
        {"txt": "寺" * 400 + "\x00\n\n" + "word " * 99, "json": [1]},
        {"txt": ""},
        {"png": np.zeros((3, 1, 900), np.uint8), "txt": "$x_{"},
    ],
    ids=lambda sample: ",".join(sample),
)
def test_anything_can_be_drawn(sample: dict, tmp_path: Path):
    write_samples(tmp_path / "a.tar", [{"__key__": "k" * 90, **sample}])
    index, path = index_folder(tmp_path), tmp_path / "sheet.png"
    assert report.sample_sheet(index, path, "a title " * 40) == 1
    assert pixels_of(path).shape[1] == 200
    assert inspect_shards(index).text()
