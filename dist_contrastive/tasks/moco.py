"""Momentum contrast (He et al., arXiv 1911.05722): many negatives from a queue of past keys."""

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.config import MocoSettings
from dist_contrastive.data.fields import Samples
from dist_contrastive.losses import InfoNCE
from dist_contrastive.models.momentum import MomentumCopy, check_row_independent, momentum_at
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.tasks.images import ImageTask


class Moco(ImageTask):
    """A query finds the key of its sample's other view among the batch and the queue.

    Keys come from a copy of encoder and head that follows them slowly. The queue holds the keys of
    the last steps in the order of the global batches, the same on all ranks, and each rank compares
    its own queries with it. Both are part of the weights, hence of checkpoints, and know nothing of
    the number of ranks.
    """

    queue: Tensor
    num_queued: Tensor

    def __init__(self, settings: MocoSettings, example: Samples, seed: int) -> None:
        super().__init__(settings, example, seed)
        self.loss = InfoNCE(settings.loss)
        for module in (self.encoder, self.head):
            check_row_independent(module, "a query would know its own key by them")
        self.key_encoder = MomentumCopy(self.encoder)
        self.key_head = MomentumCopy(self.head)
        self.momentum = settings.momentum
        self.register_buffer("queue", torch.zeros(settings.queue_size, settings.head.out))
        self.register_buffer("num_queued", torch.zeros((), dtype=torch.int64))  # since the start

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
