"""Momentum contrast (He et al., arXiv 1911.05722): many negatives from a queue of past keys."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.stream.order import nearest_multiples
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import FOR_RUNS, InfoNCE, PairLoss
from dist_contrastive.models.momentum import MomentumCopy, check_row_independent, momentum_at
from dist_contrastive.tasks.base import DataInfo, Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ContrastiveTask


class Moco(ContrastiveTask):
    """A query finds the key of its sample's other view among the batch and the queue.

    Keys come from a copy of encoder and head that follows them slowly. The queue holds the keys of
    the last steps in the order of the global batches, the same on all ranks, and each rank compares
    its own queries with it. Both are part of the weights, hence of checkpoints, and know nothing of
    the number of ranks.
    """

    class Config(ContrastiveTask.Config):
        """Queries find keys of a momentum encoder among the batch and a queue of past keys."""

        name: Literal["moco"] = "moco"
        loss: Annotated[InfoNCE.Config, FOR_RUNS]
        """InfoNCE, the one loss that takes further negatives."""
        queue_size: PositiveInt
        """Past keys to compare with; a multiple of the global batch."""
        momentum: float = Field(default=0.99, ge=0, le=1)
        """Momentum of the key encoder at the start; it grows to 1 along a cosine."""

        def check(self, data: DataConfig) -> None:
            """Whole batches in the queue."""
            super().check(data)
            size, batch = self.queue_size, data.global_batch_size
            if size % batch:
                raise ValueError(
                    f"task.queue_size={size} does not hold whole batches of "
                    f"data.global_batch_size={batch}; set {nearest_multiples(size, batch, batch)}"
                )

    state_of_run = ("queue", "num_queued")
    loss: InfoNCE
    queue: Tensor
    num_queued: Tensor

    def __init__(
        self,
        config: Config,
        data: DataInfo,
        encoder: nn.Module | None = None,
        loss: PairLoss | None = None,
    ) -> None:
        if loss is not None and not isinstance(loss, InfoNCE):
            raise ConfigError(
                f"loss={type(loss).__name__} cannot be used by the task moco: the queue's keys are "
                f"negatives of InfoNCE alone; pass an InfoNCE, or leave it out"
            )
        super().__init__(config, data, encoder, loss)
        for module in (self.encoder, self.head):
            check_row_independent(module, "a query would know its own key by them")
        self.key_encoder = MomentumCopy(self.encoder)
        self.key_head = MomentumCopy(self.head)
        self.momentum = config.momentum
        self.register_buffer("queue", torch.zeros(config.queue_size, self.head.dim))
        # Since the start; on the host, which cuts the queue by it.
        self.register_buffer("num_queued", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn, recurse=True):
        on_host = self.num_queued
        super()._apply(fn, recurse)
        self.num_queued = on_host
        return self

    def momentum_copies(self) -> dict[str, tuple[MomentumCopy, nn.Module]]:
        """The encoder and the head of keys."""
        return {
            "key_encoder": (self.key_encoder, self.encoder),
            "key_head": (self.key_head, self.head),
        }

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """A view for the query and one for the key of every image: [b, C, H, W] each."""
        return self.make_views(samples, 2)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Queries [b, D], and keys [b, D] without gradient."""
        for_query, for_key = inputs
        return self.head(self.encoder(for_query)), self.key_head(self.key_encoder(for_key))

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """InfoNCE against the keys of the batch and those of the queue."""
        queries, keys = embeddings
        held = self._num_held()
        bank = self.queue[:held] if held else None
        return {"contrastive": self.loss(queries, keys, bank=bank)}

    @torch.no_grad()
    def finish_step(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> None:
        """The key encoder follows; the keys of all ranks replace the oldest of the queue."""
        super().finish_step(embeddings, samples, context)
        momentum = momentum_at(context.progress, self.momentum)
        self.key_encoder.update(self.encoder, momentum)
        self.key_head.update(self.head, momentum)
        keys, _ = collectives.all_gather_rows(embeddings[1].to(self.queue.dtype))
        begin = int(self.num_queued) % len(self.queue)
        self.queue[begin : begin + len(keys)] = keys
        self.num_queued += len(keys)

    @torch.no_grad()
    def scalars(self, context: StepContext) -> dict[str, float]:
        """The temperature, the momentum of this step, and how many keys are queued."""
        held = float(self._num_held())
        momentum = momentum_at(context.progress, self.momentum)
        return {**super().scalars(context), "momentum": momentum, "queued_keys": held}

    def _num_held(self) -> int:
        """Keys in the queue, which fills up first."""
        return min(int(self.num_queued), len(self.queue))
