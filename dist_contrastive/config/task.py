"""What the settings of all tasks share."""

from typing import ClassVar

from dist_contrastive.data.config import DataConfig
from dist_contrastive.settings import Settings


class TaskSettingsBase(Settings):
    """Base of the settings of tasks."""

    uses_labels: ClassVar[bool] = False
    """Whether labels take part in training."""
    labels_required: ClassVar[bool] = False
    """Whether each sample must have one."""
    uses_pair: ClassVar[bool] = False
    """Whether a second modality of the samples takes part."""

    def check(self, data: DataConfig) -> None:
        """Raise ValueError, worded as a sentence, where the data does not fit the task."""
        for name in ("labels_per_class", "balance"):
            if getattr(data, name) is not None and not self.uses_labels:
                raise ValueError(
                    f"data.{name} is set, but the task does not train with labels; leave it out, "
                    f"or use the task labelled or hybrid"
                )
        if data.pair is not None and not self.uses_pair:
            raise ValueError(
                f"data.pair={data.pair} is set, but the task has no second modality; leave it out, "
                f"or use the task paired"
            )
        if self.uses_labels and data.label is None:
            raise ValueError("the task needs labels; set data.label to the field that holds them")
