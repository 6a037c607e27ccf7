"""Encoders: images [b, C, H, W] in [0, 1] to representations [b, D], and the head on top.

Every row of the output depends on its own row of the input alone: no batch statistics and no
dropout, so that the same rows give the same result however they are shared out over ranks. All
work for b = 0 too, forward and backward, since a rank may have no rows.
"""

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.conditioning import AdaptiveGroupNorm
from dist_contrastive.settings import Settings

GROUPS = 8  # of every GroupNorm; widths are multiples of it


class ResidualEncoderSettings(Settings):
    """A small residual convolutional network."""

    name: Literal["residual"] = "residual"
    widths: tuple[PositiveInt, ...] = Field(default=(16, 32, 64), min_length=1)
    """Channels of each stage; each stage after the first halves height and width. The last is D."""
    blocks: PositiveInt = 1
    """Residual blocks in each stage."""


class ProjectionHeadSettings(Settings):
    """The MLP between the representation and the space in which the loss compares."""

    hidden: PositiveInt = 256
    out: PositiveInt = 64
    """Dimension of the compared embedding."""
    layers: PositiveInt = 2
    """Linear layers; 1 is a plain linear map."""


class ResidualBlock(nn.Module):
    """Pre-activation residual block; `scale` 0.5 halves the map, 2 doubles it, 1 keeps it.

    With a `condition_dim`, its second norm takes a condition [b, condition_dim].
    """

    def __init__(
        self, width_in: int, width_out: int, scale: float = 1, condition_dim: int = 0
    ) -> None:
        super().__init__()
        self.scale = scale
        stride = 2 if scale == 0.5 else 1
        self.norm1 = nn.GroupNorm(GROUPS, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.norm2 = AdaptiveGroupNorm(GROUPS, width_out, condition_dim)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        same = width_in == width_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1, stride)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.scale == 2:
            h, x = (F.interpolate(map_, scale_factor=2, mode="nearest") for map_ in (h, x))
        h = self.conv2(F.silu(self.norm2(self.conv1(h), condition)))
        return self.shortcut(x) + h


class ResidualEncoder(nn.Module):
    """Residual network with GroupNorm and mean pooling: [b, C, H, W] in [0, 1] to [b, D]."""

    def __init__(self, settings: ResidualEncoderSettings, channels: int) -> None:
        super().__init__()
        check_widths(settings.widths)
        self.dim, self.blocks_per_stage = settings.widths[-1], settings.blocks
        self.stem = nn.Conv2d(channels, settings.widths[0], 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        width_in = settings.widths[0]
        for stage, width in enumerate(settings.widths):
            for block in range(settings.blocks):
                first = stage > 0 and block == 0
                blocks.append(ResidualBlock(width_in, width, scale=0.5 if first else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(GROUPS, width_in)

    def forward(self, images: Tensor) -> Tensor:
        h = self.blocks(self.stem(2 * images - 1))
        return F.silu(self.norm(h)).mean(dim=(2, 3))

    def with_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The representation [b, D], and maps [b, C, h, w]: the stem's, then each stage's.

        Maps are what blocks add to, before any norm, as the next block is given them; the last is
        that after the final norm and SiLU, so that its mean is the representation.
        """
        h = self.stem(2 * images - 1)
        maps = [h]
        for number, block in enumerate(self.blocks, start=1):
            h = block(h)
            if number % self.blocks_per_stage == 0:
                maps.append(h)
        maps[-1] = F.silu(self.norm(h))
        return maps[-1].mean(dim=(2, 3)), maps


class ProjectionHead(nn.Module):
    """MLP from representations [b, D] to embeddings [b, out]; the loss normalises them."""

    def __init__(self, settings: ProjectionHeadSettings, dim: int) -> None:
        super().__init__()
        widths = [dim, *[settings.hidden] * (settings.layers - 1), settings.out]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.dim = settings.out

    def forward(self, representations: Tensor) -> Tensor:
        return self.net(representations)


def check_widths(widths: tuple[int, ...]) -> None:
    """Raise ConfigError unless GroupNorm can divide each width."""
    for width in widths:
        if width % GROUPS:
            raise ConfigError(
                f"width {width} of the network must be a multiple of {GROUPS} (its normalisation "
                f"groups): use {max(GROUPS, width // GROUPS * GROUPS)} or "
                f"{(width // GROUPS + 1) * GROUPS}."
            )


def frozen(module: nn.Module) -> nn.Module:
    """`module` in eval mode and without gradients for its parameters; inputs still get theirs."""
    return module.eval().requires_grad_(False)


def representations_of(encoder: nn.Module, inputs: Tensor, chunk: int = 1024) -> Tensor:
    """Representations of all inputs [n, ...] without gradients, `chunk` rows at a time."""
    with torch.no_grad():
        return torch.cat([encoder(part) for part in inputs.split(chunk)])
