"""Two towers: an image finds the text, or another modality, that belongs to it, and the reverse."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import PairedLoss, PairLoss
from dist_contrastive.models import (
    AnyPairEncoder,
    ProjectionHead,
    build_pair_encoder,
    device_of,
    representations_of,
)
from dist_contrastive.settings import Settings
from dist_contrastive.tasks.base import DataInfo, Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ContrastiveTask


class PairTowerConfig(Settings):
    """Network of the second modality."""

    encoder: AnyPairEncoder
    """Network from rows of the second modality to representations."""
    head: ProjectionHead.Config = ProjectionHead.Config()
    """Network from representations to the embeddings that the loss compares."""


class Paired(ContrastiveTask):
    """An encoder of images and one of the second modality, with a space in common."""

    class Config(ContrastiveTask.Config):
        """Two towers: an image finds the text, or another modality, of its own sample."""

        uses_pair: ClassVar[bool] = True

        name: Literal["paired"] = "paired"
        pair: PairTowerConfig
        """Encoder and head of the second modality."""
        loss: PairedLoss
        """Loss between the two modalities of the same samples."""

        def check(self, data: DataConfig) -> None:
            """A second modality, embedded in the same space."""
            super().check(data)
            if data.pair is None:
                raise ValueError(
                    "the task paired needs data.pair, the field of the second modality"
                )
            if self.head.layers and self.pair.head.layers and self.head.out != self.pair.head.out:
                raise ValueError(
                    f"task.head.out={self.head.out} and "
                    f"task.pair.head.out={self.pair.head.out} differ; both towers must embed into "
                    f"the same space: set equal sizes"
                )

    def __init__(
        self,
        config: Config,
        data: DataInfo,
        encoder: nn.Module | None = None,
        loss: PairLoss | None = None,
    ) -> None:
        super().__init__(config, data, encoder, loss)
        assert data.example.pair is not None, "the config asks for data.pair"
        self.pair_encoder = build_pair_encoder(config.pair.encoder, data.example.pair)
        self.pair_head = ProjectionHead(config.pair.head, self.pair_encoder.dim)
        if self.head.dim != self.pair_head.dim:
            raise ConfigError(
                f"the towers embed into {self.head.dim} and {self.pair_head.dim} dimensions; set "
                f"task.head.out and task.pair.head.out to one size, or layers to 0 where both "
                f"encoders have it"
            )

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """A view of every image [b, C, H, W], and what its partner's encoder takes [b, ...]."""
        assert samples.pair is not None
        partners = collectives.to_device(self.as_input(samples.pair), samples.images.device)
        return *self.make_views(samples, 1), partners

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Embeddings of both modalities: [b, D] each."""
        images, partners = inputs
        return self.head(self.encoder(images)), self.pair_head(self.pair_encoder(partners))

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The loss between modalities, all rows of the global batch as negatives."""
        return {"contrastive": self.loss(*embeddings)}

    @torch.no_grad()
    def scalars(self, context: StepContext) -> dict[str, float]:
        """Those of all tasks, and the share of this rank's texts that was cut, since the start."""
        encoder, found = self.pair_encoder, super().scalars(context)
        return (
            {**found, "texts_cut": encoder.num_cut / encoder.num_read}
            if encoder.num_read
            else found
        )

    def as_input(self, pair: Tensor | Sequence[str]) -> Tensor:
        """What the second encoder takes: tokens of texts, numbers as they are."""
        return pair if isinstance(pair, Tensor) else self.pair_encoder.tokens(pair)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """[n, C, H, W] as they are to [n, D] in the common space."""
        return self.embed_representations(self.represent(images))

    @torch.no_grad()
    def embed_pair(self, pair: Tensor | Sequence[str]) -> Tensor:
        """Contents of the second field to [n, D] in the common space."""
        inputs = self.as_input(pair)
        there = device_of(self, inputs.device)
        rows = representations_of(self.pair_encoder, inputs)
        return self.pair_head(rows.to(there)).to(inputs.device)
