"""Digits and capitals rendered in many fonts as a data set: larger than the digits, and harder."""

import string
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dist_contrastive.data import keyed_random
from dist_contrastive.data.packing.splits import pack_splits, split_by_class
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.views import ViewSettings, make_view
from dist_contrastive.errors import ConfigError, DataError

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
_SIDE = 32  # pixels
_OVERSAMPLING = 4  # glyphs are drawn, and distorted, so many times larger
_CAPITAL_HEIGHT = 17  # pixels, in all fonts
_JITTER = ViewSettings(
    rotation_deg=5, shear_deg=5, scale=(0.9, 1.05), aspect=1.05, translate=1 / _SIDE
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
    return pack_splits(folder, "glyphs", lambda: _splits(per_glyph), samples_per_shard)


def _splits(per_glyph: int) -> dict[str, Iterator[dict[str, Any]]]:
    images = torch.cat([_images(font, per_glyph) for font in FONTS]).numpy()
    labels = np.tile(np.repeat(np.arange(len(CHARACTERS)), per_glyph), len(FONTS))
    numbers = split_by_class(labels, len(images) // 8)
    return {split: _samples(images, chosen, per_glyph) for split, chosen in numbers.items()}


def _samples(
    images: NDArray[np.uint8], numbers: NDArray[np.int64], per_glyph: int
) -> Iterator[dict[str, Any]]:
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


def _images(font: str, per_glyph: int) -> Tensor:
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
    _, top, _, bottom = _open_font(file, 1000).getbbox(_code("H", alphabet))
    height = _CAPITAL_HEIGHT * _OVERSAMPLING
    opened = _open_font(file, round(1000 * height / (bottom - top)))
    return np.stack([_draw(_code(character, alphabet), opened) for character in CHARACTERS])


def _draw(text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """White on black, the middle of the ink in the middle."""
    side = _SIDE * _OVERSAMPLING
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


def _code(character: str, alphabet: str) -> str:
    """The character as a mathematical alphabet has it."""
    if not alphabet:
        return character
    kind = "DIGIT" if character.isdigit() else "CAPITAL"
    name = f"{alphabet} {kind} {unicodedata.name(character).split()[-1]}"
    try:
        return unicodedata.lookup(f"MATHEMATICAL {name}")
    except KeyError:  # a few are older than the mathematical alphabets, as the C of numbers
        return unicodedata.lookup(name)
