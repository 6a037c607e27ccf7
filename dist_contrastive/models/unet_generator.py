"""A one-step generator that turns a noise image into an image: encoder, decoder, skips."""

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.models.conditioning import AdaptiveGroupNorm, ConditionalGenerator, halved
from dist_contrastive.models.encoders import GROUPS, ResidualBlock, check_widths
from dist_contrastive.settings import Settings


class UNetGeneratorSettings(Settings):
    """A small convolutional U-Net."""

    name: Literal["unet"] = "unet"
    noise_channels: PositiveInt = 1
    """Channels of the noise image, which has the images' height and width."""
    widths: tuple[PositiveInt, ...] = Field(default=(32, 64, 128), min_length=1)
    """Channels of each level; each level after the first halves height and width."""
    blocks: PositiveInt = 1
    """Residual blocks in each level, on the way down and on the way up."""
    condition_dim: PositiveInt = 64
    """Dimension of the embedding of class and guidance."""


class UNetGenerator(ConditionalGenerator):
    """Noise images [b, noise_channels * H * W] to images [b, C, H, W] in (0, 1).

    The decoder is the encoder's mirror: each of its blocks reads what the one before it made
    beside the map of its counterpart. Class and guidance scale and shift the second GroupNorm of
    every residual block, and the last.

    Args:
        settings: sizes.
        image_shape: (channels, height, width).
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: the image size cannot be halved so often, or a width is not a multiple of
            the groups.
    References:
        Ronneberger et al. 2015, arXiv 1505.04597; Dhariwal & Nichol 2021, arXiv 2105.05233.
    """

    def __init__(
        self,
        settings: UNetGeneratorSettings,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        channels, height, width = image_shape
        noise_dim = settings.noise_channels * height * width
        super().__init__(noise_dim, settings.condition_dim, num_classes, guided)
        self.noise_shape = (settings.noise_channels, height, width)
        widths = settings.widths
        check_widths(widths)
        halved((height, width), len(widths) - 1, "widths after the first")
        self.stem = nn.Conv2d(settings.noise_channels, widths[0], 3, 1, 1)
        down, up = [], []
        width_in = widths[0]
        for level, width in enumerate(widths):
            for block in range(settings.blocks):
                halves = level > 0 and block == 0
                down.append(self._block(width_in, width, 0.5 if halves else 1))
                up.append(self._block(2 * width, width_in, 2 if halves else 1))
                width_in = width
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(reversed(up))
        self.middle = self._block(width_in, width_in, 1)
        self.norm = AdaptiveGroupNorm(GROUPS, widths[0], self.condition_dim)
        self.to_image = nn.Conv2d(widths[0], channels, 3, 1, 1)

    def _block(self, width_in: int, width_out: int, scale: float) -> ResidualBlock:
        return ResidualBlock(width_in, width_out, scale, self.condition_dim)

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        h = self.stem(noise.view(len(noise), *self.noise_shape))
        skips = []
        for block in self.down:
            h = block(h, condition)
            skips.append(h)
        h = self.middle(h, condition)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), condition)
        return torch.sigmoid(self.to_image(F.silu(self.norm(h, condition))))
