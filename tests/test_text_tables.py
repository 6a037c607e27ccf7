"""Tables of text: every value stays what it was, every row is a sample or is counted with its
reason; captions inside of JSON, and several of a sample."""

import csv
import gc
import gzip
import io
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import command, refused, run
from PIL import Image

from dist_contrastive.cli import main
from dist_contrastive.data import Fields, PackOptions, ShardStream, index_folder, load_index
from dist_contrastive.data.packing.hub import pack_dataset
from dist_contrastive.data.packing.pairs import pack_pairs
from dist_contrastive.data.packing.writer import Packed
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.errors import ConfigError, DataError, UnreadableSample
from dist_contrastive.pack_options import TextFormat

IN_ORDER = PackOptions(seed=None)
SKIP = PackOptions(seed=None, skip_unreadable=True)


def encoded(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with the images a.png to e.png."""
    for number, name in enumerate("abcde"):
        (tmp_path / f"{name}.png").write_bytes(encoded(number))
    return tmp_path


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """The samples with their fields decoded, without images."""
    index = load_index(folder)
    fields = [name for name in index.fields if name != "png"]
    rows = []
    for number in range(len(index)):
        held = index.read_contents(number)
        rows.append(index.read(number, [name for name in fields if name in held]))
    return rows


def texts_of(folder: Path) -> list[str]:
    return [sample.get("txt") for sample in samples_of(folder)]


def details_of(folder: Path) -> list[dict[str, Any]]:
    return [sample["json"] for sample in samples_of(folder)]


# ---------------------------------------------------------------------------- values

LOOKS = ["001", "NA", "null", "1e5", "2024-01-01", "True", " x ", "=1+1", "-0", "1,5", "NaN", "3.0"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
@pytest.mark.parametrize("pack", [pack_pairs, pack_dataset])
def test_values_stay_the_texts_that_they_are(root, suffix, pack):
    rows = [{"image": "a.png", "text": look, "more": look} for look in LOOKS]
    table = root / f"t{suffix}"
    if suffix.startswith(".j"):
        lines = map(json.dumps, rows)
        table.write_text("\n".join(lines) if suffix == ".jsonl" else json.dumps(rows, indent=1))
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(rows)
    more = {"label": "-"} if pack is pack_dataset else {}
    pack(table, root / "out", IN_ORDER, text="text", **more)
    assert texts_of(root / "out") == LOOKS
    assert [details["more"] for details in details_of(root / "out")] == LOOKS


def test_values_of_json_keep_their_types(root):
    values = [1, 1.5, True, None, [1, 2], {"a": ["001"]}, 2**70, "é"]
    (root / "t.jsonl").write_text(
        "".join(json.dumps({"image": "a.png", "text": "x", "v": v}) + "\n" for v in values)
    )
    pack_pairs(root / "t.jsonl", root / "out", IN_ORDER)
    assert [details["v"] for details in details_of(root / "out")] == values


def test_half_a_sign_is_no_text(root):
    rows = [{"image": "a.png", "text": "x", "v": "\ud800"}, {"image": "a.png", "text": "\ud800"}]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with refused(DataError, "1 of 2 rows", "line 2 of", "'\\ud800'", "text in Unicode"):
        pack_pairs(root / "t.jsonl", root / "no")
    pack_pairs(root / "t.jsonl", root / "out", SKIP)
    assert details_of(root / "out") == [{"image": "a.png", "v": "\ud800"}]


def test_null_is_what_a_setting_says(root, caplog):
    (root / "t.csv").write_text("image,text,n\na.png,NA,NA\nb.png,null,1\nc.png,x,NULL\n")
    pack_pairs(root / "t.csv", root / "as-text", IN_ORDER)
    assert texts_of(root / "as-text") == ["NA", "null", "x"]
    assert "1 values of column 'text' are 'NA'" in caplog.text
    assert "--null NA" in caplog.text
    form = TextFormat(null=("NA", "null"))
    with refused(DataError, "2 of 3 rows", "line 2 of", "no text", "--skip-unreadable"):
        pack_pairs(root / "t.csv", root / "no", IN_ORDER, form=form)
    packed = pack_pairs(root / "t.csv", root / "out", SKIP, form=form)
    assert len(packed.left_out) == 2
    assert details_of(root / "out") == [{"image": "c.png", "n": "NULL"}]
    pack_dataset(root / "t.csv", root / "dataset", IN_ORDER, text="text", form=form)
    assert [details["n"] for details in details_of(root / "dataset")] == [None, "1", "NULL"]


@pytest.mark.parametrize("missing", [None, "", "  ", "\t"])
@pytest.mark.parametrize("column", ["image", "text"])
def test_missing_values_are_left_out_and_counted(root, column, missing):
    rows = [{"image": f"{name}.png", "text": f"cat {name}"} for name in "abcde"]
    rows[2][column] = missing  # type: ignore[assignment]
    (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(DataError, "1 of 5 rows", "line 3 of", f"no {column}", "--skip-unreadable"):
        pack_pairs(root / "t.jsonl", root / "out", IN_ORDER)
    packed = pack_pairs(root / "t.jsonl", root / "out", SKIP)
    assert len(packed.index) == 4
    (reason,) = packed.left_out
    assert "line 3 of" in reason
    assert f"no {column}" in reason
    del rows[2][column]
    (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(pack_pairs(root / "t.jsonl", root / "lacking", SKIP).left_out) == 1


# ---------------------------------------------------------------------------- separated values


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('path\ttitle\na.png\t"best" chair\nb.png\ta 5" nail\n', ['"best" chair', 'a 5" nail']),
        ('title\tpath\n"so it\ta.png\nends"\tb.png\nc\tc.png\n', ['"so it', 'ends"', "c"]),
        ('path\ttitle\na.png\t"\nb.png\t""x\n', ['"', '""x']),
        ("path\ttitle\na.png\t'x'\nb.png\ta\\tb\n", ["'x'", "a\\tb"]),
    ],
)
def test_quotation_marks_between_tabs_are_text(root, text, texts):
    pack_pairs(write(root / "t.tsv", text), root / "out", IN_ORDER)
    assert texts_of(root / "out") == texts
    pack_pairs(root / "t.tsv", root / "none", IN_ORDER, form=TextFormat(quotes="none"))
    assert texts_of(root / "none") == texts


@pytest.mark.parametrize(
    ("text", "as_text", "as_csv"),
    [
        ('path\ttext\na.png\t"no smoking"\n', ['"no smoking"'], ["no smoking"]),
        ('path\ttext\na.png\t"a ""b"""\n', ['"a ""b"""'], ['a "b"']),
        ('"path"\t"text"\n"a.png"\t"x"\n', None, ["x"]),
        ('path\ttext\na.png\t"two\nlines"\n', None, ["two\nlines"]),
        ('text\tpath\n"a\tb"\ta.png\n', None, ["a\tb"]),
    ],
)
def test_quotation_marks_that_could_enclose_are_asked_about(root, text, as_text, as_csv):
    table = write(root / "t.tsv", text)
    with refused(DataError, "in two ways", "--quotes none", "--quotes csv", "line "):
        pack_pairs(table, root / "out", SKIP)
    for quotes, texts in (("none", as_text), ("csv", as_csv)):
        if texts is not None:
            pack_pairs(table, root / quotes, IN_ORDER, form=TextFormat(quotes=quotes))
            assert texts_of(root / quotes) == texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('image,text\na.png,"x\nb.png,y\nc.png,z\n', ["line 2 to 4", "--quotes"]),
        ('image,text\na.png,"x\nb.png,"y"\nc.png,z\n', ["line 2 to 3", "--quotes"]),
        ('image,"text\na.png,x\n', ["line 1 to 2"]),
    ],
)
def test_a_quotation_mark_never_makes_several_rows_one(root, text, words):
    with refused(DataError, *words):
        pack_pairs(write(root / "t.csv", text), root / "out", SKIP)


def test_columns_without_a_name(root):
    """The index of pandas, and what spreadsheets leave behind."""
    text = ",filepath,title,,\n" + "".join(f"{n},{x}.png,cat {x},,z\n" for n, x in enumerate("abc"))
    pack_pairs(write(root / "t.csv", text), root / "out", IN_ORDER)
    assert texts_of(root / "out") == ["cat a", "cat b", "cat c"]
    assert details_of(root / "out")[1] == {
        "filepath": "b.png",
        "Unnamed: 0": "1",
        "Unnamed: 3": "",
        "Unnamed: 4": "z",
    }
    pack_dataset(root / "t.csv", root / "dataset", IN_ORDER, image="filepath")
    assert texts_of(root / "dataset") == ["cat a", "cat b", "cat c"]


def test_long_cells_and_lines(root):
    long = "x" * 300_000
    pack_pairs(write(root / "t.csv", f'image,text\na.png,"{long}"\n'), root / "csv", IN_ORDER)
    pack_pairs(write(root / "t.tsv", f"image\ttext\na.png\t{long}\n"), root / "tsv", IN_ORDER)
    line = json.dumps({"image": "a.png", "text": long})
    pack_pairs(write(root / "t.jsonl", line), root / "jsonl", IN_ORDER)
    for name in ("csv", "tsv", "jsonl"):
        assert texts_of(root / name) == [long]


@pytest.mark.parametrize(
    ("encoding", "chosen"),
    [
        *[(name, None) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32")],
        *[(name, name) for name in ("utf-8-sig", "utf-16-le", "cp1252", "latin-1")],
        *[("utf-8-sig", "utf8"), ("utf-16", "utf-16-le"), ("utf-16", "UTF-16")],
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_encodings(root, encoding, chosen, suffix):
    text = "Käse, Brötchen"
    if suffix == ".jsonl":
        table = json.dumps({"image": "a.png", "text": text}, ensure_ascii=False) + "\n"
    else:
        mark = '"' if suffix == ".csv" else ""
        sign = "," if suffix == ".csv" else "\t"
        table = f"image{sign}text\r\na.png{sign}{mark}{text}{mark}\r\n"
    write(root / f"t{suffix}", table, encoding)
    form = TextFormat(encoding=chosen)
    pack_pairs(root / f"t{suffix}", root / "out", IN_ORDER, form=form)
    assert texts_of(root / "out") == [text]
    assert "image" in details_of(root / "out")[0]


def test_bytes_of_another_encoding_are_counted(root):
    text = "image,text\na.png,x\nb.png,Käse\nc.png,z\n"
    table = write(root / "t.csv", text, "cp1252")
    with refused(DataError, "1 of 3 rows", "line 3 of", "--encoding"):
        pack_pairs(table, root / "no", IN_ORDER)
    assert len(pack_pairs(table, root / "some", SKIP).left_out) == 1
    pack_pairs(table, root / "all", IN_ORDER, form=TextFormat(encoding="cp1252"))
    assert texts_of(root / "all") == ["x", "Käse", "z"]
    write(root / "g.csv", "image,text\na.png,猫\n", "gb18030")
    pack_pairs(root / "g.csv", root / "g", IN_ORDER, form=TextFormat(encoding="gb18030"))
    assert texts_of(root / "g") == ["猫"]
    with refused(DataError, "z.csv", "--encoding", "utf-16-le"):
        pack_pairs(write(root / "z.csv", "image,text\na.png,x\n", "utf-16-le"), root / "no")
    with refused(DataError, "h.csv", "--encoding"):
        pack_pairs(write(root / "h.csv", "Bild,Größe\n", "cp1252"), root / "no")
    with refused(ConfigError, "encoding='utf-7x'", "cp1252"):
        TextFormat(encoding="utf-7x")


@pytest.mark.parametrize("sign", [";", "|", "\t", ","])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_separators_and_ends_of_lines(root, sign, newline, caplog):
    lines = [f"image{sign}title", f"a.png{sign}a cat", "", f"b.png{sign}a dog"]
    table = write(root / "t.csv", newline.join(lines) + newline)
    pack_pairs(table, root / "out", IN_ORDER)
    assert texts_of(root / "out") == ["a cat", "a dog"]
    assert ("separated by" in caplog.text) == (sign != ",")
    quoted = write(root / "q.csv", f'"image"{sign}"x, {sign} y"{newline}a.png{sign}"z"{newline}')
    form = TextFormat(quotes="csv")
    pack_pairs(quoted, root / "quoted", IN_ORDER, text=f"x, {sign} y", form=form)
    assert texts_of(root / "quoted") == ["z"]
    pack_pairs(write(table, f"sep={sign}{newline}" + newline.join(lines)), root / "hint", IN_ORDER)
    assert texts_of(root / "hint") == ["a cat", "a dog"]
    other = write(root / "u.csv", "image~title\na.png~x, y\n")
    pack_pairs(other, root / "other", IN_ORDER, form=TextFormat(separator="~"))
    assert texts_of(root / "other") == ["x, y"]
    with refused(ConfigError, "separator='||'", "one"):
        TextFormat(separator="||")


def test_a_table_without_a_header(root):
    table = write(root / "t.tsv", "a cat\ta.png\na dog\tb.png\n")
    with refused(ConfigError, "which column is the image", "a cat, a.png", "--columns"):
        pack_pairs(table, root / "no")
    pack_pairs(table, root / "out", IN_ORDER, form=TextFormat(columns=("caption", "image")))
    assert texts_of(root / "out") == ["a cat", "a dog"]


def test_rows_that_cannot_be_read_are_left_out_and_counted(root):
    write(root / "t.csv", 'image,text\na.png,x\nb.png\nc.png,y,z\nd.png,"q"r\ne.png,w\n')
    with refused(DataError, "3 of 5 rows", "line 3 of", "1 cells but the header has 2"):
        pack_pairs(root / "t.csv", root / "no")
    packed = pack_pairs(root / "t.csv", root / "csv", SKIP)
    assert texts_of(root / "csv") == ["x", "w"]
    assert [
        words in reason
        for words, reason in zip(
            ("1 cells", "3 cells", "--quotes none"), packed.left_out, strict=True
        )
    ] == [True] * 3
    good = json.dumps({"image": "a.png", "text": "x"})
    lines = [good, '{"image": "a.png"', "[1]", "", "[" * 100_000, '{"image": 3, "text": "x"}', good]
    write(root / "t.jsonl", "\n".join(lines))
    packed = pack_pairs(root / "t.jsonl", root / "jsonl", SKIP)
    assert (len(packed.index), len(packed.left_out)) == (2, 4)
    for line, reason in zip((2, 3, 5, 6), packed.left_out, strict=True):
        assert f"line {line} of" in reason
    write(root / "t.json", json.dumps([{"image": "a.png", "text": "x"}, 3, None]))
    packed = pack_pairs(root / "t.json", root / "json", SKIP)
    assert (len(packed.index), len(packed.left_out)) == (1, 2)
    assert "entry 2 of" in packed.left_out[0]
    write(root / "coco.json", json.dumps({"images": [{"id": 1}], "annotations": [{"id": 1}]}))
    for pack in (pack_pairs, pack_dataset):
        with refused(DataError, "one object of images, annotations", "one object a line"):
            pack(root / "coco.json", root / "no")
    write(root / "text.json", "x" * 2000)
    long = write(root / "long.jsonl", json.dumps({"image": "x" * 5000, "text": "x"}))
    with refused(DataError, "1 of 1 rows", "is not there"):  # the columns were confused
        pack_pairs(long, root / "no")
    with refused(DataError, "no JSON"):
        pack_pairs(root / "text.json", root / "no")


# ---------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "classes", "entries"),
    [
        (["3", "0", "10"], [3, 0, 10], [3, 0, 10]),
        (["1.0", "", "3.0"], [1, -1, 3], [1, None, 3]),
        (["cat", "ant", ""], [1, 0, -1], [(1, "cat"), (0, "ant"), (None, None)]),
        (["001", "010", "002"], [0, 2, 1], [(0, "001"), (2, "010"), (1, "002")]),
        (["0.5", "-2", "1e-3"], None, [0.5, -2.0, 0.001]),
        ([1.0, None, 3.0], [1, -1, 3], [1, None, 3]),
        ([True, False, None], [1, 0, -1], [1, 0, None]),
        ([1.5, None, 3.0], None, [1.5, None, 3.0]),
    ],
)
@pytest.mark.parametrize("pack", [pack_pairs, pack_dataset])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_are_numbers_or_names(root, labels, classes, entries, pack, suffix):
    pairs = list(zip("abc", labels, strict=True))
    table = root / f"t{suffix}"
    if suffix == ".csv":
        if isinstance(labels[0], bool):
            pytest.skip("a .csv has texts alone")
        rows = (",".join((f"{x}.png", "" if label is None else str(label))) for x, label in pairs)
        write(table, "\n".join(["image,kind", *rows]))
    elif suffix == ".jsonl":
        lines = (json.dumps({"image": f"{name}.png", "kind": label}) for name, label in pairs)
        write(table, "\n".join(lines))
    else:
        import datasets

        columns = {"image": [f"{name}.png" for name, _ in pairs], "kind": labels}
        datasets.Dataset.from_dict(columns).to_parquet(table)
    pack(table, root / "out", IN_ORDER, image="image", label="kind")
    samples = samples_of(root / "out")
    assert [s.get("cls") for s in samples] == (classes or [None] * 3)
    for sample, entry in zip(samples, entries, strict=True):
        values = [sample["json"][name] for name in ("label", "class") if name in sample["json"]]
        assert values == (list(entry) if isinstance(entry, tuple) else [entry])
        assert "kind" not in sample["json"]
    names = {entry for entry in entries if isinstance(entry, tuple) and entry[1] is not None}
    assert set(load_index(root / "out").classes.items()) == names


def test_numbers_are_no_texts_unless_they_are_named(root):
    write(root / "t.csv", "id,note,score\n001,x,0.5\n002,y,2\n")
    pack_dataset(root / "t.csv", root / "out", IN_ORDER)
    assert texts_of(root / "out") == ["x", "y"]
    assert details_of(root / "out")[1] == {"index": 1, "id": "002", "score": "2"}
    pack_dataset(root / "t.csv", root / "score", IN_ORDER, text="score")
    assert texts_of(root / "score") == ["0.5", "2"]


def test_the_label_of_a_table_is_found_by_its_name(root, caplog):
    write(root / "t.csv", "label,caption,file\n1,x,a.png\n0,y,b.png\n")
    pack_dataset(root / "t.csv", root / "out", IN_ORDER)
    assert "--image file packs the images" in caplog.text
    assert [s["cls"] for s in samples_of(root / "out")] == [1, 0]
    with refused(ConfigError, "'class'", "hidden", "--label class"):
        write(root / "u.csv", "image,kind,class\na.png,x,y\n")
        pack_pairs(root / "u.csv", root / "no", label="kind")


# ---------------------------------------------------------------------------- other tables


def test_paths_in_parquet_and_arrow(root):
    import datasets

    data = datasets.Dataset.from_dict(
        {"image": ["a.png", "b.png", None], "caption": ["001", "", "z"], "n": [1, 2, 3]}
    )
    data.to_parquet(root / "t.parquet")
    with refused(DataError, "2 of 3 rows", "row 1", "--skip-unreadable"):
        pack_pairs(root / "t.parquet", root / "no")
    packed = pack_pairs(root / "t.parquet", root / "out", SKIP)
    assert len(packed.left_out) == 2
    assert samples_of(root / "out")[0]["json"] == {"image": "a.png", "n": 1}
    packed = pack_dataset(root / "t.parquet", root / "dataset", SKIP, image="image")
    assert (texts_of(root / "dataset"), len(packed.left_out)) == (["001"], 2)
    pack_dataset(root / "t.parquet", root / "labels", SKIP, image="image", label="n")
    assert texts_of(root / "labels") == ["001", None]
    pack_dataset(root / "t.parquet", root / "texts", IN_ORDER)
    assert texts_of(root / "texts") == ["001", None, "z"]


def test_files_of_text_in_a_folder_are_read_alike(root, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    (root / "csv").mkdir()
    write(root / "csv" / "train-0.csv", "id,caption\n001,NA\n002,null\n")
    write(root / "csv" / "train-1.csv", "id,caption\n003,x\n")
    write(root / "csv" / "test.csv", "id,caption\n004,y\n")
    with refused(DataError, "several splits", "train, test"):
        pack_dataset(root / "csv", root / "no")
    pack_dataset(root / "csv", root / "train", IN_ORDER, split="train", text="caption")
    assert texts_of(root / "train") == ["NA", "null", "x"]
    assert [details["id"] for details in details_of(root / "train")] == ["001", "002", "003"]
    (root / "zip").mkdir()
    lines = '{"id": "2024-01-01", "text": "7"}\n{"id": 5, "text": null}\n'
    (root / "zip" / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pack_dataset(root / "zip", root / "unzipped", IN_ORDER)
    assert texts_of(root / "unzipped") == ["7", None]
    assert [details["id"] for details in details_of(root / "unzipped")] == ["2024-01-01", 5]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("pairs t.csv OUT --separator ~ --quotes none --null NA --skip-unreadable", '"x'),
        ("dataset t.csv OUT --separator ~ --quotes none --image file --encoding utf-8", '"x'),
    ],
)
def test_flags_of_the_command(root, monkeypatch, command, text):
    monkeypatch.chdir(root)
    table = "file~t\na.png~NA\nb.png~" + text + "\n"
    write(root / "t.csv", table if "--null" in command else table.replace("NA", text))
    arguments = [*command.replace("OUT", "out").split(), "--text", "t"]
    assert main(["shards", "pack", *arguments]) == 0
    assert set(texts_of(root / "out")) == {text}
    write(root / "u.tsv", f"x\ta.png\n{text}\tb.png\n")
    words = ["pairs", "u.tsv", "v", "--separator", "\\t", "--columns", "text,image"]
    assert main(["shards", "pack", *words]) == 0
    assert len(load_index(root / "v")) == 2


def test_flags_that_say_nothing_of_a_table_are_refused(root):
    import datasets

    write(root / "t.jsonl", '{"image": "a.png", "text": "x"}')
    datasets.Dataset.from_dict({"image": ["a.png"], "text": ["x"]}).to_parquet(root / "t.parquet")
    form = TextFormat(separator=";", null=("NA",))
    with refused(ConfigError, "t.jsonl", "--separator, --null", "all but --encoding"):
        pack_pairs(root / "t.jsonl", root / "no", form=form)
    for pack in (pack_pairs, pack_dataset):
        with refused(ConfigError, "t.parquet", "leave out --separator, --null"):
            pack(root / "t.parquet", root / "no", form=form)


def test_what_is_no_file_is_no_table(root):
    os.mkfifo(root / "pipe.csv")
    for pack in (pack_pairs, pack_dataset):
        with refused(DataError, "pipe.csv is no file"):
            pack(root / "pipe.csv", root / "no")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the library
@pytest.mark.filterwarnings("ignore:unclosed file .*metadata.csv:ResourceWarning")
def test_a_table_beside_images_that_the_library_reads_is_named(root, monkeypatch, caplog):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    (root / "images").mkdir()
    for name in "ab":
        (root / f"{name}.png").rename(root / "images" / f"{name}.png")
    table = write(root / "images" / "metadata.csv", "file_name,text,id\na.png,x,001\nb.png,y,002\n")
    pack_dataset(root / "images", root / "out", IN_ORDER)
    gc.collect()  # the library leaves the table open, in a cycle that another test would pay for
    assert f"pack pairs {table} --image file_name" in caplog.text
    pack_pairs(table, root / "pairs", IN_ORDER, image="file_name")
    assert [details["id"] for details in details_of(root / "pairs")] == ["001", "002"]


# ---------------------------------------------------------------------------- any table at all

GOOD, TEXTS = "good", ["a cat", "Käse", "001", "NA", "null", "x" * 200, '5"', "it's", " y ", "-"]
FAULTS = {  # what a row lacks, and words of the reason for which it is left out
    "no text": "no text",
    "no image": "no image",
    "not there": "is not there|cannot be read (",
    "damaged": "none of the formats",
    "cells": "cells but the header",
    "no JSON": "no JSON|no object",
    "bytes": "bytes that are not in its encoding",
}


def random_row(dice: random.Random, kind: str, folder: Path) -> dict[str, Any]:
    row = {"image": f"{dice.choice('abcde')}.png", "text": dice.choice(TEXTS)}
    row |= {"more": dice.choice(["", "1.0", "007", *TEXTS])}
    match kind:
        case "no text":
            row["text"] = dice.choice(["", "  "])
        case "no image":
            row["image"] = ""
        case "not there":
            row["image"] = dice.choice(["z.png", "no/a.png", ".", "x" * 300])
        case "damaged":
            row["image"] = "damaged.png"
        case "bytes":
            row["more"] = "\udcff"
    return row


def write_random(path: Path, dice: random.Random, kinds: Sequence[str], rows: list[dict]) -> None:
    """The rows as a file of its kind; blank lines are no rows."""
    newline = dice.choice(["\n", "\r\n"])
    is_json = path.suffix == ".jsonl"
    sign = {".csv": dice.choice(",;|"), ".tsv": "\t", ".jsonl": ""}[path.suffix]
    lines = [] if is_json else [sign.join(rows[0])]
    for kind, row in zip(kinds, rows, strict=True):
        if is_json:
            line = json.dumps(row, ensure_ascii=False)
            line = dice.choice([line[:-1], "[]", "3", line + "}"]) if kind == "no JSON" else line
        else:
            stream = io.StringIO()
            how = {"quoting": dice.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])}
            if sign == "\t":
                how = {"quoting": csv.QUOTE_NONE, "quotechar": None}
            csv.writer(stream, delimiter=sign, lineterminator="", **how).writerow(row.values())
            line = stream.getvalue()
            line = dice.choice([line + sign, line.split(sign)[0]]) if kind == "cells" else line
        lines += ["", line] if dice.random() < 0.1 else [line]
    text = newline.join(lines) + dice.choice(["", newline])
    mark = b"\xef\xbb\xbf" if dice.random() < 0.3 else b""
    path.write_bytes(mark + text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("seed", range(24))
def test_samples_and_rows_left_out_are_all_rows(root, seed):
    dice = random.Random(seed)
    (root / "damaged.png").write_bytes(b"no image at all")
    suffix = dice.choice([".csv", ".tsv", ".jsonl"])
    faults = [f for f in FAULTS if f != ("cells" if suffix == ".jsonl" else "no JSON")]
    kinds = [GOOD, *dice.choices([GOOD, *faults], [6, *[1] * len(faults)], k=dice.randint(1, 40))]
    rows = [random_row(dice, kind, root) for kind in kinds]
    write_random(root / f"t{suffix}", dice, kinds, rows)
    packed = pack_pairs(root / f"t{suffix}", root / "out", SKIP)
    assert len(packed.index) + len(packed.left_out) == len(rows)
    assert reasons(packed) == Counter(kind for kind in kinds if kind != GOOD)
    kept = [row for kind, row in zip(kinds, rows, strict=True) if kind == GOOD]
    assert texts_of(root / "out") == [row["text"] for row in kept]
    assert details_of(root / "out") == [
        {"image": row["image"], "more": row["more"]} for row in kept
    ]
    if packed.left_out:
        with refused(DataError, f" of {len(rows)} ", "--skip-unreadable"):
            pack_pairs(root / f"t{suffix}", root / "no", IN_ORDER)


def reasons(packed: Packed) -> Counter[str]:
    found = [
        [name for name, words in FAULTS.items() if any(w in reason for w in words.split("|"))]
        for reason in packed.left_out
    ]
    assert all(len(names) == 1 for names in found), packed.left_out
    return Counter(names[0] for names in found)


# ---------------------------------------------------------------------------- captions

CAPTIONS = [[f"{n} a", f"{n} b", f"{n} c"] for n in range(12)]


def captioned(folder: Path, values: Sequence[Any], name: str = "json") -> Path:
    samples = [
        {"__key__": f"{n}", "png": encoded(n), name: value} for n, value in enumerate(values)
    ]
    folder.mkdir()
    write_samples(folder / "0.tar", samples)
    index_folder(folder)
    return folder


def drawn(folder: Path, fields: Fields, **changed: Any) -> dict[tuple[int, int], str]:
    """Text of each sample in each of two epochs."""
    settings = {"global_batch_size": 4, "lanes": 2, "seed": 3, "epochs": 2, **changed}
    stream = ShardStream(
        load_index(folder), only=fields.names, transform=fields.prepare, **settings
    )
    found = {}
    for batch in stream:
        samples = fields.samples(batch)
        assert isinstance(samples.pair, tuple)
        places = zip(samples.epoch.tolist(), samples.index.tolist(), strict=True)
        found.update(zip(places, samples.pair, strict=True))
    return found


@pytest.mark.parametrize("name", ["json.captions", "json.meta.texts", "about.json.captions"])
def test_one_of_several_captions_is_drawn_by_key_epoch_and_seed(tmp_path, name):
    values = [{"captions": texts, "meta": {"texts": texts}} for texts in CAPTIONS]
    field = name.rpartition("json")[0] + "json"
    folder = captioned(tmp_path / "data", values, field)
    first = drawn(folder, Fields("png", pair=name, seed=5))
    assert len(first) == 24
    assert all(text in CAPTIONS[number] for (_, number), text in first.items())
    assert first == drawn(folder, Fields("png", pair=name, seed=5), global_batch_size=6, lanes=1)
    epochs = [[first[epoch, number][-1] for number in range(12)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) > 1
    other = drawn(folder, Fields("png", pair=name, seed=6))
    assert other.keys() == first.keys()
    assert other != first


def test_a_caption_inside_of_json_and_a_label_beside_it(tmp_path):
    values = [{"caption": f"cat {n}", "label": n % 2, "a": {"b": n}} for n in range(4)]
    folder = captioned(tmp_path / "data", values)
    fields = Fields("png", "json.label", num_classes=2, pair="json.caption")
    samples = fields.read(load_index(folder), range(4))
    assert samples.pair == tuple(f"cat {n}" for n in range(4))
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 0, 1]
    nested = Fields("png", "json.a.b").labels(load_index(folder), range(4))
    assert nested.tolist() == [0, 1, 2, 3]


def test_the_first_of_several_names_inside_of_json_that_holds_a_text(tmp_path):
    values = [{"caption": "a", "alt": "b"}, {"caption": " ", "alt": "b"}, {"alt": ["c"]}]
    index = load_index(captioned(tmp_path / "data", values))
    fields = Fields("png", pair=["json.caption", "json.alt"])
    assert fields.read(index, range(3)).pair == ("a", "b", "c")


def test_a_list_of_texts_that_is_a_field_itself(tmp_path):
    folder = captioned(tmp_path / "data", CAPTIONS, "captions.json")
    samples = Fields("png", pair="captions.json").read(load_index(folder), range(12))
    assert all(text in texts for text, texts in zip(samples.pair or (), CAPTIONS, strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"captions": None},
        {"captions": []},
        {"captions": ["", None]},
        {"captions": 3},
        ["x"],
        None,
    ],
)
def test_a_sample_without_captions_is_replaced(tmp_path, bad):
    values: list[Any] = [{"captions": texts} for texts in CAPTIONS]
    values[7] = bad
    folder = captioned(tmp_path / "data", values)
    fields = Fields("png", pair="json.captions")
    with refused(UnreadableSample, "sample 7", "'json.captions'", "data.pair"):
        fields.read(load_index(folder), [7])
    found = drawn(folder, fields, max_skipped=1)
    assert {number for _, number in found} == set(range(12)) - {7}
    with refused(DataError, "sample 7"):
        drawn(folder, fields, max_skipped=0)


@pytest.mark.parametrize("name", ["txt", "text", "caption", "transcript", "long.caption"])
def test_extensions_of_texts(tmp_path, name):
    folder = captioned(tmp_path / "data", [f"Käse {n}".encode() for n in range(4)], name)
    samples = Fields("png", pair=name).read(load_index(folder), range(4))
    assert samples.pair == tuple(f"Käse {n}" for n in range(4))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("pack", [pack_pairs, pack_dataset])
def test_several_captions_are_packed_and_drawn(root, suffix, pack, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"image": f"{name}.png", "captions": [f"cat {name}", f"a {name}"]} for name in "abcd"]
    if suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(root / "t.parquet")
    else:
        (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(root / f"t{suffix}", root / "out", IN_ORDER, image="image")
    assert "data.pair=json.captions" in caplog.text
    samples = Fields("png", pair="json.captions").read(load_index(root / "out"), range(4))
    for text, row in zip(samples.pair or (), rows, strict=True):
        assert text in row["captions"]
    rows[0]["captions"] += [None, ""]
    rows[2]["captions"] = [3]
    rows[3]["captions"] = "one"
    (root / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = pack_pairs(root / "v.jsonl", root / "mixed", SKIP)
    assert ["line 3" in reason for reason in packed.left_out] == [True]
    with_one = Fields("png", pair="json.captions").read(load_index(root / "mixed"), range(3))
    assert set(with_one.pair or ()) <= {"cat a", "a a", "cat b", "a b", "one"}
    rows[1]["captions"], rows[2]["captions"] = [], ["x"]
    (root / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(DataError, "1 of 4 rows", "no text", "line 2 of"):
        pack_pairs(root / "u.jsonl", root / "no")


# ---------------------------------------------------------------------------- a hub that is off


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_is_off_is_not_asked_again(tmp_path, variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    url = "hf://datasets/org/name/train-{00000..00001}.tar"
    done = run(command("shards", "index", url, "--out", tmp_path / "x.npz"))
    assert done.returncode == 64
    assert "HF_HUB_OFFLINE" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
