"""The spaces in which the contrastive force acts: pixels, or features of a frozen encoder."""

import torch
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.config.drift import EncoderFeatures, FeatureSettings, PixelFeatures
from dist_contrastive.errors import ConfigError
from dist_contrastive.models import FeatureMaps, build_encoder
from dist_contrastive.tasks.runs import load_encoder


class FeatureSpaces:
    """Samples [b, ...] to features [b, groups, dim] in several named spaces, in one pass each.

    No module, so that frozen networks are neither trained nor part of checkpoints. Groups are the
    locations of a feature map; the force takes each for itself.
    """

    def __init__(
        self, settings: tuple[FeatureSettings, ...], sample_shape: tuple[int, ...]
    ) -> None:
        self.settings = settings
        self.networks: list[FeatureMaps | None] = [_network(x, sample_shape) for x in settings]
        self.names: list[str] = []
        for place, (each, network) in enumerate(zip(settings, self.networks, strict=True)):
            name, of_maps = f"force_{place}_{each.name}", list(network.shapes) if network else []
            self.names += [f"{name}.{x}" for x in of_maps] if len(of_maps) > 1 else [name]

    def __call__(self, samples: Tensor) -> tuple[Tensor, ...]:
        """One [b, groups, dim] for each of `names`."""
        found: list[Tensor] = []
        # In fp32 for generated samples and data alike: mixed precision would set them apart.
        with torch.autocast(samples.device.type, enabled=False):
            samples = samples.to(collectives.accumulation_dtype(samples.dtype))
            for network in self.networks:
                if network is None:
                    found.append(samples.flatten(1)[:, None])
                else:
                    found += network(samples).values()
        return tuple(found)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The encoders by `run` and so on, with a number where there are several."""
        found: dict[str, nn.Module] = {}
        for settings, network in zip(self.settings, self.networks, strict=True):
            if network is not None:
                name = settings.name
                found[f"{name} {len(found)}" if name in found else name] = network.encoder
        return found

    def apply(self, fn) -> None:
        """What `nn.Module._apply` does to a module: frozen networks follow to another device."""
        for network in self.networks:
            if network is not None:
                network._apply(fn)


def _network(settings: FeatureSettings, sample_shape: tuple[int, ...]) -> FeatureMaps | None:
    """None for pixels."""
    if isinstance(settings, PixelFeatures):
        return None
    if len(sample_shape) != 3:
        raise ConfigError(
            f"features {settings.name!r} are of images (channels, height, width), not of samples "
            f"of shape {sample_shape}; use features: [{{name: pixels}}]"
        )
    channels, height, width = sample_shape
    image_shape = channels, height, width
    encoder: nn.Module
    if isinstance(settings, EncoderFeatures):
        encoder = build_encoder(settings.encoder, image_shape)
    else:
        encoder = load_encoder(settings.run_dir, image_shape)
    return FeatureMaps(settings.maps, encoder, image_shape)
