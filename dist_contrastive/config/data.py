"""Settings of the data."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from dist_contrastive.settings import Settings


class BalanceSettings(Settings):
    """Batches with equal numbers of samples of some classes; unlabelled samples fill the rest."""

    classes: PositiveInt
    """P, classes of a batch."""
    samples_per_class: PositiveInt
    """K, samples of each of them."""


class DataSettings(Settings):
    """Where samples come from, and what makes a global batch."""

    train: Path
    """Folder of indexed shards to train on."""
    test: Path | None = None
    """Folder of held-out shards for `eval`."""
    image: str = "png"
    """Field of a sample that holds the image, or, for generators of points, an array of numbers."""
    pair: str | None = None
    """Field that holds a second modality of the same sample, as `txt` or `npy`."""
    label: str | None = None
    """Field that holds a label, as `cls` or `json.label`; null without labels."""
    num_classes: PositiveInt | None = None
    """Labels are classes 0 ... num_classes - 1; null where they are continuous."""
    labels_per_class: PositiveInt | None = None
    """Train with the labels of so many samples of each class, chosen by the seed; the others count
    as unlabelled. null keeps all."""
    global_batch_size: int = Field(ge=2)
    """Samples of one step over all ranks: it defines the run, the number of ranks does not."""
    balance: BalanceSettings | None = None
    """Classes and samples of each in a batch; null takes samples as they come."""
    lanes: PositiveInt = 8
    """Parts in which an epoch is read; ranks x workers must divide it."""
    shuffle_window: PositiveInt = 4096
    """Samples of a lane that are shuffled among each other."""
    tail: Literal["carry", "drop"] = "carry"
    """What becomes of an epoch's rest that fills no batch."""
    num_workers: int = Field(default=0, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process."""

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.num_classes is not None and self.label is None:
            raise ValueError("num_classes without label; set label to the field with the classes")
        if self.labels_per_class is not None and self.num_classes is None:
            raise ValueError("labels_per_class needs classes; set label and num_classes")
        if self.balance is not None and self.num_classes is None:
            raise ValueError("balance needs classes; set label and num_classes")
        return self
