"""An MLP from vectors of numbers (measurements, tables, stored features) to representations.

Every row of the output depends on its own row of the input alone. Works for b = 0.
"""

from itertools import pairwise
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import Settings


class VectorEncoderSettings(Settings):
    """An MLP with SiLU."""

    name: Literal["vector"] = "vector"
    hidden: PositiveInt = 64
    out: PositiveInt = 64
    """D of the representation."""
    layers: PositiveInt = 2
    """Linear layers; 1 is a plain linear map."""


class VectorEncoder(nn.Module):
    """Vectors [b, F] (or arrays [b, ...] of F numbers a row) to representations [b, D].

    Each hidden layer is normalised (LayerNorm), so that features may be of any common scale. The
    input is not: with few features that would erase them, with one feature entirely.

    Args:
        settings: sizes.
        num_features: F.
    Raises:
        ConfigError: F is 0.
    """

    def __init__(self, settings: VectorEncoderSettings, num_features: int) -> None:
        super().__init__()
        if num_features < 1:
            raise ConfigError(
                f"a vector encoder needs 1 feature or more, but the field has {num_features}: "
                "name a field that holds numbers."
            )
        self.dim, self.num_features = settings.out, num_features
        widths = [num_features, *[settings.hidden] * (settings.layers - 1), settings.out]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-2])

    def forward(self, vectors: Tensor) -> Tensor:
        return self.net(vectors.reshape(len(vectors), self.num_features))
