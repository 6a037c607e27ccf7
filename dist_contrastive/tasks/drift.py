"""One-step generation by the contrastive force ("drifting"): noise and a class in, an image out."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.config import DriftSettings
from dist_contrastive.config.tasks import PixelFeatures, RunFeatures
from dist_contrastive.data import keyed_random
from dist_contrastive.data.fields import Samples
from dist_contrastive.losses.settings import build_loss
from dist_contrastive.models import build_generator, frozen
from dist_contrastive.tasks.base import Embeddings, Task, Terms
from dist_contrastive.tasks.runs import load_encoder

NOISE_STREAM = 0x6E6F697365  # "noise": keeps these keys apart from other uses of the same seed

Features = Callable[[Tensor], Tensor]


class Drift(Task):
    """A generator whose samples are moved by data and by each other, in one or more feature spaces.

    Each row of data is met by one generated row of the same class. Rows of different classes do
    not interact.
    """

    def __init__(
        self,
        settings: DriftSettings,
        example: Samples,
        num_classes: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        channels, height, width = example.images.shape[1:]
        image_shape = channels, height, width
        self.generator = build_generator(settings.generator, image_shape, num_classes)
        self.loss = build_loss(settings.loss)
        self.seed = seed
        # In a plain list, so that frozen networks are neither trained nor part of checkpoints.
        self._features = [_build_features(f, image_shape) for f in settings.features]
        self._names = [f"force_{place}_{f.name}" for place, f in enumerate(settings.features)]

    def inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """Noise [b, noise_dim], keyed by the data row that it will meet, and its label [b]."""
        keys = keyed_random.combine(self.seed, NOISE_STREAM, samples.epoch, samples.index)
        noise = keyed_random.normal(keys, self.generator.noise_dim)
        return (noise,) if samples.labels is None else (noise, samples.labels)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Features of generated images: [b, D] for each feature space."""
        return self._in_features(self.generator(*inputs))

    def compare(self, embeddings: Embeddings, samples: Samples) -> Terms:
        """The force's loss against this batch's data, in each feature space."""
        with torch.no_grad():
            data = self._in_features(samples.images)
        labels = samples.labels
        spaces = zip(self._names, embeddings, data, strict=True)
        return {name: self.loss(n, p, labels, labels) for name, n, p in spaces}

    def _in_features(self, images: Tensor) -> Embeddings:
        # In fp32 for generated images and data alike: mixed precision would set them apart.
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(collectives.accumulation_dtype(images.dtype))
            return tuple(features(images) for features in self._features)

    @torch.no_grad()
    def generate(self, labels: Tensor | None, count: int, seed: int) -> Tensor:
        """`count` images; for the same seed always the same."""
        device = next(self.parameters()).device
        keys = keyed_random.combine(seed, NOISE_STREAM, torch.arange(count, device=device))
        noise = keyed_random.normal(keys, self.generator.noise_dim)
        return self.generator(noise, labels)

    def _apply(self, fn, recurse=True):
        """Frozen features follow the task to another device."""
        for features in self._features:
            if isinstance(features, torch.nn.Module):
                features._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _build_features(
    settings: PixelFeatures | RunFeatures, image_shape: tuple[int, int, int]
) -> Features:
    if isinstance(settings, PixelFeatures):
        return _pixels
    return frozen(load_encoder(settings.run_dir, image_shape))


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)
