"""Self-supervised learning: views of a sample find each other among those of all others."""

import torch
from torch import Tensor

from dist_contrastive.config import TwoViewSettings
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.views import Views
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import build_loss
from dist_contrastive.losses.views import compare_views
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ImageTask, seen_shape

GLOBAL_VIEWS = 2


class TwoView(ImageTask):
    """Two global views of each sample, and with `crops` further ones (multi-crop)."""

    def __init__(self, settings: TwoViewSettings, example: Samples, seed: int) -> None:
        super().__init__(settings, example, seed)
        self.loss = build_loss(settings.loss)
        self.crops = settings.crops
        if self.crops:
            self._check_crops(self.crops.views)

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """The global views of every image, then its crops: [b, C, H, W] each."""
        views = self.make_views(samples, GLOBAL_VIEWS)
        if self.crops is None:
            return views
        return views + self.make_views(samples, self.crops.count, GLOBAL_VIEWS, self.crops.views)

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
