"""Learning from labels: samples with similar labels are drawn together, others apart."""

from typing import ClassVar, Literal

from torch import Tensor

from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.losses import LabelLoss, compare_views
from dist_contrastive.settings import Count
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ContrastiveTask


class Labelled(ContrastiveTask):
    """Similar are views of one sample, and samples whose labels are equal or near.

    A sample without a label is similar to its own views alone, so labelled and unlabelled samples
    may be mixed (semi-supervised).
    """

    class Config(ContrastiveTask.Config):
        """An encoder learns what is similar from labels; some or most of them may be missing."""

        uses_labels: ClassVar[bool] = True

        name: Literal["labelled"] = "labelled"
        num_views: Count = 2
        """Views of each sample; they are similar to each other whether it has a label or not."""
        loss: LabelLoss
        """Loss of embeddings and labels."""

        def check(self, data: DataConfig) -> None:
            """Labels of the kind that the loss is set for."""
            super().check(data)
            max_delta = self.loss.max_delta
            if (data.num_classes is None) != (max_delta is not None):
                raise ValueError(
                    f"task.loss.max_delta={max_delta} with data.num_classes={data.num_classes}; "
                    f"set num_classes for classes, or max_delta, the largest difference of similar "
                    f"samples, for continuous labels"
                )
            if self.num_views == 1 and data.labels_per_class == 1:
                raise ValueError(
                    "task.num_views=1 with data.labels_per_class=1 leaves no two rows that are "
                    "similar; set one of them to 2 or more"
                )

        def check_labels(self, labels: Tensor) -> None:
            """Pairs of the kinds that the loss needs."""
            self.loss.check_labels(labels, self.num_views)

    config: Config

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """Views of every image: [b, C, H, W] each."""
        return self.make_views(samples, self.config.num_views)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Projections of all views: [b, D] each."""
        return self.project(inputs)

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The loss over all pairs of views of the global batch."""
        num_views = len(embeddings)
        return {"contrastive": compare_views(self.loss, embeddings, samples.labels, num_views)}
