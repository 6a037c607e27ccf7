"""Data of a training run: the stream, its labels, and batches on the device."""

import logging
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.data.collate import Batch
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.labels import (
    check_labels,
    keep_per_class,
    read_label_table,
    refuse_other_classes,
    with_class_names,
)
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.remote import is_url
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import join_sources
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.reader import Skipped
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.data.subset import Subset
from dist_contrastive.errors import DataError, UnreadableSample

logger = logging.getLogger(__name__)
Content = Tensor | tuple[str, ...] | None


class DeviceBatch(NamedTuple):
    """This rank's rows of one batch, on their device once they are `ready`."""

    keys: list[str]
    samples: Samples
    consumed: int  # samples of the stream over all ranks, this batch included
    skipped: list[Skipped]  # unreadable samples that were replaced
    copied: torch.cuda.Event | None = None  # after which the samples are on the GPU

    def ready(self) -> "DeviceBatch":
        """The same, when what is computed from now on may use the samples."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.samples.images.device)
            stream.wait_event(self.copied)
            self.samples.record_stream(stream)
        return self


@dataclass(frozen=True)
class TrainingData:
    """The stream, and what the task takes of its samples."""

    stream: ShardStream
    fields: Fields
    labels: Tensor | None  # of the whole data set, if the task trains with labels
    example: Samples  # the first sample: all others must have its shapes
    sources: list[Source]  # of data.train, one by one
    index: Source  # all of them as one

    def batches(self, device: torch.device) -> Generator[DeviceBatch]:
        """This rank's rows of each batch, on the device once they are `ready`.

        Raises:
            DataError, UnreachableError, LostWorkerError: as `ShardStream` and `samples`.
        """
        # Copies to a GPU are made by a stream of their own, beside what is being computed.
        copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        stream = self.stream
        with closing(iter(stream)) as batches:
            for batch in batches:
                samples = self.samples(batch)
                rows = DeviceBatch(
                    batch["__key__"], samples, stream.consumed, stream.take_skipped()
                )
                yield rows if copying is None else _copied(rows, device, copying)

    def samples(self, batch: Batch) -> Samples:
        """This rank's rows of a batch; labels that are not to be used count as missing.

        Raises:
            DataError: see `Fields.samples`; or rows of another shape than the first sample's,
                which would stop the networks of this rank alone.
        """
        samples = self.fields.samples(batch)
        self._check_shape(batch, self.fields.image, samples.images, self.example.images)
        if self.fields.pair is not None:
            self._check_shape(batch, self.fields.pair, samples.pair, self.example.pair)
        if self.labels is None:
            return samples
        return replace(samples, labels=self.labels[samples.index])

    def _check_shape(self, batch: Batch, name: str, rows: Content, first: Content) -> None:
        if batch["__key__"] and _shape(rows) != _shape(first):
            raise DataError(
                f"sample {batch['__key__'][0]} holds {_shape(rows)} in {name!r}, and the first "
                f"of the data set {_shape(first)}; set data.image_size and data.image_channels, "
                f"or pack samples of one shape"
            )


def _copied(batch: DeviceBatch, device: torch.device, stream: torch.cuda.Stream) -> DeviceBatch:
    """The batch on a GPU, from pinned memory, by this stream."""
    with torch.cuda.stream(stream):
        samples = batch.samples.pin_memory().to(device, non_blocking=True)
        return batch._replace(samples=samples, copied=stream.record_event())


def _shape(rows: Content) -> str:
    if isinstance(rows, Tensor):
        return " x ".join(map(str, rows.shape[1:])) or "a number"
    return "a text"


def open_data(
    config: DataConfig,
    *,
    seed: int,
    uses_labels: bool = False,
    labels_required: bool = False,
    consumed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sources: list[Source] | None = None,
) -> TrainingData:
    """The stream of a run from `consumed` samples on; an error of one rank is raised on all.

    Args:
        seed: of the order, of which labels are kept, and of texts that are drawn.
        uses_labels: labels take part in training.
        labels_required: each sample must have one.
        sources: `config.open_train()`, if they have been opened already.
    """
    fields = config.fields(labels_required, seed)
    with collectives.raised_together():
        sources = sources or config.open_train()
        index = join_sources(sources)
        fields.check(index, config.max_skipped)
        if rank == 0:  # `eval` will need data.test: now is the time to say what is wrong with it
            held_out, classes = config.open_test(), config.classes or ()
            refuse_other_classes(config.label, [*sources, *held_out], classes)
            for name in sorted(fields.names):
                if not all(source.has_field(name) for source in held_out):
                    logger.warning(f"data.test has no field {name!r}, by which `eval` measures")
            _warn_of_small_cache(config, sources)
    fields = with_class_names(fields, index)
    with collectives.raised_together():
        example = first_sample(fields, index, config.max_skipped)
    labels, balance, only = None, None, fields.names  # a sample whose label is damaged is skipped
    if uses_labels:
        labels = _training_labels(config, fields, index, seed)
        fields = fields.model_copy(update={"label": None})  # they are known
        if config.balance is not None:
            balance = Balance(labels, **config.balance.model_dump())
    with collectives.raised_together():
        stream = ShardStream(
            sources,
            config,
            seed=seed,
            rank=rank,
            world_size=world_size,
            consumed=consumed,
            balance=balance,
            weights=config.weights,
            only=only,
            transform=fields.prepare,
        )
    return TrainingData(stream, fields, labels, example, sources, index)


def _warn_of_small_cache(config: DataConfig, sources: list[Source]) -> None:
    """Blocks of remote shards are used until a lane has left their window."""
    whole = [source.source if isinstance(source, Subset) else source for source in sources]
    indexes = [source for source in whole if isinstance(source, ShardIndex)]
    sizes = [pair for x in indexes for pair in zip(x.shards, x.shard_bytes.tolist(), strict=True)]
    remote = sum(size for shard, size in sizes if is_url(shard))
    # Of a subset, a window reaches over as many more shards as it takes fewer samples.
    samples = sum(map(len, sources))
    window = 2 * config.lanes * config.shuffle_window * sum(size for _, size in sizes) // samples
    needed_mb = min(remote, window) >> 20
    if needed_mb > config.cache.limit_mb:
        logger.warning(
            f"data.cache.limit_mb={config.cache.limit_mb} is less than the {needed_mb} MiB of two "
            f"windows of all lanes: blocks may be fetched again and again; set it to that, or a "
            f"smaller data.shuffle_window"
        )


def first_sample(fields: Fields, index: Source, max_skipped: int) -> Samples:
    """The first one that can be read, after as many as may be skipped."""
    for number in range(min(max_skipped, len(index) - 1)):
        try:
            return fields.read(index, [number])
        except UnreadableSample:
            continue
    return fields.read(index, [min(max_skipped, len(index) - 1)])


def _training_labels(config: DataConfig, fields: Fields, index: Source, seed: int) -> Tensor:
    """Labels of all samples; those that are not to be used are missing."""
    labels = read_label_table(index, fields)
    if config.labels_per_class is not None:
        labels = keep_per_class(labels, config.labels_per_class, seed)
    check_labels(labels)
    return labels
