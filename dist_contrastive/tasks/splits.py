"""Training and held-out samples of a run, whole, for its evaluation."""

from dataclasses import dataclass

from torch import Tensor

from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.shards.index import concatenate
from dist_contrastive.errors import ConfigError

Line = tuple[str, float, dict[str, float]]
"""Name of a measure, its value, and the same measure of what it is to be compared with."""


@dataclass(frozen=True)
class Splits:
    """All samples of data.train and data.test, with the labels that training was not to use."""

    train: Samples
    test: Samples


def read_splits(config: RunConfig) -> Splits:
    """Both, which must fit in memory."""
    if config.data.test is None:
        raise ConfigError("eval needs data.test, a folder of held-out shards; set it for the run")
    indexes = [concatenate(found) for found in (config.data.open_train(), config.data.open_test())]
    return Splits(*(config.fields.read(index, range(len(index))) for index in indexes))


def with_labels(splits: Splits) -> Splits:
    """The samples of both that have a label.

    Raises:
        ConfigError: the data set has no labels, or in one of the two all are missing.
    """
    return Splits(_labelled(splits.train, "train"), _labelled(splits.test, "test"))


def labels_of(samples: Samples) -> Tensor:
    """The labels, which are there."""
    assert samples.labels is not None
    return samples.labels


def _labelled(samples: Samples, name: str) -> Samples:
    labels = samples.labels
    if labels is None:
        raise ConfigError(
            "eval measures this run by labels; set data.label to a field that holds them"
        )
    found = labels.isfinite() if labels.is_floating_point() else labels >= 0
    if not found.any():
        raise ConfigError(f"no sample of data.{name} has a label; eval needs some to measure by")
    return samples.rows(found.nonzero().flatten())
