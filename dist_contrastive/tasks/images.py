"""Base of the tasks that train an encoder of images: encoder, projection head, views."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_contrastive.data.fields import Samples
from dist_contrastive.data.views import VIEWS, AnyViews, RandomViews, Views, make_view, view_keys
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import AnyLoss, build_loss
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.models import (
    AnyEncoder,
    Encoder,
    ProjectionHead,
    build_encoder,
    device_of,
    representations_of,
)
from dist_contrastive.tasks.base import (
    DataInfo,
    Embeddings,
    StepContext,
    Task,
    check_loss,
    scalars_of,
)


class ImageTask(Task):
    """Base of the tasks with an encoder of images."""

    class Config(Task.Config):
        """Settings of the tasks that train an encoder of images."""

        encoder: AnyEncoder
        """Network from images to representations, which `eval` measures."""
        head: ProjectionHead.Config = ProjectionHead.Config()
        """Network from representations to the embeddings that the loss compares."""
        views: AnyViews = RandomViews.Config()
        """Random changes of an image, drawn anew for each view."""

    def __init__(self, config: Config, data: DataInfo, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.seed = config, data.seed
        self.views: Views = VIEWS.build(config.views)
        self.image_shape = _image_shape(data.example.images)
        shape = seen_shape(self.image_shape, config.views)
        self.encoder = build_encoder(config.encoder, shape) if encoder is None else encoder
        self.dim = _output_dim(self.encoder, shape)
        self.head = ProjectionHead(config.head, self.dim)

    def make_views(
        self, samples: Samples, count: int, first: int = 0, views: Views | None = None
    ) -> tuple[Tensor, ...]:
        """Views number first, first + 1, ... of every image: [b, C, H, W] each."""
        numbers = range(first, first + count)
        keys = (view_keys(self.seed, samples.epoch, samples.index, number) for number in numbers)
        views = views or self.views
        return tuple(views(samples.images, key) for key in keys)

    def project(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Projections [b, D] of views of one size, in one pass through the encoder."""
        return in_equal_parts(self.head(self.encoder(torch.cat(views))), len(views))

    def represent(self, images: Tensor) -> Tensor:
        """Representations (before the head) of images as they are: [n, C, H, W] to [n, D]."""
        return representations_of(self.encoder, self.as_seen(images))

    @torch.no_grad()
    def embed_representations(self, representations: Tensor) -> Tensor:
        """Representations [n, D'] to what the loss compares [n, D]."""
        there = device_of(self, representations.device)
        return self.head(representations.to(there)).to(representations.device)

    def as_seen(self, images: Tensor) -> Tensor:
        """Images of the size that the encoder was trained on, otherwise unchanged."""
        if not self.views.config.size:
            return images
        keys = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return make_view(images, keys, RandomViews.Config(size=self.views.config.size))

    def use_averages(self) -> dict[str, nn.Module]:
        """Put the moving averages of networks, which momentum copies are, in their places.

        Returns:
            The networks that were there, by name.
        Raises:
            ConfigError: there is none of the encoder.
        """
        copies = {id(module): copy.module for copy, module in self.momentum_copies().values()}
        own = {name: x for name, x in self.named_children() if id(x) in copies}
        if "encoder" not in own:
            raise ConfigError(
                f"evaluate.weights=ema, but the task {self.config.name} keeps no moving average of "
                f"its encoder; set evaluate.weights=live, or use a task that keeps one, as moco"
            )
        for name, network in own.items():
            setattr(self, name, copies[id(network)])
        return own

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context of `use_averages`."""
        own = self.use_averages()
        try:
            yield
        finally:
            for name, network in own.items():
                setattr(self, name, network)

    def pairs(self, embeddings: Embeddings) -> tuple[Tensor, Tensor] | None:
        """The first two views, or the two modalities."""
        return (embeddings[0], embeddings[1]) if len(embeddings) > 1 else None


class ContrastiveTask(ImageTask):
    """Base of the image tasks with one loss, which the setting ``loss`` names."""

    class Config(ImageTask.Config):
        """Settings of the image tasks with one loss."""

        loss: AnyLoss
        """Loss over the embeddings of the global batch."""

    def __init__(
        self,
        config: Config,
        data: DataInfo,
        encoder: nn.Module | None = None,
        loss: PairLoss | None = None,
    ) -> None:
        super().__init__(config, data, encoder)
        if loss is not None:
            check_loss(loss, config)
        self.loss = build_loss(config.loss) if loss is None else loss

    @torch.no_grad()
    def scalars(self, context: StepContext) -> dict[str, float]:
        """Metrics of the step, and learnable scalars of the loss."""
        return {**super().scalars(context), **scalars_of(self.loss)}


def seen_shape(image_shape: tuple[int, int, int], views: Views.Config) -> tuple[int, int, int]:
    """(channels, height, width) of a view of an image."""
    channels, height, width = image_shape
    return channels, views.size or height, views.size or width


def in_equal_parts(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Equal consecutive parts; `chunk` makes fewer of no rows."""
    return rows.split(len(rows) // count) if len(rows) else (rows,) * count


def _image_shape(images: Tensor) -> tuple[int, int, int]:
    """(channels, height, width) of images [n, C, H, W] in [0, 1]; other arrays are refused."""
    shape, (low, high) = images.shape[1:], images.aminmax()
    if len(shape) != 3 or low < 0 or high > 1:
        raise ConfigError(
            f"data.image names a field of arrays (shape {list(shape)}, first values from {low:.3g} "
            f"to {high:.3g}), but an encoder of images needs [C, H, W] in [0, 1]; name a field of "
            f"images, as png, set data.image_range=[LOW, HIGH] to scale arrays of that shape, or "
            f"train a generator with the task drift"
        )
    channels, height, width = shape
    if min(channels, height) > 3 and width in (1, 3):
        raise ConfigError(
            f"data.image names a field of arrays [H, W, C] (shape {list(shape)}), but an encoder "
            f"of images needs [C, H, W]; store them so, as `shards pack arrays --image` does"
        )
    return channels, height, width


def _output_dim(encoder: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """D of the output [b, D]; of a module of the user's own, from one black image."""
    if isinstance(encoder, Encoder):
        return encoder.dim
    mode, like = encoder.training, next(encoder.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            output = encoder.eval()(like.new_zeros(1, *image_shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the encoder {type(encoder).__name__} cannot read images of shape {image_shape} "
            f"(channels, height, width): {str(error).splitlines()[0]}; pass one that can"
        ) from error
    finally:
        encoder.train(mode)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
        made = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"the encoder {type(encoder).__name__} makes {made} of one image, and the task needs a "
            f"row of D numbers, (1, D); pool its output"
        )
    return output.shape[1]
