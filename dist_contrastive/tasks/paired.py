"""Two towers: an image finds the text, or another modality, that belongs to it, and the reverse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_contrastive.config import PairedSettings
from dist_contrastive.data.fields import Samples
from dist_contrastive.losses import build_loss
from dist_contrastive.models import (
    TextEncoder,
    build_head,
    build_pair_encoder,
    representations_of,
    text_tokens,
)
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ImageTask


class Paired(ImageTask):
    """An encoder of images and one of the second modality, with a space in common."""

    def __init__(self, settings: PairedSettings, example: Samples, seed: int) -> None:
        super().__init__(settings, example, seed)
        assert example.pair is not None, "the config asks for data.pair"
        self.pair_encoder = build_pair_encoder(settings.pair.encoder, example.pair)
        self.pair_head = build_head(settings.pair.head, self.pair_encoder.dim)
        self.loss = build_loss(settings.loss)

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """A view of every image [b, C, H, W], and what its partner's encoder takes [b, ...]."""
        assert samples.pair is not None
        return *self.make_views(samples, 1), self.as_input(samples.pair).to(samples.images.device)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Embeddings of both modalities: [b, D] each."""
        images, partners = inputs
        return self.head(self.encoder(images)), self.pair_head(self.pair_encoder(partners))

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The loss between modalities, all rows of the global batch as negatives."""
        return {"contrastive": self.loss(*embeddings)}

    def as_input(self, pair: Tensor | Sequence[str]) -> Tensor:
        """What the second encoder takes: tokens of texts, numbers as they are."""
        if isinstance(pair, Tensor):
            return pair
        assert isinstance(self.pair_encoder, TextEncoder), "no other one is built for texts"
        return text_tokens(pair, self.pair_encoder.max_bytes)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """[n, C, H, W] as they are to [n, D] in the common space."""
        return self.head(self.represent(images))

    @torch.no_grad()
    def embed_pair(self, pair: Tensor | Sequence[str]) -> Tensor:
        """Contents of the second field to [n, D] in the common space."""
        return self.pair_head(representations_of(self.pair_encoder, self.as_input(pair)))
