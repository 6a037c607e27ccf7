"""Demo data sets of two splits: handwritten digits, and characters rendered in 27 fonts."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dist_contrastive import atomic
from dist_contrastive.data import keyed_random
from dist_contrastive.data.packing.options import ShardBounds, refuse_foreign_files
from dist_contrastive.data.packing.writer import encoded, write_shards
from dist_contrastive.data.progress import map_in_threads
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import index_folder, load_index
from dist_contrastive.data.views import RandomViews, make_view
from dist_contrastive.errors import ConfigError, DataError

_SPLITS = ("train", "test")
_SPLIT_SEED = 0

_Samples = Iterator[dict[str, Any]]


def pack_splits(
    folder: Path | str,
    source: str,
    make_splits: Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]],
    samples_per_shard: int,
) -> dict[str, ShardIndex]:
    """Write FOLDER/train and FOLDER/test as indexed shards, named after their source.

    Args:
        folder: new, empty, or written by an earlier call with this source, which is then replaced.
        source: name of the data set.
        make_splits: gives the samples of "train" and "test", see `write_samples`; called when the
            arguments have been found good.
        samples_per_shard: the last shard of a split may have fewer.

    Returns:
        The indexes by split name, "train" and "test".

    Raises:
        ConfigError: samples_per_shard below 1.
        DataError: the folder holds something else.
    """
    bounds = ShardBounds(samples_per_shard, mib=None)
    folder = Path(folder).resolve()
    own = rf"(train|test)/({re.escape(source)}-\1-\d{{5}}\.tar|index\.npz)?"
    refuse_foreign_files(folder, own, f"packing the {source}")
    with atomic.new_folder(folder) as partial_folder:
        splits = make_splits()
        for split in _SPLITS:
            (partial_folder / split).mkdir()
            with closing(map_in_threads(encoded, splits[split])) as samples:
                write_shards(samples, partial_folder / split, f"{source}-{split}", bounds)
            index_folder(partial_folder / split)
    return {split: load_index(folder / split) for split in _SPLITS}


def split_by_class(labels: NDArray[np.int64], test_samples: int) -> dict[str, NDArray[np.int64]]:
    """Shuffled sample numbers of "train" and "test", the classes in equal proportion in both.

    Shares of the test split are rounded by largest remainder, so they sum to `test_samples`. By
    hand: scikit-learn's train_test_split gives other splits than those of the demo's figures.
    """
    shuffled = keyed_random.keyed_permutation(len(labels), _SPLIT_SEED)
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * (test_samples / len(labels))
    wanted = np.floor(share).astype(np.int64)
    largest = np.argsort(wanted - share, kind="stable")[: test_samples - int(wanted.sum())]
    wanted[largest] += 1
    in_test = np.zeros(len(labels), dtype=bool)
    for label, number in zip(classes.tolist(), wanted.tolist(), strict=True):
        in_test[shuffled[labels[shuffled] == label][:number]] = True
    return {"train": shuffled[~in_test[shuffled]], "test": shuffled[in_test[shuffled]]}


# ---------------------------------------------------------------------------- digits

_DIGITS_TEST = 360  # samples
_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pack_digits(folder: Path | str, samples_per_shard: int = 180) -> dict[str, ShardIndex]:
    """Pack scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, ten classes.

    Writes FOLDER/train (1437 samples) and FOLDER/test (360), split by class in a fixed way,
    shuffled once so that every shard mixes the classes, and indexed. Packing twice gives the same
    bytes. With v in 0..16 an original value, the ink of its pixel, a sample has

        png   8-bit gray, round(v 255 / 16)
        txt   the caption: "a handwritten seven"
        npy   float32 [16], the projection profile: mean of v / 16 over each of the 8 rows, from the
              top, then over each of the 8 columns, from the left
        json  "label": 0..9
              "index": place in the original set
              "slant": mu11 / mu02 of the ink's central second moments, x to the right and y down,
              rounded to 4 digits: pixels that the stroke moves to the right for each pixel down,
              so that it is negative for one that leans to the right, as a slash

    Args, returns and raises: see `pack_splits`; 180 samples a shard make 8 of train and 2 of test.
    """
    return pack_splits(folder, "digits", _digit_splits, samples_per_shard)


def _digit_splits() -> dict[str, _Samples]:
    # Imported late: it takes a second that only packing needs.
    from sklearn.datasets import load_digits

    digits = load_digits()
    values, labels = np.asarray(digits.images), np.asarray(digits.target)
    numbers = split_by_class(labels, _DIGITS_TEST)
    return {split: _digit_samples(values, labels, chosen) for split, chosen in numbers.items()}


def _digit_samples(
    values: NDArray[np.float64], labels: NDArray[np.int64], numbers: NDArray[np.int64]
) -> _Samples:
    for number in numbers.tolist():
        ink, label = values[number], int(labels[number])
        profile = np.concatenate([ink.mean(axis=1), ink.mean(axis=0)]) / 16
        yield {
            "__key__": f"digit-{number:04d}",
            "png": np.rint(ink * (255 / 16)).astype(np.uint8)[None],
            "txt": f"a handwritten {_DIGIT_NAMES[label]}",
            "npy": profile.astype(np.float32),
            "json": {"label": label, "index": number, "slant": slant(ink)},
        }


def slant(ink: NDArray[np.float64]) -> float:
    """mu11 / mu02 of ink [rows, columns]: mean pixels to the right for each pixel down."""
    y, x = np.indices(ink.shape)
    x, y = (axis - (axis * ink).sum() / ink.sum() for axis in (x, y))
    return round(float((x * y * ink).sum() / (y * y * ink).sum()), 4)


# ---------------------------------------------------------------------------- glyphs

CHARACTERS = string.digits + "ABCDEFGHJKLMNPQRSTUVWXYZ"  # in several fonts I and O are like 1 and 0

# Fonts that matplotlib ships, by name: the file, and which of its alphabets for mathematics, if not
# the usual one. Left out are those that lack digits or capitals, or have the shapes of another.
FONTS = {
    "DejaVu Sans": ("DejaVuSans", ""),
    "DejaVu Sans Bold": ("DejaVuSans-Bold", ""),
    "DejaVu Sans Oblique": ("DejaVuSans-Oblique", ""),
    "DejaVu Sans Bold Oblique": ("DejaVuSans-BoldOblique", ""),
    "DejaVu Sans Double-Struck": ("DejaVuSans", "DOUBLE-STRUCK"),
    "DejaVu Sans Mono": ("DejaVuSansMono", ""),
    "DejaVu Sans Mono Bold": ("DejaVuSansMono-Bold", ""),
    "DejaVu Sans Mono Oblique": ("DejaVuSansMono-Oblique", ""),
    "DejaVu Sans Mono Bold Oblique": ("DejaVuSansMono-BoldOblique", ""),
    "DejaVu Serif": ("DejaVuSerif", ""),
    "DejaVu Serif Bold": ("DejaVuSerif-Bold", ""),
    "DejaVu Serif Italic": ("DejaVuSerif-Italic", ""),
    "DejaVu Serif Bold Italic": ("DejaVuSerif-BoldItalic", ""),
    "DejaVu Serif Double-Struck": ("DejaVuSerif", "DOUBLE-STRUCK"),
    "STIX": ("STIXGeneral", ""),
    "STIX Bold": ("STIXGeneralBol", ""),
    "STIX Italic": ("STIXGeneralItalic", ""),
    "STIX Bold Italic": ("STIXGeneralBolIta", ""),
    "STIX Double-Struck": ("STIXGeneral", "DOUBLE-STRUCK"),
    "STIX Sans": ("STIXGeneral", "SANS-SERIF"),
    "STIX Sans Bold": ("STIXGeneral", "SANS-SERIF BOLD"),
    "STIX Mono": ("STIXGeneral", "MONOSPACE"),
    "Computer Modern": ("cmr10", ""),
    "Computer Modern Bold": ("cmb10", ""),
    "Computer Modern Italic": ("cmti10", ""),
    "Computer Modern Sans": ("cmss10", ""),
    "Computer Modern Mono": ("cmtt10", ""),
}

_JITTER_STREAM = 0x6A6974746572  # "jitter": keeps these keys apart from other random numbers
_GLYPH_SIDE = 32  # pixels
_OVERSAMPLING = 4  # glyphs are drawn, and distorted, so many times larger
_CAPITAL_HEIGHT = 17  # pixels, in all fonts
_JITTER = RandomViews.Config(
    rotation_deg=5, shear_deg=5, scale=(0.9, 1.05), aspect=1.05, translate=1 / _GLYPH_SIDE
)


def pack_glyphs(
    folder: Path | str, per_glyph: int = 16, samples_per_shard: int = 1024
) -> dict[str, ShardIndex]:
    """Pack renderings of 34 characters in 27 fonts, 16 jitters of each: 14,688 images.

    Writes FOLDER/train (12,852 samples) and FOLDER/test (1,836), divided at random within each
    class. Both have one distribution, and nearly every held-out image has its glyph in train too,
    jittered otherwise: a generated image is a copy only if it is nearer to one of train than
    held-out images are. Packing twice gives the same bytes. A sample has

        png   8-bit gray, 32 x 32, white ink on black
        txt   the caption: "the letter A in DejaVu Sans Bold", "the digit 7 in STIX Italic"
        json  "label": 0..33, the character's place in `CHARACTERS`
              "character": itself
              "font": one of `FONTS`
              "index": 0..14687, by font, in a font by character, then by jitter

    Capitals are 17 pixels high in all fonts. The ink is in the middle, but for a jitter of size,
    width, place, slant and rotation, see `_JITTER`.

    Args:
        per_glyph: images of each character in each font; an eighth of all is held out.
        folder, samples_per_shard, returns and raises: see `pack_splits`.

    Raises:
        ConfigError: per_glyph below 1.
        DataError: matplotlib, whose fonts these are, has been installed without one.
    """
    if per_glyph < 1:
        raise ConfigError(f"per_glyph={per_glyph} is below 1; set 1 or more")
    return pack_splits(folder, "glyphs", lambda: _glyph_splits(per_glyph), samples_per_shard)


def _glyph_splits(per_glyph: int) -> dict[str, _Samples]:
    images = torch.cat([_font_images(font, per_glyph) for font in FONTS]).numpy()
    labels = np.tile(np.repeat(np.arange(len(CHARACTERS)), per_glyph), len(FONTS))
    numbers = split_by_class(labels, len(images) // 8)
    return {split: _glyph_samples(images, chosen, per_glyph) for split, chosen in numbers.items()}


def _glyph_samples(
    images: NDArray[np.uint8], numbers: NDArray[np.int64], per_glyph: int
) -> _Samples:
    fonts = list(FONTS)
    for number in numbers.tolist():
        place, label = divmod(number // per_glyph, len(CHARACTERS))
        character, font = CHARACTERS[label], fonts[place]
        kind = "digit" if character.isdigit() else "letter"
        yield {
            "__key__": f"glyph-{number:05d}",
            "png": images[number],
            "txt": f"the {kind} {character} in {font}",
            "json": {"label": label, "character": character, "font": font, "index": number},
        }


def _font_images(font: str, per_glyph: int) -> Tensor:
    """All images of a font, uint8 [characters x per_glyph, 1, 32, 32]."""
    large = torch.from_numpy(draw_font(font))[:, None].repeat_interleave(per_glyph, 0) / 255
    first = list(FONTS).index(font) * len(large)
    keys = keyed_random.combine(_JITTER_STREAM, first + torch.arange(len(large)))
    images = avg_pool2d(make_view(large, keys, _JITTER), _OVERSAMPLING)
    return (images * 255).round().to(torch.uint8)


def draw_font(font: str) -> NDArray[np.uint8]:
    """The characters of a font without jitter, four times larger: [characters, 128, 128].

    Raises:
        DataError: matplotlib has been installed without the font.
    """
    file, alphabet = FONTS[font]
    _, top, _, bottom = _open_font(file, 1000).getbbox(character_in("H", alphabet))
    height = _CAPITAL_HEIGHT * _OVERSAMPLING
    opened = _open_font(file, round(1000 * height / (bottom - top)))
    return np.stack([_draw(character_in(character, alphabet), opened) for character in CHARACTERS])


def _draw(text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """White on black, the middle of the ink in the middle."""
    side = _GLYPH_SIDE * _OVERSAMPLING
    image, ink = Image.new("L", (side, side)), Image.new("L", (2 * side, 2 * side))
    ImageDraw.Draw(ink).text((side // 2, side // 2), text, fill=255, font=font)
    ink = ink.crop(ink.getbbox())
    image.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.array(image)


def _open_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # imported late: only packing needs it

    path = Path(get_data_path()) / "fonts" / "ttf" / f"{file}.ttf"
    if not path.exists():
        raise DataError(
            f"the font {path} is missing, which matplotlib ships; install matplotlib again: "
            f"pip install --force-reinstall matplotlib"
        )
    # Pillow's own layout: the other one need not be there, and moves glyphs.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def character_in(character: str, alphabet: str) -> str:
    """Character of a mathematical alphabet."""
    if not alphabet:
        return character
    kind = "DIGIT" if character.isdigit() else "CAPITAL"
    name = f"{alphabet} {kind} {unicodedata.name(character).split()[-1]}"
    try:
        return unicodedata.lookup(f"MATHEMATICAL {name}")
    except KeyError:  # a few are older than the mathematical alphabets, as the C of numbers
        return unicodedata.lookup(name)
