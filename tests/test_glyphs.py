"""Glyphs: that each is its font's, what is packed, and how it is divided."""

import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from torch.nn.functional import avg_pool2d

from dist_contrastive.data import Fields, pack_glyphs
from dist_contrastive.data.packing.demos import CHARACTERS, FONTS, character_in, draw_font
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.errors import ConfigError, DataError

GLYPHS = len(CHARACTERS) * len(FONTS)
PER_GLYPH = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    pack_glyphs(folder, PER_GLYPH)
    return folder


@pytest.fixture(scope="module")
def samples(folder: Path) -> dict[str, list[dict]]:
    indexes = {split: load_index(folder / split) for split in ("train", "test")}
    return {split: [i.read(n) for n in range(len(i))] for split, i in indexes.items()}


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """All glyphs without jitter, by font and character: [glyphs, 128, 128]."""
    return np.concatenate([draw_font(font) for font in FONTS])


# ---------------------------------------------------------------------------- fonts


def test_characters_are_34_that_no_font_makes_alike():
    assert len(set(CHARACTERS)) == 34
    assert not set("IO") & set(CHARACTERS)


@pytest.mark.parametrize("font", FONTS)
def test_a_font_has_all_characters_under_its_name(font: str):
    file, alphabet = FONTS[font]
    opened = TTFont(f"{matplotlib.get_data_path()}/fonts/ttf/{file}.ttf")
    known = opened.getBestCmap()
    for character in CHARACTERS:
        code = character_in(character, alphabet)
        assert ord(code) in known
        assert unicodedata.normalize("NFKC", code) == character
        assert (code == character) == (not alphabet)
    full_name = opened["name"].getDebugName(4)
    weight = [word for word in ("Bold", "Italic", "Oblique") if word in font]
    if not alphabet and not file.startswith("cm"):
        assert [word for word in ("Bold", "Italic", "Oblique") if word in full_name] == weight


def test_no_two_glyphs_look_the_same(drawn: np.ndarray):
    assert drawn.dtype == np.uint8
    assert len(np.unique(drawn.reshape(GLYPHS, -1), axis=0)) == GLYPHS == 918
    assert (drawn.reshape(GLYPHS, -1) > 200).sum(1).min() > 100


def test_capitals_are_17_pixels_high_and_in_the_middle(drawn: np.ndarray):
    for number, glyph in enumerate(drawn):
        rows, columns = (np.flatnonzero(glyph.max(axis)) for axis in (1, 0))
        for ink in (rows, columns):
            assert abs((ink[0] + ink[-1]) / 2 - 63.5) <= 0.5
        if CHARACTERS[number % len(CHARACTERS)] == "H":
            assert abs(len(rows) / 4 - 17) <= 0.5


# ---------------------------------------------------------------------------- packed


def test_samples_say_what_they_show(samples: dict[str, list[dict]]):
    fonts = list(FONTS)
    for sample in samples["train"] + samples["test"]:
        json = sample["json"]
        place = fonts.index(json["font"]) * len(CHARACTERS) + CHARACTERS.index(json["character"])
        assert json["index"] // PER_GLYPH == place
        assert json["label"] == CHARACTERS.index(json["character"])
        assert sample["__key__"] == f"glyph-{json['index']:05d}"
        kind = "digit" if json["label"] < 10 else "letter"
        assert sample["txt"] == f"the {kind} {json['character']} in {json['font']}"


def test_images_show_it(samples: dict[str, list[dict]], drawn: np.ndarray):
    """The nearest glyph without jitter has the right character for most, and the font for many."""
    clean = avg_pool2d(torch.from_numpy(drawn)[:, None] / 255, 4).flatten(1)
    chosen = samples["test"]
    images = torch.stack([sample["png"] for sample in chosen]).flatten(1) / 255
    place = torch.cdist(images, clean).argmin(1)
    label = torch.tensor([sample["json"]["label"] for sample in chosen])
    font = torch.tensor([sample["json"]["index"] // PER_GLYPH // 34 for sample in chosen])
    assert (place % 34 == label).double().mean() > 0.8
    assert (place // 34 == font).double().mean() > 0.3


def test_images_are_distinct_and_white_on_black(samples: dict[str, list[dict]]):
    images = torch.stack([sample["png"] for sample in samples["train"] + samples["test"]])
    assert (images.dtype, images.shape) == (torch.uint8, (PER_GLYPH * GLYPHS, 1, 32, 32))
    assert len(images.flatten(1).unique(dim=0)) == PER_GLYPH * GLYPHS
    assert images.flatten(1).amax(1).min() > 100
    inner = images[:, :, 1:-1, 1:-1].sum((1, 2, 3), dtype=torch.int64)
    on_the_edge = images.sum((1, 2, 3), dtype=torch.int64) - inner
    assert (on_the_edge > 0).double().mean() < 0.02
    assert inner.double().mean() / 255 / 32**2 < 0.2


def test_an_eighth_of_every_class_is_held_out(samples: dict[str, list[dict]]):
    numbers = [s["json"]["index"] for split in samples.values() for s in split]
    assert sorted(numbers) == list(range(PER_GLYPH * GLYPHS))
    held_out = np.bincount([s["json"]["label"] for s in samples["test"]], minlength=34)
    assert held_out.sum() == PER_GLYPH * GLYPHS // 8
    assert np.all(np.abs(held_out - PER_GLYPH * len(FONTS) / 8) < 1)
    assert {s["json"]["font"] for s in samples["test"]} == set(FONTS)
    first = [s["json"]["label"] for s in samples["train"][:200]]
    assert len(set(first)) > 30  # shuffled


def test_fields_read_them(folder: Path):
    read = Fields("png", "json.label", 34, "txt").read(load_index(folder / "test"), range(5))
    assert read.images.shape == (5, 1, 32, 32)
    assert 0 <= read.images.min() < 0.01 < 0.5 < read.images.max() <= 1
    assert read.labels is not None
    assert read.pair is not None
    for label, text in zip(read.labels.tolist(), read.pair, strict=True):
        assert f" {CHARACTERS[label]} in " in text


def test_packing_glyphs_again_gives_the_same_bytes(folder: Path, tmp_path: Path):
    pack_glyphs(tmp_path, PER_GLYPH)
    for split in ("train", "test"):
        names = sorted(path.name for path in (folder / split).iterdir())
        assert names == sorted(path.name for path in (tmp_path / split).iterdir())
        for name in names:
            assert (folder / split / name).read_bytes() == (tmp_path / split / name).read_bytes()


# ---------------------------------------------------------------------------- refusals


def test_what_cannot_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="per_glyph=0 is below 1; set 1 or more"):
        pack_glyphs(tmp_path / "glyphs", 0)
    monkeypatch.setitem(FONTS, "Gone", ("Gone-Regular", ""))
    with pytest.raises(DataError, match=r"the font .*Gone-Regular\.ttf is missing.*pip install"):
        pack_glyphs(tmp_path / "glyphs", 1)
    assert not list(tmp_path.iterdir())
