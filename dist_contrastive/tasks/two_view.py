"""Two-view contrastive learning: an encoder that finds the other view of a sample in the batch."""

import torch
from torch import Tensor

from dist_contrastive.config import TwoViewSettings
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.views import ViewSettings, make_view, view_keys
from dist_contrastive.losses.base import Scale
from dist_contrastive.losses.settings import build_loss
from dist_contrastive.models import build_encoder, build_head, representations_of
from dist_contrastive.tasks.base import Embeddings, Task


class TwoView(Task):
    """Encoder and projection head, trained so that both views of a sample agree."""

    def __init__(
        self, settings: TwoViewSettings, image_shape: tuple[int, int, int], seed: int
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        size = settings.views.size
        seen = (channels, size or height, size or width)
        self.encoder = build_encoder(settings.encoder, seen)
        self.head = build_head(settings.head, self.encoder.dim)
        self.loss = build_loss(settings.loss)
        self.views = settings.views
        self.seed = seed

    def inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """Two views of every image: [b, C, H, W] each."""
        keys = (view_keys(self.seed, samples.epoch, samples.index, view) for view in (0, 1))
        return tuple(make_view(samples.images, key, self.views) for key in keys)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Projections of both views: [b, D] each."""
        both = self.head(self.encoder(torch.cat(inputs)))
        return both.chunk(2) if len(both) else (both, both)

    def compare(self, embeddings: Embeddings, samples: Samples) -> Tensor:
        """The loss between the views, all rows of the global batch as negatives."""
        return self.loss(*embeddings)

    def represent(self, images: Tensor) -> Tensor:
        """Representations (before the head) of images as they are: [n, C, H, W] to [n, D]."""
        if self.views.size:
            keys = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            images = make_view(images, keys, ViewSettings(size=self.views.size))
        return representations_of(self.encoder, images)

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """The temperature and the bias, which may be learned, and what the loss has counted."""
        found = {name: float(x) for name, x in self.loss.metrics.items()}
        if isinstance(scale := getattr(self.loss, "scale", None), Scale):
            found["temperature"] = 1 / float(scale())
        if (bias := getattr(self.loss, "bias", None)) is not None:
            found["bias"] = float(bias)
        return found
