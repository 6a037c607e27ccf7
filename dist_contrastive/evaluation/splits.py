"""Training and held-out samples of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError

Line = tuple[str, float, dict[str, float]]
"""Name of a measure, its value, and reference values by name, as the same measure of raw pixels."""


@dataclass(frozen=True)
class Splits:
    """All samples of data.train and data.test, with the labels that training was not to use."""

    train: Samples
    test: Samples
    classes: Mapping[int, str] = field(
        default_factory=dict
    )  # names by number, where they are known


def with_labels(splits: Splits) -> Splits:
    """Labelled samples of both splits.

    Raises:
        ConfigError: the data set has no labels, or in one of the two all are missing.
    """
    return replace(
        splits, train=_labelled(splits.train, "train"), test=_labelled(splits.test, "test")
    )


def labels_of(samples: Samples) -> Tensor:
    """Labels of samples that have them."""
    assert samples.labels is not None
    return samples.labels


def _labelled(samples: Samples, name: str) -> Samples:
    labels = samples.labels
    if labels is None:
        raise ConfigError(
            "eval measures this run by labels; set data.label to a field that holds them"
        )
    is_labelled = labels.isfinite() if labels.is_floating_point() else labels >= 0
    if not is_labelled.any():
        raise ConfigError(f"no sample of data.{name} has a label; eval needs some to measure by")
    return samples.rows(is_labelled.nonzero().flatten())
