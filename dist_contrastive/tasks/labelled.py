"""Learning from labels: samples with similar labels are drawn together, others apart."""

from torch import Tensor

from dist_contrastive.config import LabelledSettings
from dist_contrastive.data.fields import Samples
from dist_contrastive.losses import build_loss
from dist_contrastive.losses.views import compare_views
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ImageTask


class Labelled(ImageTask):
    """Similar are views of one sample, and samples whose labels are equal or near.

    A sample without a label is similar to its own views alone, so labelled and unlabelled samples
    may be mixed (semi-supervised).
    """

    def __init__(self, settings: LabelledSettings, example: Samples, seed: int) -> None:
        super().__init__(settings, example, seed)
        self.loss = build_loss(settings.loss)
        self.num_views = settings.num_views

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """Views of every image: [b, C, H, W] each."""
        return self.make_views(samples, self.num_views)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Projections of all views: [b, D] each."""
        return self.project(inputs)

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The loss over all pairs of views of the global batch."""
        num_views = len(embeddings)
        return {"contrastive": compare_views(self.loss, embeddings, samples.labels, num_views)}
