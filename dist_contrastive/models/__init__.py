"""Models by their settings: `build_encoder`, `build_pair_encoder`, `build_head`, `build_generator`.

A model is made from its settings and the shape of the data, with weights from torch's global
random numbers: seed these first.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.conditioning import ConditionalGenerator
from dist_contrastive.models.encoders import (
    ProjectionHead,
    ProjectionHeadSettings,
    ResidualEncoder,
    ResidualEncoderSettings,
    frozen,
    representations_of,
)
from dist_contrastive.models.feature_maps import FeatureMaps, FeatureMapSettings
from dist_contrastive.models.generators import GeneratorSettings, build_generator
from dist_contrastive.models.momentum import (
    MomentumCopy,
    check_row_independent,
    ema_decay_at,
    momentum_at,
)
from dist_contrastive.models.text_encoder import TextEncoder, TextEncoderSettings, text_tokens
from dist_contrastive.models.transformers_encoder import (
    TransformersEncoder,
    TransformersEncoderSettings,
)
from dist_contrastive.models.vector_encoder import VectorEncoder, VectorEncoderSettings

__all__ = [
    "ConditionalGenerator",
    "EncoderSettings",
    "FeatureMapSettings",
    "FeatureMaps",
    "GeneratorSettings",
    "MomentumCopy",
    "PairEncoder",
    "PairEncoderSettings",
    "ProjectionHead",
    "ProjectionHeadSettings",
    "ResidualEncoder",
    "TextEncoder",
    "TextEncoderSettings",
    "TransformersEncoder",
    "VectorEncoder",
    "VectorEncoderSettings",
    "build_encoder",
    "build_generator",
    "build_head",
    "build_pair_encoder",
    "check_row_independent",
    "ema_decay_at",
    "frozen",
    "momentum_at",
    "representations_of",
    "text_tokens",
]

EncoderSettings = Annotated[
    ResidualEncoderSettings | TransformersEncoderSettings, Field(discriminator="name")
]
PairEncoderSettings = Annotated[
    ResidualEncoderSettings
    | TransformersEncoderSettings
    | TextEncoderSettings
    | VectorEncoderSettings,
    Field(discriminator="name"),
]
PairEncoder = ResidualEncoder | TransformersEncoder | TextEncoder | VectorEncoder


def build_encoder(
    settings: ResidualEncoderSettings | TransformersEncoderSettings,
    image_shape: tuple[int, int, int],
) -> ResidualEncoder | TransformersEncoder:
    """An encoder of images [b, *image_shape] in [0, 1]; its `dim` is D of the output [b, D].

    Args:
        settings: which one.
        image_shape: (channels, height, width).
    Raises:
        ConfigError: settings that cannot be built or cannot read such images.
    """
    channels, height, width = image_shape
    if isinstance(settings, ResidualEncoderSettings):
        return ResidualEncoder(settings, channels)
    return TransformersEncoder(settings, channels, (height, width))


def build_pair_encoder(
    settings: ResidualEncoderSettings
    | TransformersEncoderSettings
    | TextEncoderSettings
    | VectorEncoderSettings,
    example: Tensor | Sequence[str],
) -> PairEncoder:
    """The encoder of the other half of a pair; its `dim` is D of the output [b, D].

    Args:
        settings: which one.
        example: what one sample holds: an image float [1, C, H, W] in [0, 1], numbers float
            [1, ...], or a text [1].
    Raises:
        ConfigError: the encoder cannot read that, or settings that cannot be built.
    """
    match settings, example:
        case TextEncoderSettings(), Sequence():
            return TextEncoder(settings)
        case VectorEncoderSettings(), Tensor():
            return VectorEncoder(settings, example[0].numel())
        case ResidualEncoderSettings() | TransformersEncoderSettings(), Tensor() if (
            example.ndim == 4
        ):
            _, channels, height, width = example.shape
            return build_encoder(settings, (channels, height, width))
    raise ConfigError(_unreadable(settings.name, example))


def build_head(settings: ProjectionHeadSettings, dim: int) -> ProjectionHead:
    """The projection head on representations [b, dim]."""
    return ProjectionHead(settings, dim)


def _unreadable(name: str, example: Tensor | Sequence[str]) -> str:
    """Why the encoder `name` does not fit, and which do."""
    if not isinstance(example, Tensor):
        holds, fit = "text", "text"
    else:
        shape = "x".join(map(str, example.shape[1:]))
        holds = f"arrays of {shape}" if shape else "single numbers"
        fit = "residual, transformers (for images) or vector" if example.ndim == 4 else "vector"
    return f"encoder {name!r} cannot read a field that holds {holds}: set name to {fit}."
