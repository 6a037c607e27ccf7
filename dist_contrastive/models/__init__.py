"""Models: encoders and generators by their configs.

A model is made from its `Config` and the shape of the data, with weights from torch's global
random numbers: seed these first. A config names one of the tables below, or one of the user's own
by its import path::

    class Flat(Encoder):  # name: my_package.nets:Flat
        class Config(Encoder.Config):
            dim: PositiveInt = 32

        def __init__(self, config, shape):  # (channels, height, width)
            super().__init__()
            self.dim, self.net = config.dim, nn.Linear(math.prod(shape), config.dim)

        def forward(self, images):  # each row for itself
            return self.net(images.flatten(1))
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError, retired
from dist_contrastive.models.dit_generator import DiTGenerator
from dist_contrastive.models.encoders import (
    Encoder,
    ProjectionHead,
    ResidualEncoder,
    TextEncoder,
    VectorEncoder,
    device_of,
    frozen,
    representations_of,
    text_tokens,
)
from dist_contrastive.models.feature_maps import FeatureMaps
from dist_contrastive.models.generators import (
    ConditionalGenerator,
    ConvGenerator,
    MlpGenerator,
    UNetGenerator,
)
from dist_contrastive.models.momentum import (
    MomentumCopy,
    check_row_independent,
    ema_decay_at,
    momentum_at,
)
from dist_contrastive.models.transformers import TransformersEncoder, TransformersTextEncoder
from dist_contrastive.settings import Choice

__all__ = [
    "ENCODERS",
    "GENERATORS",
    "PAIR_ENCODERS",
    "AnyEncoder",
    "AnyGenerator",
    "AnyPairEncoder",
    "ConditionalGenerator",
    "ConvGenerator",
    "DiTGenerator",
    "Encoder",
    "FeatureMaps",
    "MlpGenerator",
    "MomentumCopy",
    "ProjectionHead",
    "ResidualEncoder",
    "TextEncoder",
    "TransformersEncoder",
    "TransformersTextEncoder",
    "UNetGenerator",
    "VectorEncoder",
    "build_encoder",
    "build_generator",
    "build_pair_encoder",
    "check_row_independent",
    "device_of",
    "ema_decay_at",
    "frozen",
    "momentum_at",
    "representations_of",
    "text_tokens",
]

ENCODERS: dict[str, type[Encoder]] = {
    "residual": ResidualEncoder,
    "transformers": TransformersEncoder,
}
PAIR_ENCODERS: dict[str, type[Encoder]] = {
    **ENCODERS,
    "text": TextEncoder,
    "transformers_text": TransformersTextEncoder,
    "vector": VectorEncoder,
}
GENERATORS: dict[str, type[ConditionalGenerator]] = {
    "conv": ConvGenerator,
    "unet": UNetGenerator,
    "dit": DiTGenerator,
    "mlp": MlpGenerator,
}


def _reads_no_images(cls: type[Encoder]) -> str | None:
    return None if cls.reads == "images" else f"it reads {cls.reads}, and these are images"


_IMAGE_ENCODER = Choice("encoder", Encoder, ENCODERS, _reads_no_images)
_PAIR_ENCODER = Choice("encoder", Encoder, PAIR_ENCODERS)
_GENERATOR = Choice("generator", ConditionalGenerator, GENERATORS)

AnyEncoder = Annotated[Encoder.Config, _IMAGE_ENCODER]
AnyPairEncoder = Annotated[Encoder.Config, _PAIR_ENCODER]
AnyGenerator = Annotated[ConditionalGenerator.Config, _GENERATOR]


def build_encoder(config: Encoder.Config, image_shape: tuple[int, ...]) -> Encoder:
    """Encoder of images [b, *image_shape] in [0, 1]; its `dim` is D of the output [b, D].

    Args:
        image_shape: (channels, height, width).
    Raises:
        ConfigError: settings that cannot be built or cannot read such images.
    """
    encoder: Encoder = _IMAGE_ENCODER.build(config, image_shape)
    return encoder


def build_pair_encoder(config: Encoder.Config, example: Tensor | Sequence[str]) -> Encoder:
    """Encoder of the other half of a pair; its `dim` is D of the output [b, D].

    Args:
        example: what one sample holds: an image float [1, C, H, W] in [0, 1], numbers float
            [1, ...], or a text [1].
    Raises:
        ConfigError: the encoder cannot read that, or settings that cannot be built.
    """
    kinds, shape = ["texts"], torch.Size()
    if isinstance(example, Tensor):
        kinds, shape = ["vectors", "images"][: 1 + (example.ndim == 4)], example.shape[1:]
    if _PAIR_ENCODER.component(config.name).reads not in kinds:
        raise ConfigError(_unreadable(config.name, example))
    encoder: Encoder = _PAIR_ENCODER.build(config, tuple(shape))
    return encoder


def build_generator(
    config: ConditionalGenerator.Config,
    sample_shape: tuple[int, ...],
    num_classes: int | None,
    guided: bool = False,
) -> ConditionalGenerator:
    """Generator of samples [b, *sample_shape]; images are in (0, 1) unless an MLP draws them.

    Args:
        sample_shape: (channels, height, width) of images; any for an MLP.
        num_classes: labels that its call takes are 0 ... num_classes - 1; None: it takes none.
        guided: its call takes a guidance strength for each row.
    Raises:
        ConfigError: samples that are not images, or of a size that the settings cannot reach.
    """
    if _GENERATOR.component(config.name).only_images and len(sample_shape) != 3:
        raise ConfigError(
            f"generator {config.name!r} draws images (channels, height, width), not samples of "
            f"shape {sample_shape}: set name to mlp."
        )
    generator: ConditionalGenerator = _GENERATOR.build(config, sample_shape, num_classes, guided)
    return generator


def _unreadable(name: str, example: Tensor | Sequence[str]) -> str:
    """Why the encoder `name` does not fit, and which do."""
    if not isinstance(example, Tensor):
        holds, fit = "text", "text or transformers_text"
    else:
        shape = "x".join(map(str, example.shape[1:]))
        holds = f"arrays of {shape}" if shape else "single numbers"
        fit = "residual, transformers (for images) or vector" if example.ndim == 4 else "vector"
    return f"encoder {name!r} cannot read a field that holds {holds}: set name to {fit}."


__getattr__ = retired(
    __name__,
    {
        "EncoderSettings": "dist_contrastive.models.AnyEncoder",
        "FeatureMapSettings": "dist_contrastive.models.FeatureMaps.Config",
        "GeneratorSettings": "dist_contrastive.models.AnyGenerator",
        "PairEncoder": "dist_contrastive.models.Encoder",
        "PairEncoderSettings": "dist_contrastive.models.AnyPairEncoder",
        "ProjectionHeadSettings": "dist_contrastive.models.ProjectionHead.Config",
        "TextEncoderSettings": "dist_contrastive.models.TextEncoder.Config",
        "VectorEncoderSettings": "dist_contrastive.models.VectorEncoder.Config",
        "build_head": "dist_contrastive.models.ProjectionHead",
    },
)
