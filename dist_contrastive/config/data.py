"""Settings of the data."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from dist_contrastive.data.shards.block_cache import CacheSettings
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.index_file import load_index
from dist_contrastive.data.stream.order import Tail
from dist_contrastive.data.stream.workers import StartMethod
from dist_contrastive.settings import Settings


class SourceSettings(Settings):
    """One of several sources of samples."""

    shards: str
    """A folder of indexed shards or its URL, an index file, or a pattern of shards."""
    weight: PositiveInt | None = None
    """Samples of this source in every so many as all weights make together, for as long as the run
    lasts; null, then of all sources, reads them as one data set, each sample once an epoch."""


Shards = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[SourceSettings, ...], Tag("sources")],
    Discriminator(lambda given: "text" if isinstance(given, str) else "sources"),
]
"""What `SourceSettings.shards` says; or several sources."""


class BalanceSettings(Settings):
    """Batches with equal numbers of samples of some classes; unlabelled samples fill the rest."""

    classes: PositiveInt
    """P, classes of a batch."""
    samples_per_class: PositiveInt
    """K, samples of each of them."""


class DataSettings(Settings):
    """Where samples come from, and what makes a global batch."""

    train: Shards
    """Indexed shards to train on: a folder, a URL, a pattern, an index file; or several sources."""
    test: Shards | None = None
    """Held-out shards for `eval`."""
    image: str = "png"
    """Field of a sample that holds the image, or, for generators of points, an array of numbers."""
    image_size: PositiveInt | None = None
    """Pixels: images are scaled so that their shorter side has as many, and cut to the square in
    the middle; null for images of one size."""
    image_channels: Literal[1, 3] | None = None
    """1 makes all images gray, 3 makes gray ones RGB; null for images that are alike."""
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
    """Parts in which an epoch is read; the number of ranks must divide it."""
    shuffle_window: PositiveInt = 4096
    """Samples of a lane that are shuffled among each other."""
    tail: Tail = "carry"
    """What becomes of an epoch's rest that fills no batch."""
    num_workers: int = Field(default=0, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process."""
    prefetch_factor: PositiveInt = 2
    """Batches by which they may be ahead, which bounds their memory."""
    worker_start: StartMethod = "fork"
    """How they are started; spawn and forkserver take seconds longer, and share no memory."""
    max_skipped: NonNegativeInt = 10
    """Different samples that may be unreadable or lack a field; each is replaced by another one and
    listed in skipped.jsonl. One more stops the run."""
    cache: CacheSettings = CacheSettings()
    """Of remote shards, on this machine's disk."""

    @property
    def sources(self) -> tuple[SourceSettings, ...]:
        """Those of `train`."""
        return _sources(self.train)

    @property
    def weights(self) -> list[int] | None:
        """Those of the sources, if they have some."""
        found = [source.weight for source in self.sources if source.weight is not None]
        return found or None

    def open_train(self) -> list[ShardIndex]:
        """The index of each source of `train`. Raises: as `load_index`."""
        return [load_index(source.shards, self.cache) for source in self.sources]

    def open_test(self) -> list[ShardIndex]:
        """The index of each source of `test`; none without. Raises: as `load_index`."""
        return [load_index(source.shards, self.cache) for source in _sources(self.test or ())]

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if not self.sources or self.test == ():
            raise ValueError("train or test names no sources; give it some, or leave out test")
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError(
                "some sources of train have a weight, others not; give all one or none"
            )
        if any(given) and self.balance is not None:
            raise ValueError("weights and balance exclude each other; leave out one of them")
        if self.tail == "drop" and (any(given) or self.balance is not None):
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


def _sources(shards: Shards) -> tuple[SourceSettings, ...]:
    return (SourceSettings(shards=shards),) if isinstance(shards, str) else shards
