"""Settings of the data of a run: where samples come from, and how they become batches."""

from typing import Annotated, Self

from pydantic import Discriminator, NonNegativeInt, PositiveInt, Tag, model_validator

from dist_contrastive.data.fields import Fields, FieldsConfig
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.storage import BlockCache
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.settings import Settings


class SourceConfig(Settings):
    """One of several sources of samples."""

    shards: str
    """A folder of indexed shards or its URL, an index file, or a pattern of shards."""
    weight: PositiveInt | None = None
    """Samples of this source in every so many as all weights make together, for as long as the run
    lasts; null, then of all sources, reads them as one data set, each sample once an epoch."""


Shards = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[SourceConfig, ...], Tag("sources")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "sources"),
]
"""What `SourceConfig.shards` says; or several sources."""


class DataConfig(FieldsConfig, ShardStream.Config):
    """Where samples come from, and what makes a global batch."""

    train: Shards
    """Indexed shards to train on: a folder, a URL, a pattern, an index file; or several sources."""
    test: Shards | None = None
    """Held-out shards for `eval`."""
    labels_per_class: PositiveInt | None = None
    """Train with the labels of so many samples of each class, chosen by the seed; the others count
    as unlabelled. null keeps all."""
    balance: Balance.Config | None = None
    """Classes and samples of each in a batch; null takes samples as they come."""
    max_skipped: NonNegativeInt = 10
    """Different samples that may be unreadable or lack a field; each is replaced by another one and
    listed in skipped.jsonl. One more stops the run."""
    cache: BlockCache.Config = BlockCache.Config()
    """Of remote shards, on this machine's disk."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of `train`."""
        return _sources(self.train)

    @property
    def weights(self) -> list[int] | None:
        """The weights of the sources, if they have some."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    def open_train(self) -> list[ShardIndex]:
        """The index of each source of `train`. Raises: as `load_index`."""
        return [load_index(source.shards, self.cache) for source in self.sources]

    def open_test(self) -> list[ShardIndex]:
        """The index of each source of `test`; none without. Raises: as `load_index`."""
        return [load_index(source.shards, self.cache) for source in _sources(self.test or ())]

    def fields(self, labels_required: bool = False) -> Fields:
        """Where a sample holds what a task takes."""
        settings = {name: getattr(self, name) for name in FieldsConfig.model_fields}
        return Fields(**settings, labels_required=labels_required)

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if not self.sources or self.test == ():
            raise ValueError("train or test names no sources; give it some, or leave out test")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                "some sources of train have a weight, others not; give all one or none"
            )
        if any(weighted) and self.balance is not None:
            raise ValueError("weights and balance exclude each other; leave out one of them")
        if self.tail == "drop" and (any(weighted) or self.balance is not None):
            raise ValueError(
                "tail=drop is for epochs, and weights or balance have none; leave it out"
            )
        if any(source.weight is not None for source in _sources(self.test or ())):
            raise ValueError("sources of test are read whole; leave out their weights")
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.num_classes is not None and self.label is None:
            raise ValueError("num_classes without label; set label to the field with the classes")
        if self.labels_per_class is not None and self.num_classes is None:
            raise ValueError("labels_per_class needs classes; set label and num_classes")
        if self.balance is not None and self.num_classes is None:
            raise ValueError("balance needs classes; set label and num_classes")
        return self


def _sources(shards: Shards) -> tuple[SourceConfig, ...]:
    return (SourceConfig(shards=shards),) if isinstance(shards, str) else shards
