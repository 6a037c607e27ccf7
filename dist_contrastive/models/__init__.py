"""Models by their settings: `build_encoder`, `build_head`, `build_generator`.

A model is made from its settings and the shape of the data, with weights from torch's global
random numbers: seed these first.
"""

from typing import Annotated

from pydantic import Field

from dist_contrastive.models.encoders import (
    ProjectionHead,
    ProjectionHeadSettings,
    ResidualEncoder,
    ResidualEncoderSettings,
    frozen,
    representations_of,
)
from dist_contrastive.models.generators import ConvGenerator, ConvGeneratorSettings
from dist_contrastive.models.transformers_encoder import (
    TransformersEncoder,
    TransformersEncoderSettings,
)

__all__ = [
    "ConvGenerator",
    "EncoderSettings",
    "GeneratorSettings",
    "ProjectionHead",
    "ProjectionHeadSettings",
    "ResidualEncoder",
    "TransformersEncoder",
    "build_encoder",
    "build_generator",
    "build_head",
    "frozen",
    "representations_of",
]

EncoderSettings = Annotated[
    ResidualEncoderSettings | TransformersEncoderSettings, Field(discriminator="name")
]
GeneratorSettings = ConvGeneratorSettings


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


def build_head(settings: ProjectionHeadSettings, dim: int) -> ProjectionHead:
    """The projection head on representations [b, dim]."""
    return ProjectionHead(settings, dim)


def build_generator(
    settings: ConvGeneratorSettings,
    image_shape: tuple[int, int, int],
    num_classes: int | None,
) -> ConvGenerator:
    """A generator of images [b, *image_shape] in (0, 1).

    Args:
        settings: sizes.
        image_shape: (channels, height, width).
        num_classes: labels that its call takes are 0 ... num_classes - 1; None: it takes none.
    Raises:
        ConfigError: an image size that the settings cannot reach.
    """
    channels, height, width = image_shape
    return ConvGenerator(settings, channels, (height, width), num_classes)
