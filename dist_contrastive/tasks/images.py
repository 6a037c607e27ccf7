"""What tasks that train an encoder of images share: encoder, projection head, views."""

import torch
from torch import Tensor

from dist_contrastive.config.tasks import ImageTaskSettings
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.views import RandomViews, Views, make_view, view_keys
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.models import build_encoder, build_head, representations_of
from dist_contrastive.tasks.base import Embeddings, StepContext, Task, scalars_of


class ImageTask(Task):
    """Base of the tasks with an encoder of images."""

    loss: PairLoss
    """Of tasks with a single one."""

    def __init__(self, settings: ImageTaskSettings, example: Samples, seed: int) -> None:
        super().__init__()
        self.views = settings.views
        self.image_shape = _image_shape(example.images)
        self.encoder = build_encoder(settings.encoder, seen_shape(self.image_shape, settings.views))
        self.head = build_head(settings.head, self.encoder.dim)
        self.seed = seed

    def make_views(
        self, samples: Samples, count: int, first: int = 0, views: Views.Config | None = None
    ) -> tuple[Tensor, ...]:
        """Views number first, first + 1, ... of every image: [b, C, H, W] each."""
        numbers = range(first, first + count)
        keys = (view_keys(self.seed, samples.epoch, samples.index, number) for number in numbers)
        return tuple(make_view(samples.images, key, views or self.views) for key in keys)

    def project(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Projections [b, D] of views of one size, in one pass through the encoder."""
        return in_equal_parts(self.head(self.encoder(torch.cat(views))), len(views))

    def represent(self, images: Tensor) -> Tensor:
        """Representations (before the head) of images as they are: [n, C, H, W] to [n, D]."""
        return representations_of(self.encoder, self.as_seen(images))

    def as_seen(self, images: Tensor) -> Tensor:
        """Images of the size that the encoder was trained on, otherwise unchanged."""
        if not self.views.size:
            return images
        keys = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return make_view(images, keys, RandomViews.Config(size=self.views.size))

    def pairs(self, embeddings: Embeddings) -> tuple[Tensor, Tensor] | None:
        """The first two views, or the two modalities."""
        return (embeddings[0], embeddings[1]) if len(embeddings) > 1 else None

    @torch.no_grad()
    def scalars(self, context: StepContext) -> dict[str, float]:
        """Metrics of the step, and learnable scalars of the loss."""
        return {**super().scalars(context), **scalars_of(self.loss)}


def seen_shape(image_shape: tuple[int, int, int], views: Views.Config) -> tuple[int, int, int]:
    """(channels, height, width) of a view of an image."""
    channels, height, width = image_shape
    return channels, views.size or height, views.size or width


def _image_shape(images: Tensor) -> tuple[int, int, int]:
    """(channels, height, width) of images [n, C, H, W] in [0, 1]; other arrays are refused."""
    shape, (low, high) = images.shape[1:], images.aminmax()
    if len(shape) != 3 or low < 0 or high > 1:
        raise ConfigError(
            f"data.image names a field of arrays (shape {list(shape)}, first values from {low:.3g} "
            f"to {high:.3g}), but an encoder of images needs images in [0, 1]; name a field of "
            f"8-bit images, as png, or train a generator with the task drift"
        )
    channels, height, width = shape
    return channels, height, width


def in_equal_parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Equal consecutive parts; `chunk` makes fewer of no rows."""
    return rows.split(len(rows) // count) if len(rows) else (rows,) * count
