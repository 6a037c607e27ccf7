"""Images of many sizes and colours made alike, when they are read."""

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_MAX_ASPECT = 8  # a strip that is longer is cut before it is scaled, not after: memory


def is_image(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a decoded image: uint8 [C, H, W]."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.dtype == torch.uint8


def fit_image(image: Tensor, size: int | None, channels: int | None) -> Tensor:
    """An image [C, H, W], uint8, as [channels, size, size].

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
        return (image * weights).sum(0, keepdim=True).round().to(torch.uint8)
    return image


def _square(image: Tensor, size: int) -> Tensor:
    short = min(image.shape[1:])
    image = _middle(image, *(min(side, _MAX_ASPECT * short) for side in image.shape[1:]))
    height, width = image.shape[1:]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (height, width)]
    scaled = interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
    return _middle(scaled, size, size).contiguous()


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
