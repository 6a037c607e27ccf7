"""Images and arrays as tasks take them: in [0, 1], of one size, in 1 or 3 channels."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dist_contrastive.data.shards.encoding import IMAGE_EXTENSIONS
from dist_contrastive.errors import DataError

_MAX_ASPECT = 8  # a strip that is longer is cut before it is scaled, not after: memory
_WHITE_16 = 65535  # value of white in 16 bits
_PIXELS = (torch.uint8, torch.uint16)
_ARRAYS = (np.uint8, np.uint16)
_CHANNELS = (1, 3)


def is_image(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a decoded image: [C, H, W] of 8 or 16 bits."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.dtype in _PIXELS


def as_image(value: Any) -> Tensor | None:
    """A decoded image, or an array of 8 or 16 bits [C, H, W] or [H, W, C] with C = 1 or 3, as
    [C, H, W]; None of all else."""
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype in _ARRAYS:
        is_last = value.shape[2] in _CHANNELS and value.shape[0] not in _CHANNELS
        value = torch.from_numpy(np.moveaxis(value, 2, 0).copy() if is_last else value)
    return value if is_image(value) else None


def are_images(column: Any) -> TypeGuard[Tensor]:
    """Whether a column of a batch is images: [b, C, H, W] of 8 or 16 bits."""
    return isinstance(column, Tensor) and column.dim() == 4 and column.dtype in _PIXELS


def are_arrays(column: Any) -> TypeGuard[Tensor]:
    """Whether a column of a batch is arrays of numbers: [b, ...]."""
    return isinstance(column, Tensor) and column.dim() > 1 and not column.is_complex()


def check_images(
    column: Any, keys: Sequence[str], name: str, size: int | None, channels: int | None
) -> None:
    """Refuse a column of a batch that is no images or arrays of one shape, or of which the arrays
    are not as large as images shall be.

    Raises:
        DataError: see above.
    """
    for key, value in zip(keys, column, strict=True) if isinstance(column, list) else ():
        if not hasattr(value, "shape"):
            raise DataError(
                f"sample {key} holds {type(value).__name__} in {name!r}, and no image or array; "
                f"name another field as data.image, or store images as one of "
                f"{', '.join(IMAGE_EXTENSIONS)}"
            )
    if not are_arrays(column):
        raise DataError(
            f"field {name!r} does not hold images of one size: set data.image_size and "
            f"data.image_channels, pack them with equal height, width and channels, or name "
            f"another field as data.image"
        )
    shape = list(column.shape[1:])
    wanted = [channels or shape[0], *((size, size) if size else shape[1:])]
    if not are_images(column) and shape != wanted:
        raise DataError(
            f"field {name!r} holds arrays of shape {shape}, and data.image_size and "
            f"data.image_channels ask for {wanted}; store images or arrays of uint8, which are "
            f"scaled, arrays of that shape, or set both to null"
        )


def as_float(column: Tensor, ends: tuple[float, float] | None = None) -> Tensor:
    """Images or arrays in float32: images in [0, 1], arrays as they are.

    Args:
        ends: values of images of 16 bits, and of arrays, that become 0 and 1; what is beyond them
            becomes these too. None: 0 and 65535 of images.
    """
    if are_images(column) and column.dtype == torch.uint8:
        return column.float() / 255
    if are_images(column) and ends is None:
        ends = (0, _WHITE_16)
    if ends is None:
        return column.float()
    low, high = ends
    return ((column.double() - low) / (high - low)).clamp(0, 1).float()


def fit_image(image: Tensor, size: int | None, channels: int | None) -> Tensor:
    """An image [C, H, W] of 8 or 16 bits as [channels, size, size].

    Args:
        size: the shorter side is scaled to it (bilinear, antialiased), and the longer side is cut
            in the middle; None leaves height and width.
        channels: 1: gray by the weights of ITU-R 601, as Pillow's mode L; 3: gray repeated; None
            leaves them.
    """
    if size is not None and image.shape[1:] != (size, size):
        image = _square(image, size)
    if channels == 3 and len(image) == 1:
        return image.expand(3, -1, -1).contiguous()
    if channels == 1 and len(image) == 3:
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        return (image.float() * weights).sum(0, keepdim=True).round().to(image.dtype)
    return image


def _square(image: Tensor, size: int) -> Tensor:
    short = min(image.shape[1:])
    image = _middle(image, *(min(side, _MAX_ASPECT * short) for side in image.shape[1:]))
    height, width = image.shape[1:]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (height, width)]
    wide = image.dtype == torch.uint16  # which torch cannot scale
    pixels = image.float() if wide else image
    scaled = interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0]
    if wide:
        scaled = scaled.round().clamp(0, _WHITE_16).to(torch.uint16)
    return _middle(scaled, size, size).contiguous()


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
