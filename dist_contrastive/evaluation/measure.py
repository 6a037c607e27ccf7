"""Measures of the user's own, which `eval` adds to its table."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import PositiveInt

from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.splits import Line, Splits, Table
from dist_contrastive.settings import Choice, ComponentSettings, Settings
from dist_contrastive.tasks.base import Task


class Measure(ABC):
    """Base of a measure of a trained task on held-out data.

    A config names a subclass by its import path, with the settings of its nested `Config`::

        evaluate: {measures: [{name: "my_package.measures:Spread", top: 3}]}
    """

    class Config(ComponentSettings):
        """Settings of a measure."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def lines(self, task: Task, splits: Splits[Samples]) -> list[Line]:
        """Rows of the table: (name, value, reference values by name).

        Args:
            task: with the trained weights, in evaluation mode.
            splits: all samples of data.train and data.test.
        """


DuringName = Literal["knn", "probe", "retrieval", "map", "samples"]
OnlineName = Literal["probe", "knn"]
_MEASURE = Choice("measure", Measure, {})


class EvaluateSettings(Settings):
    """What is measured during training, and what `eval` measures beside those of the task."""

    every: PositiveInt | None = None
    """Steps from one measurement of an encoder during training to the next, and the last step;
    null: none. Its numbers, as eval/knn, are in the row of metrics of that step."""
    during: tuple[DuringName, ...] = ("knn",)
    """What is measured then: knn (k = 5) and probe (linear, C = 1) learn classes from data.train
    and are tested on data.test, retrieval finds partners in data.test (task paired). Pictures, for
    RUN/plots and trackers: map, of held-out samples by label, and samples of a generator (task
    drift)."""
    weights: Literal["live", "ema"] = "live"
    """Of the encoder that is measured, then, by `eval` and by `embed`: those that are trained, or
    their moving average, of a task that keeps one (moco)."""
    limit: PositiveInt | None = 10_000
    """Samples of each split that are measured then, spread evenly over it; null: all."""
    online: tuple[OnlineName, ...] = ()
    """Learned from the features of the training batches, at every step: a linear probe, and a kNN
    (k = 5) among the last 4,096 rows. Their accuracies, as online/probe, are in every row of
    metrics; the encoder gets no gradient of them. () is none."""
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    """When embeddings collapse (embedding_std, effective_rank or recall_at_1 of ten rows of metrics
    in a row, after a tenth of the run): warn once, stop the run with exit code 70, or ignore it."""
    measures: tuple[Annotated[Measure.Config, _MEASURE], ...] = ()
    """Measures of your own, by import path, each with its settings."""


def measure_own(
    settings: EvaluateSettings, task: Task, splits: Splits[Samples], table: Table
) -> None:
    """Add the lines of the configured measures to the table, in their order.

    Raises:
        ConfigError: a measure returns something else than lines.
    """
    for config in settings.measures:
        returned: list[Any] = []  # not checked inside: what is no data's fault is not left out
        table.measure("own", config.name, partial(_call, config, task, splits, returned))
        for lines in returned:
            table.add(_checked(config, lines))


def _call(
    config: Measure.Config, task: Task, splits: Splits[Samples], returned: list[Any]
) -> list[Line]:
    returned.append(_MEASURE.build(config).lines(task, splits))
    return []


def _checked(config: Measure.Config, returned: Any) -> list[Line]:
    try:
        return [
            (str(name), float(value), {str(key): float(x) for key, x in beside.items()})
            for name, value, beside in returned
        ]
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"the measure {config.name} returned {returned!r}; return a list of "
            f"(name, value, reference values by name)"
        ) from None
