"""One-step generators: noise, and optionally a class, to an image in a single pass."""

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.encoders import GROUPS, ResidualBlock, check_widths
from dist_contrastive.settings import Settings


class ConvGeneratorSettings(Settings):
    """A small residual convolutional generator."""

    name: Literal["conv"] = "conv"
    noise_dim: PositiveInt = 16
    class_dim: PositiveInt = 32
    """Dimension of the class embedding; unused without classes."""
    width: PositiveInt = 16
    """Channels at full resolution; each halving of the resolution doubles them."""
    doublings: NonNegativeInt = 2
    """How often the map grows: an H x W image starts as H/2^doublings x W/2^doublings."""
    blocks: PositiveInt = 1
    """Residual blocks at each resolution."""


class ConvGenerator(nn.Module):
    """Noise [b, noise_dim] and labels int64 [b] to images [b, C, H, W] in (0, 1).

    Works for b = 0. Like the encoders it has no batch statistics and no dropout: an image
    depends on its own noise and label alone.

    Args:
        settings: sizes.
        channels, image_size: shape of the images.
        num_classes: labels are 0 ... num_classes - 1; None builds an unconditional generator.
    Raises:
        ConfigError: the image size is not divisible by 2^doublings, or a width by the groups.
    """

    def __init__(
        self,
        settings: ConvGeneratorSettings,
        channels: int,
        image_size: tuple[int, int],
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_widths((settings.width,))
        self.start = _start_size(image_size, settings.doublings)
        self.noise_dim, self.num_classes = settings.noise_dim, num_classes
        dim = settings.noise_dim + (settings.class_dim if num_classes else 0)
        width = settings.width * 2**settings.doublings
        self.class_embedding = (
            nn.Embedding(num_classes, settings.class_dim) if num_classes else None
        )
        self.start_width = width
        self.project = nn.Linear(dim, width * self.start[0] * self.start[1])
        self.blocks = nn.Sequential(*_growing_blocks(settings, width))
        self.norm = nn.GroupNorm(GROUPS, settings.width)
        self.to_image = nn.Conv2d(settings.width, channels, 3, 1, 1)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if (labels is None) != (self.class_embedding is None):
            wanted = "needs" if labels is None else "was built without"
            raise ConfigError(
                f"this generator {wanted} class labels (num_classes is {self.num_classes}): "
                "set num_classes to match the call."
            )
        if self.class_embedding is not None:
            noise = torch.cat([noise, self.class_embedding(labels)], dim=1)
        h = self.project(noise).view(len(noise), self.start_width, *self.start)
        return torch.sigmoid(self.to_image(F.silu(self.norm(self.blocks(h)))))


def _growing_blocks(settings: ConvGeneratorSettings, width: int) -> list[nn.Module]:
    """Residual blocks from the start resolution to the full one, halving the width each time."""
    blocks: list[nn.Module] = [ResidualBlock(width, width) for _ in range(settings.blocks)]
    for _ in range(settings.doublings):
        blocks.append(ResidualBlock(width, width // 2, scale=2))
        width //= 2
        blocks += [ResidualBlock(width, width) for _ in range(settings.blocks - 1)]
    return blocks


def _start_size(image_size: tuple[int, int], doublings: int) -> tuple[int, int]:
    factor = 2**doublings
    height, width = image_size
    if height % factor or width % factor:
        most = next(k for k in range(doublings, -1, -1) if not (height % 2**k or width % 2**k))
        raise ConfigError(
            f"images of {height}x{width} cannot be grown in {doublings} doublings, which need "
            f"multiples of {factor}: set the generator's doublings to at most {most}."
        )
    return height // factor, width // factor
