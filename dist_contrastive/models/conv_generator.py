"""A one-step generator that grows an image from a small map."""

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.models.conditioning import ConditionalGenerator, halved
from dist_contrastive.models.encoders import GROUPS, ResidualBlock, check_widths
from dist_contrastive.settings import Settings


class ConvGeneratorSettings(Settings):
    """A small residual convolutional generator."""

    name: Literal["conv"] = "conv"
    noise_dim: PositiveInt = 16
    class_dim: PositiveInt = 32
    """Dimension of the embedding of class and guidance; unused without both."""
    width: PositiveInt = 16
    """Channels at full resolution; each halving of the resolution doubles them."""
    doublings: NonNegativeInt = 2
    """How often the map grows: an H x W image starts as H/2^doublings x W/2^doublings."""
    blocks: PositiveInt = 1
    """Residual blocks at each resolution."""


class ConvGenerator(ConditionalGenerator):
    """Noise and condition, side by side, to images [b, C, H, W] in (0, 1).

    Args:
        settings: sizes.
        image_shape: (channels, height, width).
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: the image size is not divisible by 2^doublings, or a width by the groups.
    """

    def __init__(
        self,
        settings: ConvGeneratorSettings,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__(settings.noise_dim, settings.class_dim, num_classes, guided)
        check_widths((settings.width,))
        channels, height, image_width = image_shape
        self.start = halved((height, image_width), settings.doublings, "doublings")
        self.start_width = width = settings.width * 2**settings.doublings
        inputs = self.noise_dim + self.condition_dim
        self.project = nn.Linear(inputs, width * self.start[0] * self.start[1])
        self.blocks = nn.Sequential(*_growing_blocks(settings, width))
        self.norm = nn.GroupNorm(GROUPS, settings.width)
        self.to_image = nn.Conv2d(settings.width, channels, 3, 1, 1)

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        h = self.project(torch.cat([noise, condition], dim=1))
        h = self.blocks(h.view(len(noise), self.start_width, *self.start))
        return torch.sigmoid(self.to_image(F.silu(self.norm(h))))


def _growing_blocks(settings: ConvGeneratorSettings, width: int) -> list[nn.Module]:
    """Residual blocks from the start resolution to the full one, halving the width each time."""
    blocks: list[nn.Module] = [ResidualBlock(width, width) for _ in range(settings.blocks)]
    for _ in range(settings.doublings):
        blocks.append(ResidualBlock(width, width // 2, scale=2))
        width //= 2
        blocks += [ResidualBlock(width, width) for _ in range(settings.blocks - 1)]
    return blocks
