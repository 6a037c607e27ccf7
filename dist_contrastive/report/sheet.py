"""Contact sheet of a data set: pictures of some samples with keys, labels and captions.

Drawn with Pillow, which places pixels one by one and draws any text; matplotlib resamples images,
and reads $ as mathematics.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_contrastive.data.shards.encoding import TEXT_FIELDS
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.inspect import spread
from dist_contrastive.errors import DataError, UnreachableError
from dist_contrastive.report.pictures import BLUE, GREY

_BOX = 168  # pixels, both sides of what holds a picture
_GAP = 16
_LINE = 17  # of text
_TITLE = 38
_CAPTION_LINES = 2
_BACKGROUND = "#f1f2f4"  # of a box: shows how far the picture reaches
_INK, _PALE, _RED = "#16181d", "#4b5058", "#b42318"
_PAD = 8  # within a box


class _Cell(NamedTuple):
    picture: Image.Image
    key: str
    label: str
    caption: list[str]  # lines


def sample_sheet(
    index: ShardIndex, path: Path | str, title: str = "", rows: int = 5, columns: int = 8
) -> int:
    """Draw samples spread evenly over a data set, each with its key, label and caption.

    Of a sample its first image is drawn, in its aspect ratio; if it has none its first array, as a
    curve or as shades of gray; or else its text. The label is `cls`, or "label" in `json`; the
    caption is `txt`, or `text` or `caption`. What cannot be read says so.

    Args:
        path: PNG to write.
        title: above the sheet.
        rows, columns: of it; fewer if the data set has fewer samples.

    Returns:
        How many samples it shows.

    Raises:
        UnreachableError: a server does not answer.
    """
    cells = [_cell(index, number) for number in spread(len(index), rows * columns)]
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    has_label = any(cell.label for cell in cells)
    lines = 1 + has_label + max(len(cell.caption) for cell in cells)
    width, height = _BOX + _GAP, _BOX + 6 + lines * _LINE + _GAP
    top = _TITLE if title else _GAP
    sheet = Image.new("RGB", (_GAP + columns * width, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2 + 2), _fit(title, 15, sheet.width - 2 * _GAP), _INK, _font(15))
    for place, cell in enumerate(cells):
        x, y = _GAP + place % columns * width, top + place // columns * height
        sheet.paste(cell.picture, (x, y))
        texts = [(cell.key, _INK), *([(cell.label, BLUE)] if has_label else [])]
        texts += [(line, _PALE) for line in cell.caption]
        for line, (text, colour) in enumerate(texts):
            draw.text((x, y + _BOX + 4 + line * _LINE), text, colour, _font(12))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return len(cells)


def _cell(index: ShardIndex, number: int) -> _Cell:
    try:
        sample = index.read(number)
    except UnreachableError:
        raise
    except DataError as error:
        return _Cell(_text_box(str(error), _RED), f"sample {number}", "", [])
    caption = _text(sample)
    picture = _picture(sample)
    return _Cell(
        picture or _text_box(_in_words(sample), _INK),
        _fit(sample["__key__"], 12, _BOX, keep_end=True),
        _fit(_label(sample, index.classes), 12, _BOX),
        _wrap(caption, 12, _BOX, _CAPTION_LINES) if picture and caption else [],
    )


def _text(sample: Mapping[str, Any]) -> str | None:
    return next((sample[x] for x in TEXT_FIELDS if isinstance(sample.get(x), str)), None)


def _label(sample: Mapping[str, Any], names: Mapping[int, str]) -> str:
    values = sample.get("json")
    label = sample.get("cls", values.get("label") if isinstance(values, dict) else None)
    name = names.get(label) if isinstance(label, int) else None
    return "" if label is None else f"label {label}" + (f" {name}" if name else "")


def _picture(sample: Mapping[str, Any]) -> Image.Image | None:
    """Picture of the first image, or else of the first array that can be drawn."""
    for value in sample.values():
        if isinstance(value, Tensor):
            pixels = value.permute(1, 2, 0).numpy()
            return _image_box(pixels if pixels.dtype == np.uint8 else _as_gray(pixels))
    for value in sample.values():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            if value.ndim == 1 and value.size > 2:
                return _curve_box(value)
            if value.ndim == 2 and min(value.shape) > 1:
                return _image_box(_as_gray(value)[..., None])
    return None


def _in_words(sample: Mapping[str, Any]) -> str:
    """Text of a sample that has no picture, or else its fields in words."""
    if (text := _text(sample)) is not None:
        return text
    lines = []
    for name, value in sample.items():
        if isinstance(value, bytes):
            lines.append(f"{name}: {len(value):,} bytes")
        elif isinstance(value, np.ndarray) and value.size > 6:
            lines.append(f"{name}: {value.dtype} {' x '.join(map(str, value.shape))}")
        elif isinstance(value, np.ndarray):
            numbers = value.flatten().tolist()
            shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in numbers)
            lines.append(f"{name}: {', '.join(shown)}")
        elif name != "__key__":
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- boxes


def _box() -> Image.Image:
    return Image.new("RGB", (_BOX, _BOX), _BACKGROUND)


def _image_box(pixels: np.ndarray) -> Image.Image:
    """An image [H, W, 1 or 3] as large as fits: small ones in whole pixels, large ones smoothed."""
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = min(_BOX / image.width, _BOX / image.height)
    scale = int(scale) if scale >= 2 else scale
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    image, box = image.resize(size, how).convert("RGB"), _box()
    box.paste(image, ((_BOX - image.width) // 2, (_BOX - image.height) // 2))
    return box


def _as_gray(values: np.ndarray) -> np.ndarray:
    """Grey levels: black at the minimum of an array, white at its maximum."""
    finite = _finite(values)
    low, high = finite.min(), finite.max()
    return ((finite - low) / max(high - low, 1e-300) * 255).round().astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    """Numbers with 0 in the place of NaN and infinity."""
    numbers = values.astype(np.float64)
    return np.where(np.abs(numbers) < 1e300, numbers, 0)


def _curve_box(values: np.ndarray) -> Image.Image:
    """Curve of a vector over its indices, with a line at zero, its minimum and its maximum."""
    finite = _finite(values)
    low, high = finite.min(), finite.max()
    box = _box()
    draw = ImageDraw.Draw(box)
    top, bottom = _PAD + _LINE, _BOX - _PAD - _LINE
    heights = bottom - (finite - low) / max(high - low, 1e-300) * (bottom - top)
    places = np.linspace(_PAD, _BOX - _PAD, len(finite))
    if low < 0 < high:
        zero = bottom + low / (high - low) * (bottom - top)
        draw.line([(_PAD, zero), (_BOX - _PAD, zero)], fill="#c9ccd2")
    draw.line(list(zip(places, heights, strict=True)), fill=BLUE, width=2, joint="curve")
    draw.text((_PAD, 4), f"{high:.4g}", GREY, _font(11))
    draw.text((_PAD, _BOX - _LINE - 2), f"{low:.4g}", GREY, _font(11))
    return box


def _text_box(text: str, colour: str) -> Image.Image:
    box = _box()
    draw = ImageDraw.Draw(box)
    for line, words in enumerate(_wrap(text, 12, _BOX - 2 * _PAD, (_BOX - _PAD) // _LINE)):
        draw.text((_PAD, _PAD + line * _LINE), words, colour, _font(12))
    return box


# ---------------------------------------------------------------------------- text


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # matplotlib ships it
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _fit(text: str, size: int, width: int, keep_end: bool = False) -> str:
    """One line, cut where it is wider than so many pixels."""
    text = " ".join(text.split())
    length = _longest(len(text), lambda n: _cut(text, n, keep_end), size, width)
    return _cut(text, length, keep_end)


def _cut(text: str, length: int, keep_end: bool) -> str:
    if length >= len(text):
        return text
    return f"…{text[len(text) - length :]}" if keep_end else f"{text[:length].rstrip()}…"


def _longest(most: int, cut: Callable[[int], str], size: int, width: int) -> int:
    """Largest n up to `most` for which cut(n) fits, by bisection; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(cut(middle), size, width) else (low, middle - 1)
    return low


def _fits(text: str, size: int, width: int) -> bool:
    return _font(size).getlength(text) <= width


def _wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """Up to so many lines, broken between words where that goes; the last one may be cut."""
    wrapped, rest = list[str](), text.strip()
    while rest and len(wrapped) < lines - 1:
        line, rest = _first_line(rest, size, width)
        wrapped.append(line)
    return [*wrapped, _fit(rest, size, width)] if rest else wrapped


def _first_line(text: str, size: int, width: int) -> tuple[str, str]:
    """First line of a text as far as it fits, and the rest."""
    line, _, after = text.partition("\n")
    if _fits(line, size, width):
        return line.rstrip(), after.lstrip()
    length = max(1, _longest(len(line), lambda n: line[:n], size, width))
    space = line.rfind(" ", 1, length + 1)
    if space > 0:
        length = space
    return text[:length].rstrip(), text[length:].lstrip()
