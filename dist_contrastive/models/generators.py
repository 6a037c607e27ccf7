"""One-step generators: noise, a class and a guidance strength to a sample."""

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.layers import GROUPS, AdaptiveGroupNorm, ResidualBlock, check_widths
from dist_contrastive.settings import ComponentSettings, Count, Size


class ConditionalGenerator(nn.Module, ABC):
    """Noise [b, noise_dim], with a class and a guidance strength where built for them, to samples.

    A sample depends on its own noise, label and strength alone: no batch statistics, no dropout.
    Works for b = 0, forward and backward.

    Args:
        noise_dim: numbers of Gaussian noise behind each sample.
        condition_dim: of the vector that stands for class and strength, the sum of their
            embeddings; `self.condition_dim` is 0 for a generator with neither.
        num_classes: labels are 0 ... num_classes - 1; None: the call takes none.
        guided: the call takes a strength.
    """

    class Config(ComponentSettings):
        """Settings of a generator.

        A subclass of the generator is made as ``Class(config, sample_shape, num_classes, guided)``.
        """

    only_images: ClassVar[bool] = False
    """Whether samples must be (channels, height, width)."""

    def __init__(
        self, noise_dim: int, condition_dim: int, num_classes: int | None, guided: bool
    ) -> None:
        super().__init__()
        self.noise_dim, self.num_classes, self.guided = noise_dim, num_classes, guided
        self.condition_dim = condition_dim if num_classes or guided else 0
        self.class_embedding = nn.Embedding(num_classes, condition_dim) if num_classes else None
        self.guidance_embedding = _guidance_embedding(condition_dim) if guided else None

    def forward(
        self, noise: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Samples [b, ...].

        Args:
            noise: float [b, noise_dim], standard normal.
            labels: int64 [b].
            guidance: float [b], strength alpha of 1 (none) or more, of which the logarithm is
                embedded. Values are not checked: that would wait for the device in each step.
        Raises:
            ConfigError: labels or guidance that are missing, not wanted, or not one for each row.
        """
        return self.draw(noise, self._condition(noise, labels, guidance))

    @abstractmethod
    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        """Samples [b, ...] of noise [b, noise_dim] and condition [b, self.condition_dim]."""

    def _condition(self, noise: Tensor, labels: Tensor | None, guidance: Tensor | None) -> Tensor:
        rows = len(noise)
        _check("class labels", labels, rows, "num_classes", self.num_classes)
        _check("guidance strengths", guidance, rows, "guided", self.guided)
        condition = noise.new_zeros(rows, self.condition_dim)
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(labels)
        if self.guidance_embedding is not None and guidance is not None:
            logarithm = guidance.to(noise.dtype).log().unsqueeze(1)
            condition = condition + self.guidance_embedding(logarithm)
        return condition


class ConvGenerator(ConditionalGenerator):
    """Noise and condition, side by side, to images [b, C, H, W] in (0, 1).

    Args:
        sample_shape: (channels, height, width).
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: the image size is not divisible by 2^doublings, or a width by the groups.
    """

    class Config(ConditionalGenerator.Config):
        """A small residual convolutional generator."""

        name: Literal["conv"] = "conv"
        noise_dim: Size = 16
        """Numbers of Gaussian noise behind a sample."""
        class_dim: Size = 32
        """Dimension of the embedding of class and guidance; unused without both."""
        width: Size = 16
        """Channels at full resolution; each halving of the resolution doubles them."""
        doublings: int = Field(default=2, ge=0, le=16)
        """How often the map grows: an H x W image starts as H/2^doublings x W/2^doublings."""
        blocks: Count = 1
        """Residual blocks at each resolution."""

    only_images = True

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__(config.noise_dim, config.class_dim, num_classes, guided)
        check_widths((config.width,))
        channels, height, image_width = sample_shape
        self.start = halved((height, image_width), config.doublings, "doublings")
        self.start_width = width = config.width * 2**config.doublings
        inputs = self.noise_dim + self.condition_dim
        self.project = nn.Linear(inputs, width * self.start[0] * self.start[1])
        self.blocks = nn.Sequential(*_growing_blocks(config, width))
        self.norm = nn.GroupNorm(GROUPS, config.width)
        self.to_image = nn.Conv2d(config.width, channels, 3, 1, 1)

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        h = self.project(torch.cat([noise, condition], dim=1))
        h = self.blocks(h.view(len(noise), self.start_width, *self.start))
        return torch.sigmoid(self.to_image(F.silu(self.norm(h))))


def _growing_blocks(config: ConvGenerator.Config, width: int) -> list[nn.Module]:
    """Residual blocks from the start resolution to the full one, halving the width each time."""
    blocks: list[nn.Module] = [ResidualBlock(width, width) for _ in range(config.blocks)]
    for _ in range(config.doublings):
        blocks.append(ResidualBlock(width, width // 2, scale=2))
        width //= 2
        blocks += [ResidualBlock(width, width) for _ in range(config.blocks - 1)]
    return blocks


class UNetGenerator(ConditionalGenerator):
    """Noise images [b, noise_channels * H * W] to images [b, C, H, W] in (0, 1).

    The decoder is the encoder's mirror: each of its blocks reads what the one before it made
    beside the map of its counterpart. Class and guidance scale and shift the second GroupNorm of
    every residual block, and the last.

    Args:
        sample_shape: (channels, height, width).
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: the image size cannot be halved so often, or a width is not a multiple of
            the groups.
    References:
        Ronneberger et al. 2015, arXiv 1505.04597; Dhariwal & Nichol 2021, arXiv 2105.05233.
    """

    class Config(ConditionalGenerator.Config):
        """A small convolutional U-Net."""

        name: Literal["unet"] = "unet"
        noise_channels: Size = 1
        """Channels of the noise image, which has the images' height and width."""
        widths: tuple[Size, ...] = Field(default=(32, 64, 128), min_length=1)
        """Channels of each level; each level after the first halves height and width."""
        blocks: Count = 1
        """Residual blocks in each level, on the way down and on the way up."""
        condition_dim: Size = 64
        """Dimension of the embedding of class and guidance."""

    only_images = True

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        channels, height, width = sample_shape
        noise_dim = config.noise_channels * height * width
        super().__init__(noise_dim, config.condition_dim, num_classes, guided)
        self.noise_shape = (config.noise_channels, height, width)
        widths = config.widths
        check_widths(widths)
        halved((height, width), len(widths) - 1, "widths after the first")
        self.stem = nn.Conv2d(config.noise_channels, widths[0], 3, 1, 1)
        down, up = [], []
        width_in = widths[0]
        for level, width in enumerate(widths):
            for block in range(config.blocks):
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


class MlpGenerator(ConditionalGenerator):
    """Noise and condition, side by side, to samples [b, *sample_shape] without bounds.

    Args:
        sample_shape: any; images are arrays to it.
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: a sample of that shape holds nothing.
    """

    class Config(ConditionalGenerator.Config):
        """An MLP with SiLU."""

        name: Literal["mlp"] = "mlp"
        noise_dim: Size = 32
        """Numbers of Gaussian noise behind a sample."""
        class_dim: Size = 32
        """Dimension of the embedding of class and guidance; unused without both."""
        hidden: Size = 256
        """Dimension of the hidden layers."""
        layers: Count = 4
        """Linear layers; 1 is a plain linear map."""

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__(config.noise_dim, config.class_dim, num_classes, guided)
        numbers = math.prod(sample_shape)
        if numbers < 1:
            raise ConfigError(
                f"samples of shape {sample_shape} hold {numbers} numbers, and a generator needs 1 "
                "or more: give the shape of one sample, such as (2,)."
            )
        self.sample_shape = sample_shape
        hidden = [config.hidden] * (config.layers - 1)
        widths = [self.noise_dim + self.condition_dim, *hidden, numbers]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        points = self.net(torch.cat([noise, condition], dim=1))
        return points.view(len(noise), *self.sample_shape)


def _guidance_embedding(dim: int) -> nn.Module:
    """From log alpha [b, 1] to [b, dim]: at the start about as large as a class's embedding."""
    out = nn.Linear(dim, dim)
    nn.init.normal_(out.weight, std=3 / dim**0.5)
    return nn.Sequential(nn.Linear(1, dim), nn.SiLU(), out)


def halved(size: tuple[int, int], times: int, steps: str) -> tuple[int, int]:
    """Height and width halved so often; ConfigError, with `steps` for what halves, if they cannot
    be."""
    factor = 2**times
    height, width = size
    if height % factor or width % factor:
        most = next(k for k in range(times, -1, -1) if not (height % 2**k or width % 2**k))
        raise ConfigError(
            f"images of {height}x{width} do not fit the generator's {times} {steps}, which need "
            f"multiples of {factor}: use at most {most}."
        )
    return height // factor, width // factor


def _check(
    what: str, given: Tensor | None, rows: int, setting: str, value: int | bool | None
) -> None:
    if (given is not None) != bool(value):
        needs = "needs" if given is None else "was built without"
        raise ConfigError(
            f"this generator {needs} {what} ({setting} is {value}): set {setting} to match the "
            "call."
        )
    if given is not None and given.shape != (rows,):
        raise ConfigError(
            f"{what} of shape {tuple(given.shape)} do not fit {rows} rows of noise: give one for "
            "each row."
        )
