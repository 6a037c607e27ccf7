"""What a run reads: the stream, and the labels that it trains with."""

from dataclasses import dataclass, replace

from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.checkpoint import Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.collate import Batch
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.labels import check_labels, keep_per_class, read_label_table
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.index_file import load_index
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.errors import DataError

Content = Tensor | tuple[str, ...] | None


@dataclass(frozen=True)
class TrainingData:
    """The stream, and what the task takes of its samples."""

    stream: ShardStream
    fields: Fields
    labels: Tensor | None  # of the whole data set, if the task trains with labels
    example: Samples  # the first sample: all others must have its shapes

    def samples(self, batch: Batch) -> Samples:
        """This rank's rows of a batch; labels that are not to be used count as missing.

        Raises:
            DataError: see `Fields.samples`; or rows of another shape than the first sample's,
                which would stop the networks of this rank alone.
        """
        samples, first = self.fields.samples(batch), self.example
        both: list[tuple[str, Content, Content]] = [
            (self.fields.image, samples.images, first.images)
        ]
        if self.fields.pair is not None:
            both.append((self.fields.pair, samples.pair, first.pair))
        for name, mine, its in both:
            if batch["__key__"] and _shape(mine) != _shape(its):
                raise DataError(
                    f"sample {batch['__key__'][0]} holds {_shape(mine)} in {name!r}, and the first "
                    f"of the data set {_shape(its)}; pack samples of one shape"
                )
        if self.labels is None:
            return samples
        return replace(samples, labels=self.labels[samples.index])


def _shape(rows: Content) -> str:
    if isinstance(rows, Tensor):
        return " x ".join(map(str, rows.shape[1:])) or "a number"
    return "a text"


def open_data(config: RunConfig, progress: Progress, rank: int, world_size: int) -> TrainingData:
    """The stream from where the run is; what is wrong on one rank is raised on all."""
    data, fields = config.data, config.fields
    with collectives.raised_together():
        index = load_index(data.train)
        example = fields.read(index, [0])
    labels, balance = None, None
    if config.task.uses_labels:
        labels = _training_labels(config, index)
        fields = replace(fields, label=None)  # they are known
        if data.balance is not None:
            balance = Balance(labels, data.balance.classes, data.balance.samples_per_class)
    with collectives.raised_together():
        stream = ShardStream(
            index,
            global_batch_size=data.global_batch_size,
            lanes=data.lanes,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            num_workers=data.num_workers,
            consumed=progress.consumed,
            shuffle_window=data.shuffle_window,
            tail=data.tail,
            balance=balance,
            only=fields.names,
        )
    return TrainingData(stream, fields, labels, example)


def _training_labels(config: RunConfig, index: ShardIndex) -> Tensor:
    """Labels of all samples; those that are not to be used are missing."""
    labels = read_label_table(index, config.fields)
    if config.data.labels_per_class is not None:
        labels = keep_per_class(labels, config.data.labels_per_class, config.seed)
    check_labels(labels)
    return labels
