"""Settings of the task that trains a one-step generator by the contrastive force."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from dist_contrastive.config.task import TaskSettingsBase
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.stream.order import nearest_multiples
from dist_contrastive.losses import FOR_RUNS, ContrastiveForce
from dist_contrastive.models import EncoderSettings, FeatureMapSettings, GeneratorSettings
from dist_contrastive.settings import Settings


class PixelFeatures(Settings):
    """The force acts on pixels, or on the coordinates of points."""

    name: Literal["pixels"]


class RunFeatures(Settings):
    """The force acts on what an encoder makes of images that an earlier run trained."""

    name: Literal["run"]
    run_dir: Path
    maps: FeatureMapSettings = FeatureMapSettings(kinds=("pooled",), patches=())
    """Which features; by default the representation alone."""


class EncoderFeatures(Settings):
    """The force acts on what any encoder makes of images, as a pretrained one of transformers."""

    name: Literal["encoder"]
    encoder: EncoderSettings
    maps: FeatureMapSettings = FeatureMapSettings(kinds=("pooled",), patches=())
    """Which features; by default the representation alone."""


FeatureSettings = Annotated[
    PixelFeatures | RunFeatures | EncoderFeatures, Field(discriminator="name")
]


class BankSettings(Settings):
    """Samples of past batches, as further data for each class."""

    capacity: PositiveInt
    """Samples of each class to keep; each rank keeps all of them."""
    positives: PositiveInt
    """How many of them are data in a step, for each class (and group) of the batch."""

    @model_validator(mode="after")
    def _holds_enough(self) -> Self:
        if self.positives > self.capacity:
            raise ValueError(
                f"positives={self.positives} of a bank of capacity={self.capacity}; set positives "
                f"to at most {self.capacity}"
            )
        return self


class GuidanceSettings(Settings):
    """Classifier-free guidance: samples of all classes push those of each class away."""

    unconditional: PositiveInt = 16
    """Samples of the bank that push, for each class (and group) of the batch."""
    strengths: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (1.0, 4.0)
    """Smallest and largest strength; each class draws one in each step, and the generator is told.
    1 is none."""
    power: NonNegativeFloat = 1.0
    """Strengths have a density of strength^-power."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.strengths
        if low > high:
            raise ValueError(f"strengths={self.strengths}; give the smaller one first")
        return self


class DriftSettings(TaskSettingsBase):
    """A one-step generator trained by the contrastive force."""

    labels_required: ClassVar[bool] = True

    name: Literal["drift"]
    generator: GeneratorSettings
    features: tuple[FeatureSettings, ...]
    """Spaces in which the force acts; their losses are added."""
    loss: Annotated[ContrastiveForce.Config, FOR_RUNS] = ContrastiveForce.Config()
    groups: PositiveInt = 1
    """Equal parts of the global batch that do not interact; 1: all of it does."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the averaged generator that `eval` and `sample` use; null: none, the last one."""
    bank: BankSettings | None = None
    guidance: GuidanceSettings | None = None

    @field_validator("features")
    @classmethod
    def _some_space(cls, features: tuple[FeatureSettings, ...]) -> tuple[FeatureSettings, ...]:
        if not features:
            raise ValueError("the force needs a space to act in; name one, as [{name: pixels}]")
        return features

    def check(self, data: DataConfig) -> None:
        """Labels, where there are some, are classes; whole groups."""
        super().check(data)
        if data.label is not None and data.num_classes is None:
            raise ValueError("the task drift generates by class; set data.num_classes")
        batch, groups = data.global_batch_size, self.groups
        if batch % groups or batch // groups < 2:
            raise ValueError(
                f"task.groups={groups} does not divide data.global_batch_size={batch} into equal "
                f"groups of 2 or more; set data.global_batch_size to "
                f"{nearest_multiples(batch, groups, 2 * groups)}"
            )
        if self.guidance is not None and (self.bank is None or data.num_classes is None):
            raise ValueError(
                "task.guidance pushes with samples of all classes from the bank; set task.bank, "
                "data.label and data.num_classes"
            )
