"""One-step generators by their settings: noise, a class and a guidance strength to a sample."""

from typing import Annotated

from pydantic import Field

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.conditioning import ConditionalGenerator
from dist_contrastive.models.conv_generator import ConvGenerator, ConvGeneratorSettings
from dist_contrastive.models.dit_generator import DiTGenerator, DiTGeneratorSettings
from dist_contrastive.models.mlp_generator import MlpGenerator, MlpGeneratorSettings
from dist_contrastive.models.unet_generator import UNetGenerator, UNetGeneratorSettings

GeneratorSettings = Annotated[
    ConvGeneratorSettings | UNetGeneratorSettings | DiTGeneratorSettings | MlpGeneratorSettings,
    Field(discriminator="name"),
]


def build_generator(
    settings: GeneratorSettings,
    sample_shape: tuple[int, ...],
    num_classes: int | None,
    guided: bool = False,
) -> ConditionalGenerator:
    """A generator of samples [b, *sample_shape]; images are in (0, 1) unless an MLP draws them.

    Args:
        settings: which one.
        sample_shape: (channels, height, width) of images; any for an MLP.
        num_classes: labels that its call takes are 0 ... num_classes - 1; None: it takes none.
        guided: its call takes a guidance strength for each row.
    Raises:
        ConfigError: samples that are not images, or of a size that the settings cannot reach.
    """
    if isinstance(settings, MlpGeneratorSettings):
        return MlpGenerator(settings, sample_shape, num_classes, guided)
    if len(sample_shape) != 3:
        raise ConfigError(
            f"generator {settings.name!r} draws images (channels, height, width), not samples of "
            f"shape {sample_shape}: set name to mlp."
        )
    channels, height, width = sample_shape
    image_shape = channels, height, width
    match settings:
        case ConvGeneratorSettings():
            return ConvGenerator(settings, image_shape, num_classes, guided)
        case UNetGeneratorSettings():
            return UNetGenerator(settings, image_shape, num_classes, guided)
        case DiTGeneratorSettings():
            return DiTGenerator(settings, image_shape, num_classes, guided)
