"""Training and held-out samples of a run, whole, for its evaluation."""

from dataclasses import dataclass

from torch import Tensor

from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.index import ShardIndex
from dist_contrastive.errors import ConfigError

Line = tuple[str, float, dict[str, float]]
"""Name of a measure, its value, and the same measure of what it is to be compared with."""


@dataclass(frozen=True)
class Splits:
    """Samples that have a label, those that training was not to use included."""

    train: Samples
    test: Samples


def read_splits(config: RunConfig) -> Splits:
    """All labelled samples of data.train and data.test."""
    data = config.data
    if data.test is None or data.label is None:
        raise ConfigError("eval needs data.test (held-out shards) and data.label in the config")
    train, test = ShardIndex.load(data.train), ShardIndex.load(data.test)
    fields = config.fields
    return Splits(*(_labelled(fields.read(i, range(len(i)))) for i in (train, test)))


def labels_of(samples: Samples) -> Tensor:
    """The labels, which are there."""
    assert samples.labels is not None
    return samples.labels


def _labelled(samples: Samples) -> Samples:
    labels = labels_of(samples)
    found = labels.isfinite() if labels.is_floating_point() else labels >= 0
    kept = found.nonzero().flatten()
    if not len(kept):
        raise ConfigError("no sample of data.train or data.test has a label; eval needs some")
    return samples.rows(kept)
