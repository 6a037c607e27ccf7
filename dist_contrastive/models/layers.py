"""Layers that encoders and generators share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError

GROUPS = 8  # of every GroupNorm; widths are multiples of it


class Modulation(nn.Module):
    """`parts` vectors [b, width] made from a condition, to scale, shift or gate a layer's channels.

    All zero at first: multiply by 1 + scale. With a condition of dimension 0 they are learned
    constants.

    References:
        Peebles & Xie 2022, arXiv 2212.09748 (adaLN-Zero).
    """

    def __init__(self, condition_dim: int, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.bias = nn.Parameter(torch.zeros(parts * width))
        self.weight = (
            nn.Parameter(torch.zeros(parts * width, condition_dim)) if condition_dim else None
        )

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        values = self.bias.expand(len(condition), -1)
        if self.weight is not None:
            values = values + F.linear(F.silu(condition), self.weight)
        return values.chunk(self.parts, dim=1)


class AdaptiveGroupNorm(nn.GroupNorm):
    """GroupNorm whose output a condition [b, condition_dim] scales and shifts, channel by channel.

    With a condition of dimension 0 it is a GroupNorm.
    """

    def __init__(self, groups: int, width: int, condition_dim: int) -> None:
        super().__init__(groups, width)
        self.modulation = Modulation(condition_dim, width, parts=2) if condition_dim else None

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        normed = super().forward(input)
        if self.modulation is None:
            return normed
        scale, shift = (part[:, :, None, None] for part in self.modulation(condition))
        return normed * (1 + scale) + shift


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


def check_widths(widths: tuple[int, ...]) -> None:
    """Raise ConfigError unless GroupNorm can divide each width."""
    for width in widths:
        if width % GROUPS:
            below = width // GROUPS * GROUPS
            near = sorted({max(GROUPS, below), below + GROUPS})
            raise ConfigError(
                f"width {width} of the network must be a multiple of {GROUPS} (its normalisation "
                f"groups): use {' or '.join(map(str, near))}."
            )
