"""What the trainer knows of a task."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dist_contrastive.data.fields import Samples
from dist_contrastive.losses.base import PairLoss, Scale, clamp_scales

Embeddings = tuple[Tensor, ...]
Terms = dict[str, Tensor]


class Task(nn.Module, ABC):
    """An objective over the global batch: `embed`, then `compare`.

    Its parameters, those of the loss included, are all that is trained. Randomness (views, noise)
    is drawn in `inputs`, keyed by the sample, so that it depends on neither rank nor batch.
    """

    progress = 0.0
    """Steps done over steps of the run, set before each step: schedules are functions of it."""

    is_logged = False
    """Whether `scalars` of this step will be read, set before each step; then they may be dear."""

    rows_multiple = 1
    """The rows of a global batch are a multiple of it."""

    micro_batch_size: int | None = None
    """Rows that networks are given at a time, set before each step; None: all of them."""

    def batch_inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """What `embed` takes after `inputs` and is known of the whole batch only: [b, ...] each.

        Called at the start of a step, on all ranks, with all rows of this rank.
        """
        return ()

    @abstractmethod
    def inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """What `embed` takes for these rows, the same whichever rows come with them."""

    @abstractmethod
    def embed(self, *inputs: Tensor) -> Embeddings:
        """Embeddings of some rows, each row for itself; all trained networks act here."""

    @abstractmethod
    def compare(self, embeddings: Embeddings, samples: Samples) -> Terms:
        """The terms of the loss by name, scalars over the rows of all ranks, from the embeddings
        of this rank's rows. Their sum is minimised."""

    def forward(self, *inputs: Tensor) -> Embeddings:
        """`embed`, under the name that engines wrap."""
        return self.embed(*inputs)

    def pairs(self, embeddings: Embeddings) -> tuple[Tensor, Tensor] | None:
        """Two embeddings of each sample [b, D] that are to be near each other, if there are."""
        return None

    def finish_step(self, embeddings: Embeddings) -> None:
        """What changes after the parameters have: learnable scales are kept within their limits;
        momentum encoders, queues and running means follow. Called on all ranks."""
        clamp_scales(self)

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Numbers of the task itself that are worth logging."""
        return {}


def scalars_of(loss: PairLoss) -> dict[str, float]:
    """The temperature and the bias, which may be learned, and what the loss has counted."""
    found = {name: float(x) for name, x in loss.metrics.items()}
    if isinstance(scale := getattr(loss, "scale", None), Scale):
        found["temperature"] = 1 / float(scale())
    if (bias := getattr(loss, "bias", None)) is not None:
        found["bias"] = float(bias)
    return found
