"""A one-step generator that is a transformer over the patches of a noise image."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.generators import ConditionalGenerator
from dist_contrastive.models.layers import Modulation
from dist_contrastive.settings import Count, Size


class DiTGenerator(ConditionalGenerator):
    """Noise images [b, noise_channels * H * W] to images [b, C, H, W] in (0, 1).

    Blocks begin as the identity (adaLN-Zero). The last layer does not begin at zero as in DiT:
    all images would be one grey, and between points that coincide there is no force.

    Args:
        sample_shape: (channels, height, width).
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: patches do not tile the images.
    References:
        Peebles & Xie 2022, arXiv 2212.09748; registers: Darcet et al. 2023, arXiv 2309.16588.
    """

    class Config(ConditionalGenerator.Config):
        """A small diffusion transformer (DiT), used in one step."""

        name: Literal["dit"] = "dit"
        noise_channels: Size = 1
        """Channels of the noise image, which has the images' height and width."""
        patch: Size = 2
        """Height and width of the patch that a token stands for; it divides those of the images."""
        width: Size = 128
        """Dimension of the tokens, and of the embedding of class and guidance."""
        layers: Count = 4
        """Transformer layers."""
        heads: Count = 4
        """Attention heads; they divide the width."""
        registers: int = Field(default=4, ge=0, le=1024)
        """Learned tokens beside the patches, room for what concerns the whole image."""

        @model_validator(mode="after")
        def _heads_divide_width(self) -> Self:
            if self.width % self.heads:
                raise ValueError(
                    f"width {self.width} of the generator cannot be divided among its {self.heads} "
                    f"attention heads: set width to a multiple of {self.heads}."
                )
            return self

    only_images = True

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        channels, height, width = sample_shape
        patch, dim = config.patch, config.width
        noise_dim = config.noise_channels * height * width
        super().__init__(noise_dim, dim, num_classes, guided)
        _check_tiles(patch, height, width)
        self.noise_shape, self.image_shape = (config.noise_channels, height, width), sample_shape
        self.grid, self.patch = (height // patch, width // patch), patch
        self.embed = nn.Conv2d(config.noise_channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], dim))
        self.registers = nn.Parameter(torch.randn(config.registers, dim))
        self.blocks = nn.ModuleList(
            _Block(dim, config.heads, self.condition_dim) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = Modulation(self.condition_dim, dim, parts=2)
        self.to_patch = nn.Linear(dim, channels * patch**2)

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        rows, registers = len(noise), len(self.registers)
        patches = self.embed(noise.view(rows, *self.noise_shape)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.registers.expand(rows, -1, -1), patches + self.positions], dim=1)
        for block in self.blocks:
            tokens = block(tokens, condition)
        scale, shift = self.modulation(condition)
        tokens = _modulated(self.norm(tokens[:, registers:]), scale, shift)
        return torch.sigmoid(self._image(self.to_patch(tokens)))

    def _image(self, patches: Tensor) -> Tensor:
        """Patches [b, h * w, C * patch^2], row by row, to images [b, C, H, W]."""
        tiles = patches.view(len(patches), *self.grid, self.image_shape[0], self.patch, self.patch)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), *self.image_shape)


class _Block(nn.Module):
    """Attention, then an MLP of 4 x width: each normed, modulated, gated and added."""

    def __init__(self, width: int, heads: int, condition_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Modulation(condition_dim, width, parts=6)
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)
        h = self._attention(_modulated(self.norm(tokens), scale1, shift1))
        tokens = tokens + gate1.unsqueeze(1) * h
        h = self.mlp(_modulated(self.norm(tokens), scale2, shift2))
        return tokens + gate2.unsqueeze(1) * h

    def _attention(self, tokens: Tensor) -> Tensor:
        rows, length, width = tokens.shape
        split = self.to_qkv(tokens).view(rows, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.out(attended.transpose(1, 2).reshape(rows, length, width))


def _modulated(tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _check_tiles(patch: int, height: int, width: int) -> None:
    if height % patch or width % patch:
        most = max(k for k in range(1, patch) if not (height % k or width % k))
        raise ConfigError(
            f"patches of {patch}x{patch} do not tile images of {height}x{width}: set the "
            f"generator's patch to a number that divides both, such as {most}."
        )
