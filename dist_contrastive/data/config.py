"""Settings of the data of a run: where samples come from, and how they become batches."""

from typing import Annotated, Self

from PIL import ImageColor
from pydantic import AfterValidator, NonNegativeInt, PositiveInt, model_validator

from dist_contrastive.data.fields import Fields, FieldsConfig
from dist_contrastive.data.shards.encoding import WHITE
from dist_contrastive.data.shards.storage import BlockCache
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import AnySources, configs_of, open_source
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.shard_stream import ShardStream


def _colour(name: str) -> str:
    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ValueError("no such colour; give one as white, black or '#8899aa'") from None
    return name


class DataConfig(FieldsConfig, ShardStream.Config):
    """Where samples come from, and what makes a global batch."""

    train: AnySources
    """Indexed shards to train on: a folder, a URL, a pattern, an index file; or a source, or
    several."""
    test: AnySources | None = None
    """Held-out samples for `eval`."""
    labels_per_class: PositiveInt | None = None
    """Train with the labels of so many samples of each class, chosen by the seed; the others count
    as unlabelled. null keeps all."""
    balance: Balance.Config | None = None
    """Classes and samples of each in a batch; null takes samples as they come."""
    background: Annotated[str, AfterValidator(_colour)] = WHITE
    """Colour behind images of shards that are transparent in places: a name, or '#rrggbb'."""
    max_skipped: NonNegativeInt = 10
    """Different samples that may be unreadable or lack a field; each is replaced by another one and
    listed in skipped.jsonl. One more stops the run."""
    cache: BlockCache.Config = BlockCache.Config()
    """Of remote shards, on this machine's disk."""

    @property
    def sources(self) -> tuple[Source.Config, ...]:
        """The sources of `train`."""
        return configs_of(self.train)

    @property
    def weights(self) -> list[int] | None:
        """The weights of the sources, if they have some."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    def open_train(self) -> list[Source]:
        """Each source of `train`. Raises: as `open_source`."""
        return [open_source(source, self.cache, self.background) for source in self.sources]

    def open_test(self) -> list[Source]:
        """Each source of `test`; none without. Raises: as `open_source`."""
        sources = configs_of(self.test or ())
        return [open_source(source, self.cache, self.background) for source in sources]

    def fields(self, labels_required: bool = False, seed: int = 0) -> Fields:
        """Where a sample holds what a task takes; the seed draws among several texts."""
        settings = {name: getattr(self, name) for name in FieldsConfig.model_fields}
        return Fields(**settings, labels_required=labels_required, seed=seed)

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
        if any(source.weight is not None for source in configs_of(self.test or ())):
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
