"""A user's own task, encoder and generator, named in configs by import paths."""

import itertools
import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from dist_contrastive.models import ConditionalGenerator, Encoder
from dist_contrastive.tasks import ContrastiveTask


class Flat(Encoder):
    """Linear map of the pixels."""

    class Config(Encoder.Config):
        """Settings of the map."""

        dim: PositiveInt = 8
        """Dimension of the representation."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.net = config.dim, nn.Linear(math.prod(shape), config.dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Representations [b, D]."""
        return self.net(rows.flatten(1))


class Line(ConditionalGenerator):
    """Linear map of the noise, the same for all classes."""

    class Config(ConditionalGenerator.Config):
        """Settings of the map."""

        noise_dim: PositiveInt = 4
        """Numbers of Gaussian noise behind a sample."""

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, ...],
        num_classes: int | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__(config.noise_dim, config.noise_dim, num_classes, guided)
        self.net = nn.Linear(config.noise_dim, math.prod(sample_shape))
        self.sample_shape = sample_shape

    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        """Samples [b, ...]."""
        return self.net(noise + condition).view(len(noise), *self.sample_shape)


class Views3(ContrastiveTask):
    """As many views as a setting of its own says, one after the other."""

    class Config(ContrastiveTask.Config):
        """Settings of the views."""

        num_views: PositiveInt = 3
        """Views of each sample."""

    config: Config

    def inputs(self, samples, context):
        """Views of every image."""
        return self.make_views(samples, self.config.num_views)

    def embed(self, *views):
        """Projections of all views."""
        return self.project(views)

    def compare(self, embeddings, samples, context):
        """The mean over neighbouring views."""
        losses = [self.loss(a, b) for a, b in itertools.pairwise(embeddings)]
        return {"contrastive": torch.stack(losses).mean()}
