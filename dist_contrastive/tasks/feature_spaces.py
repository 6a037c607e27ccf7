"""Spaces in which the contrastive force acts: pixels, or features of a frozen encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from dist_contrastive import checkpoint, collectives
from dist_contrastive.data.views import AnyViews, RandomViews
from dist_contrastive.errors import ConfigError
from dist_contrastive.imports import read_recorded
from dist_contrastive.models import AnyEncoder, Encoder, FeatureMaps, build_encoder
from dist_contrastive.settings import Choice, ComponentSettings, Settings
from dist_contrastive.tasks.images import seen_shape

_REPRESENTATION = FeatureMaps.Config(kinds=("pooled",), patches=())


class FeatureSpace:
    """Samples [b, ...] to features [b, groups, dim], by one name or several.

    No module, so that frozen networks are neither trained nor part of checkpoints. Groups are the
    locations of a feature map; the force takes each for itself.
    """

    class Config(ComponentSettings):
        """Settings of a space in which the force acts."""

    network: FeatureMaps | None = None
    """The frozen network, if there is one; it follows the task to another device."""

    def __init__(self, config: Config, sample_shape: tuple[int, ...]) -> None:
        self.config = config

    @property
    def names(self) -> list[str]:
        """Names of the features, where there are several."""
        return list(self.network.shapes) if self.network else []

    def __call__(self, samples: Tensor) -> list[Tensor]:
        """One [b, groups, dim] for each of `names`, or one."""
        if self.network is None:
            return [samples.flatten(1)[:, None]]
        return list(self.network(samples).values())


class PixelSpace(FeatureSpace):
    """Pixels of images, or the coordinates of points."""

    class Config(FeatureSpace.Config):
        """The force acts on pixels, or on the coordinates of points."""

        name: Literal["pixels"] = "pixels"


class RunSpace(FeatureSpace):
    """Features of an encoder that an earlier run trained."""

    class Config(FeatureSpace.Config):
        """The force acts on what an encoder makes of images that an earlier run trained."""

        name: Literal["run"] = "run"
        run_dir: Path
        """Run directory, or exported weights, of a task with an encoder."""
        maps: FeatureMaps.Config = _REPRESENTATION
        """Which features; by default the representation alone."""

    def __init__(self, config: Config, sample_shape: tuple[int, ...]) -> None:
        super().__init__(config, sample_shape)
        image_shape = _image_shape(config.name, sample_shape)
        encoder = load_encoder(config.run_dir, image_shape)
        self.network = FeatureMaps(config.maps, encoder, image_shape)


class EncoderSpace(FeatureSpace):
    """Features of any encoder, as a pretrained one."""

    class Config(FeatureSpace.Config):
        """The force acts on what any encoder makes of images, as a pretrained one."""

        name: Literal["encoder"] = "encoder"
        encoder: AnyEncoder
        """Network from images to representations."""
        maps: FeatureMaps.Config = _REPRESENTATION
        """Which features; by default the representation alone."""

    def __init__(self, config: Config, sample_shape: tuple[int, ...]) -> None:
        super().__init__(config, sample_shape)
        image_shape = _image_shape(config.name, sample_shape)
        encoder = build_encoder(config.encoder, image_shape)
        self.network = FeatureMaps(config.maps, encoder, image_shape)


FEATURE_SPACES: dict[str, type[FeatureSpace]] = {
    "pixels": PixelSpace,
    "run": RunSpace,
    "encoder": EncoderSpace,
}
_FEATURE_SPACE = Choice("features", FeatureSpace, FEATURE_SPACES)
AnyFeatureSpace = Annotated[FeatureSpace.Config, _FEATURE_SPACE]


class FeatureSpaces:
    """Samples [b, ...] to features [b, groups, dim] in several named spaces, in one pass each."""

    def __init__(
        self, configs: Sequence[FeatureSpace.Config], sample_shape: tuple[int, ...]
    ) -> None:
        self.spaces: list[FeatureSpace] = [_FEATURE_SPACE.build(x, sample_shape) for x in configs]
        self.names: list[str] = []
        for place, space in enumerate(self.spaces):
            name, names = f"force_{place}_{space.config.name}", space.names
            self.names += [f"{name}.{x}" for x in names] if len(names) > 1 else [name]

    def __call__(self, samples: Tensor) -> tuple[Tensor, ...]:
        """One [b, groups, dim] for each of `names`."""
        # In fp32 for generated samples and data alike: mixed precision would set them apart.
        with torch.autocast(samples.device.type, enabled=False):
            samples = samples.to(collectives.accumulation_dtype(samples.dtype))
            return tuple(features for space in self.spaces for features in space(samples))

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The encoders by `run` and so on, with a number where there are several."""
        encoders: dict[str, nn.Module] = {}
        for space in self.spaces:
            if space.network is not None:
                name = space.config.name
                name = f"{name} {len(encoders)}" if name in encoders else name
                encoders[name] = space.network.encoder
        return encoders

    def apply(self, fn: Any) -> None:
        """What `nn.Module._apply` does to a module: frozen networks follow to another device."""
        for space in self.spaces:
            if space.network is not None:
                space.network._apply(fn)


class _Recorded(Settings):
    """What the config of a run tells of its encoder."""

    encoder: AnyEncoder
    views: AnyViews = RandomViews.Config()


def load_encoder(run_dir: Path, image_shape: tuple[int, int, int]) -> Encoder:
    """Encoder of images (without head) that a run trained, for images of the given shape.

    Raises:
        ConfigError: that is no run directory, or one of a task without an encoder; the encoder does
            not fit such images.
    """
    path = run_dir / "config.yaml"
    task = read_recorded(run_dir)[0].get("task")
    if not isinstance(task, dict) or "name" not in task:
        raise ConfigError(f"{path} has no task; give the directory of a run that was trained")
    if "encoder" not in task:
        raise ConfigError(
            f"{run_dir} is a run of task {task['name']!r}, which trains no encoder; features need "
            f"a run of another task, as two_view"
        )
    known = {name: task[name] for name in _Recorded.model_fields if name in task}
    recorded = _Recorded.checked(known, f"{path}: task: ")
    encoder = build_encoder(recorded.encoder, seen_shape(image_shape, recorded.views))
    prefix = "encoder."
    weights = checkpoint.run_weights(run_dir)
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"the encoder of {run_dir} does not fit images of shape {image_shape} (channels, "
            f"height, width); use a run that trained on such images"
        ) from error
    return encoder


def _image_shape(name: str, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(sample_shape) != 3:
        raise ConfigError(
            f"features {name!r} are of images (channels, height, width), not of samples of shape "
            f"{sample_shape}; use features: [{{name: pixels}}]"
        )
    channels, height, width = sample_shape
    return channels, height, width
