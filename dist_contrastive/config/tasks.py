"""Settings of the tasks: what is trained by which objective.

Each says what it needs of the data, so that a config that cannot work is refused before any data is
read.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator

from dist_contrastive.config.drift import DriftSettings
from dist_contrastive.config.task import TaskSettingsBase
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.stream.order import nearest_multiples
from dist_contrastive.data.views import AnyViews, RandomViews
from dist_contrastive.losses import FOR_RUNS, AnyLoss, InfoNCE, LabelLoss, PairedLoss, ViewLoss
from dist_contrastive.losses.classification import PathCrossEntropy
from dist_contrastive.losses.policy_gradient import PolicyGradient
from dist_contrastive.losses.self_diagonal import SelfDiagonal
from dist_contrastive.models import (
    EncoderSettings,
    PairEncoderSettings,
    ProjectionHeadSettings,
)
from dist_contrastive.schedule import Schedule
from dist_contrastive.settings import Settings


class _ImageTaskSettings(TaskSettingsBase):
    """What tasks that train an encoder of images share."""

    encoder: EncoderSettings
    head: ProjectionHeadSettings = ProjectionHeadSettings()
    views: AnyViews = RandomViews.Config()


class CropSettings(Settings):
    """Multi-crop: further, usually smaller, views that are compared with the two global ones."""

    count: PositiveInt
    views: AnyViews


class TwoViewSettings(_ImageTaskSettings):
    """Self-supervised learning of an encoder from two or more views of each sample."""

    name: Literal["two_view"]
    crops: CropSettings | None = None
    loss: ViewLoss


class LabelledSettings(_ImageTaskSettings):
    """An encoder learns what is similar from labels; some or most of them may be missing."""

    uses_labels: ClassVar[bool] = True

    name: Literal["labelled"]
    num_views: PositiveInt = 2
    """Views of each sample; they are similar to each other whether it has a label or not."""
    loss: LabelLoss

    def check(self, data: DataConfig) -> None:
        """Labels of the kind that the loss is set for."""
        super().check(data)
        max_delta = self.loss.max_delta
        if (data.num_classes is None) != (max_delta is not None):
            raise ValueError(
                f"task.loss.max_delta={max_delta} with data.num_classes={data.num_classes}; set "
                f"num_classes for classes, or max_delta, the largest difference of similar "
                f"samples, for continuous labels"
            )
        if self.num_views == 1 and data.labels_per_class == 1:
            raise ValueError(
                "task.num_views=1 with data.labels_per_class=1 leaves no two rows that are "
                "similar; set one of them to 2 or more"
            )


class MocoSettings(_ImageTaskSettings):
    """Queries find keys of a momentum encoder among the batch and a queue of past keys."""

    name: Literal["moco"]
    loss: Annotated[InfoNCE.Config, FOR_RUNS]
    queue_size: PositiveInt
    """Past keys to compare with; a multiple of the global batch."""
    momentum: float = Field(default=0.99, ge=0, le=1)
    """Of the key encoder at the start; it grows to 1 along a cosine."""

    def check(self, data: DataConfig) -> None:
        """Whole batches in the queue."""
        super().check(data)
        size, batch = self.queue_size, data.global_batch_size
        if size % batch:
            raise ValueError(
                f"task.queue_size={size} does not hold whole batches of "
                f"data.global_batch_size={batch}; set {nearest_multiples(size, batch, batch)}"
            )


class PairTowerSettings(Settings):
    """The network of the second modality."""

    encoder: PairEncoderSettings
    head: ProjectionHeadSettings = ProjectionHeadSettings()


class PairedSettings(_ImageTaskSettings):
    """Two towers: an image finds the text, or another modality, of its own sample."""

    uses_pair: ClassVar[bool] = True

    name: Literal["paired"]
    pair: PairTowerSettings
    loss: PairedLoss

    def check(self, data: DataConfig) -> None:
        """A second modality, embedded in the same space."""
        super().check(data)
        if data.pair is None:
            raise ValueError("the task paired needs data.pair, the field of the second modality")
        if self.head.out != self.pair.head.out:
            raise ValueError(
                f"task.head.out={self.head.out} and "
                f"task.pair.head.out={self.pair.head.out} differ; both towers must embed into the "
                f"same space: set equal sizes"
            )


class SupervisedSettings(PathCrossEntropy.Config):
    """Cross-entropy of the classifier."""

    weight: Schedule = 1.0

    @field_validator("level_weights")
    @classmethod
    def _some_level_counts(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and not any(weights):
            raise ValueError("all are 0; give one level a weight, or leave out supervised")
        return weights


class RewardSettings(PolicyGradient.Config):
    """Policy gradient on decisions that are sampled from the classifier."""

    weight: Schedule = 1.0
    function: str = "dist_contrastive.losses.rewards:depth_credit"
    """MODULE:NAME of (decisions, labels, hierarchy) -> rewards."""
    draws: PositiveInt = 1
    """Decisions sampled for each view of a sample."""


class ContrastiveSettings(Settings):
    """Any loss over pairs, on the projections."""

    weight: Schedule = 1.0
    loss: AnyLoss = SelfDiagonal.Config()


class HybridSettings(_ImageTaskSettings):
    """total = w0 * supervised + w1 * reward + w2 * contrastive, over one encoder."""

    uses_labels: ClassVar[bool] = True

    name: Literal["hybrid"]
    num_views: PositiveInt = 2
    """Views of each sample; all are classified and compared."""
    hierarchy: Any = None
    """Groups of classes, as {round: [0, 6, 8, 9], straight: [1, 4, 7]}, nested to any depth; null:
    the classes side by side."""
    supervised: SupervisedSettings | None = None
    reward: RewardSettings | None = None
    contrastive: ContrastiveSettings | None = None

    @field_validator("supervised", "reward", "contrastive")
    @classmethod
    def _without_weight_is_absent(cls, term: Any) -> Any:
        return None if term is not None and term.weight == 0 else term

    def check(self, data: DataConfig) -> None:
        """Classes, and something to learn."""
        super().check(data)
        if data.num_classes is None:
            raise ValueError("the task hybrid classifies; set data.num_classes")
        if self.supervised is self.reward is self.contrastive is None:
            raise ValueError(
                "task supervised, reward and contrastive are all absent or have weight 0; give one "
                "of them a weight"
            )


ImageTaskSettings = (
    TwoViewSettings | LabelledSettings | MocoSettings | PairedSettings | HybridSettings
)
TaskSettings = Annotated[ImageTaskSettings | DriftSettings, Field(discriminator="name")]
