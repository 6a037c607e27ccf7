"""A one-step generator of points, vectors or arrays of any shape."""

import math
from itertools import pairwise
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.conditioning import ConditionalGenerator
from dist_contrastive.settings import Settings


class MlpGeneratorSettings(Settings):
    """An MLP with SiLU."""

    name: Literal["mlp"] = "mlp"
    noise_dim: PositiveInt = 32
    class_dim: PositiveInt = 32
    """Dimension of the embedding of class and guidance; unused without both."""
    hidden: PositiveInt = 256
    layers: PositiveInt = 4
    """Linear layers; 1 is a plain linear map."""


class MlpGenerator(ConditionalGenerator):
    """Noise and condition, side by side, to samples [b, *sample_shape] without bounds.

    Args:
        settings: sizes.
        sample_shape: any; images are arrays to it.
        num_classes, guided: as for every `ConditionalGenerator`.
    Raises:
        ConfigError: a sample of that shape holds nothing.
    """

    def __init__(
        self,
        settings: MlpGeneratorSettings,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__(settings.noise_dim, settings.class_dim, num_classes, guided)
        numbers = math.prod(sample_shape)
        if numbers < 1:
            raise ConfigError(
                f"samples of shape {sample_shape} hold {numbers} numbers, and a generator needs 1 "
                "or more: give the shape of one sample, such as (2,)."
            )
        self.sample_shape = sample_shape
        hidden = [settings.hidden] * (settings.layers - 1)
        widths = [self.noise_dim + self.condition_dim, *hidden, numbers]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        points = self.net(torch.cat([noise, condition], dim=1))
        return points.view(len(noise), *self.sample_shape)
