"""Self-supervised learning: views of a sample find each other among those of all others."""

from typing import Literal

import torch
from torch import Tensor, nn

from dist_contrastive.data.fields import Samples
from dist_contrastive.data.views import VIEWS, AnyViews, Views
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import PairLoss, ViewLoss, compare_views
from dist_contrastive.settings import Count, Settings
from dist_contrastive.tasks.base import DataInfo, Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ContrastiveTask, seen_shape

GLOBAL_VIEWS = 2


class CropsConfig(Settings):
    """Multi-crop: further, usually smaller, views that are compared with the two global ones."""

    count: Count
    """Crops of each sample."""
    views: AnyViews
    """Random changes of an image, drawn anew for each crop."""


class TwoView(ContrastiveTask):
    """Two global views of each sample, and with `crops` further ones (multi-crop)."""

    class Config(ContrastiveTask.Config):
        """Self-supervised learning of an encoder from two or more views of each sample."""

        name: Literal["two_view"] = "two_view"
        crops: CropsConfig | None = None
        """Further views of each sample (multi-crop); null: none."""
        loss: ViewLoss
        """Loss between views of the same samples, which needs no labels."""

    def __init__(
        self,
        config: Config,
        data: DataInfo,
        encoder: nn.Module | None = None,
        loss: PairLoss | None = None,
    ) -> None:
        super().__init__(config, data, encoder, loss)
        self.crops = config.crops
        if self.crops:
            self._check_crops(self.crops.views)
            self.crop_views: Views = VIEWS.build(self.crops.views)

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """The global views of every image, then its crops: [b, C, H, W] each."""
        views = self.make_views(samples, GLOBAL_VIEWS)
        if self.crops is None:
            return views
        return views + self.make_views(samples, self.crops.count, GLOBAL_VIEWS, self.crop_views)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Projections of all views: [b, D] each."""
        views, crops = inputs[:GLOBAL_VIEWS], inputs[GLOBAL_VIEWS:]
        return self.project(views) + (self.project(crops) if crops else ())

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The loss between views, all rows of the global batch as negatives."""
        return {"contrastive": compare_views(self.loss, embeddings, num_global=GLOBAL_VIEWS)}

    def _check_crops(self, views: Views.Config) -> None:
        shape = seen_shape(self.image_shape, views)
        try:
            with torch.no_grad():
                self.encoder(torch.zeros(1, *shape))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the encoder cannot read crops of {shape[1]} x {shape[2]} pixels "
                f"({str(error).splitlines()[0]}); set task.crops.views.size to that of the views, "
                f"or use an encoder of images of any size"
            ) from error
