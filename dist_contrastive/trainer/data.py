"""What a run reads: the stream, and the labels that it trains with."""

import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.checkpoint import Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.collate import Batch
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.labels import check_labels, keep_per_class, read_label_table
from dist_contrastive.data.shards.index import ShardIndex, concatenate
from dist_contrastive.data.shards.locations import is_url
from dist_contrastive.data.stream.balanced import Balance
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.data.stream.unreadable import Skipped
from dist_contrastive.errors import DataError, UnreadableSample

Content = Tensor | tuple[str, ...] | None


class Taken(NamedTuple):
    """This rank's rows of one batch, and what there is to tell of them."""

    keys: list[str]
    samples: Samples
    consumed: int  # samples of the stream over all ranks, this batch included
    skipped: list[Skipped]
    copied: torch.cuda.Event | None = None  # after which they are on the GPU

    def ready(self) -> "Taken":
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
    sources: list[ShardIndex]  # the index of each source of data.train
    index: ShardIndex  # of all of them

    def batches(self, device: torch.device) -> Generator[Taken]:
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
                taken = Taken(batch["__key__"], samples, stream.consumed, stream.take_skipped())
                yield taken if copying is None else _copied(taken, device, copying)

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
                    f"of the data set {_shape(its)}; set data.image_size and data.image_channels, "
                    f"or pack samples of one shape"
                )
        if self.labels is None:
            return samples
        return replace(samples, labels=self.labels[samples.index])


def _copied(taken: Taken, device: torch.device, stream: torch.cuda.Stream) -> Taken:
    """On a GPU, from pinned memory, by this stream."""
    with torch.cuda.stream(stream):
        samples = taken.samples.pin_memory().to(device, non_blocking=True)
        return taken._replace(samples=samples, copied=stream.record_event())


def _shape(rows: Content) -> str:
    if isinstance(rows, Tensor):
        return " x ".join(map(str, rows.shape[1:])) or "a number"
    return "a text"


def open_data(
    config: RunConfig,
    progress: Progress,
    rank: int,
    world_size: int,
    indexes: list[ShardIndex] | None = None,
) -> TrainingData:
    """The stream from where the run is; what is wrong on one rank is raised on all.

    Args:
        indexes: of the sources of data.train, if they have been opened already.
    """
    data, fields = config.data, config.fields
    with collectives.raised_together():
        indexes = indexes or data.open_train()
        index = concatenate(indexes)
        fields.check(index, data.max_skipped)
        if rank == 0:
            data.open_test()  # `eval` will need it: now is the time to say that it is not there
            _warn_of_small_cache(config, index)
        example = _first_sample(fields, index, data.max_skipped)
    labels, balance, only = None, None, fields.names  # a sample whose label is damaged is skipped
    if config.task.uses_labels:
        labels = _training_labels(config, index)
        fields = replace(fields, label=None)  # they are known
        if data.balance is not None:
            balance = Balance(labels, data.balance.classes, data.balance.samples_per_class)
    with collectives.raised_together():
        stream = ShardStream(
            indexes,
            global_batch_size=data.global_batch_size,
            lanes=data.lanes,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_factor,
            start_method=data.worker_start,
            consumed=progress.consumed,
            shuffle_window=data.shuffle_window,
            tail=data.tail,
            balance=balance,
            weights=data.weights,
            only=only,
            transform=fields.prepare,
            max_skipped=data.max_skipped,
        )
    return TrainingData(stream, fields, labels, example, indexes, index)


def _warn_of_small_cache(config: RunConfig, index: ShardIndex) -> None:
    """Blocks of remote shards are used until a lane has left their window."""
    data = config.data
    remote = sum(int(n) for s, n in zip(index.shards, index.shard_bytes, strict=True) if is_url(s))
    window = 2 * data.lanes * data.shuffle_window * int(index.shard_bytes.sum()) // len(index)
    needed_mb = min(remote, window) >> 20
    if needed_mb > data.cache.limit_mb:
        print(
            f"data.cache.limit_mb={data.cache.limit_mb} is less than the {needed_mb} MiB of two "
            f"windows of all lanes: blocks may be fetched again and again; set it to that, or a "
            f"smaller data.shuffle_window",
            file=sys.stderr,
            flush=True,
        )


def _first_sample(fields: Fields, index: ShardIndex, max_skipped: int) -> Samples:
    """The first one that can be read, after as many as may be skipped."""
    for number in range(min(max_skipped, len(index) - 1)):
        try:
            return fields.read(index, [number])
        except UnreadableSample:
            continue
    return fields.read(index, [min(max_skipped, len(index) - 1)])


def _training_labels(config: RunConfig, index: ShardIndex) -> Tensor:
    """Labels of all samples; those that are not to be used are missing."""
    labels = read_label_table(index, config.fields)
    if config.data.labels_per_class is not None:
        labels = keep_per_class(labels, config.data.labels_per_class, config.seed)
    check_labels(labels)
    return labels
