"""Interface of a task to the trainer, and what a task knows of a step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from dist_contrastive.data.fields import Samples
from dist_contrastive.losses.base import PairLoss, Scale, clamp_scales

Embeddings = tuple[Tensor, ...]
Terms = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """One step of a run, beside its samples; tasks that know more of it have a subclass."""

    progress: float = 0.0
    """Steps done over steps of the run: schedules are functions of it."""
    is_logged: bool = False
    """Whether the metrics of this step will be read; then they may be expensive."""
    micro_batch_size: int | None = None
    """Rows that networks are given at a time; None: all of them."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of this step, which `compare` puts here for `scalars`."""

    def rows(self, rows: Tensor) -> Self:
        """The context of some rows of this rank: of a micro-batch."""
        return self


class Task(nn.Module, ABC):
    """Objective over the global batch: `embed`, then `compare`.

    Its parameters, those of the loss included, are all that is trained. Randomness (views, noise)
    is drawn in `inputs`, keyed by the sample, so that it depends on neither rank nor batch. What a
    step needs is in its context; between steps only the weights and buffers of the task remain.
    """

    rows_multiple = 1
    """The rows of a global batch are a multiple of it."""

    def begin_step(
        self,
        samples: Samples,
        *,
        progress: float = 0.0,
        is_logged: bool = False,
        micro_batch_size: int | None = None,
    ) -> StepContext:
        """Context of a step. Called on all ranks, with all rows of this rank.

        Args:
            progress, is_logged, micro_batch_size: as in `StepContext`.
        """
        return StepContext(
            progress=progress, is_logged=is_logged, micro_batch_size=micro_batch_size
        )

    @abstractmethod
    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """What `embed` takes for these rows, the same whichever rows come with them.

        Args:
            context: that of the step, or its `rows` where the samples are some of this rank's rows.
        """

    @abstractmethod
    def embed(self, *inputs: Tensor) -> Embeddings:
        """Embeddings of some rows, each row for itself; all trained networks act here."""

    @abstractmethod
    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """Terms of the loss by name, scalars over the rows of all ranks, from the embeddings of
        this rank's rows. Their sum is minimised."""

    def forward(self, *inputs: Tensor) -> Embeddings:
        """`embed`, under the name that engines wrap."""
        return self.embed(*inputs)

    def pairs(self, embeddings: Embeddings) -> tuple[Tensor, Tensor] | None:
        """Two embeddings of each sample [b, D] that are to be near each other, if there are."""
        return None

    def finish_step(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> None:
        """What changes after the parameters have: learnable scales are kept within their limits;
        momentum encoders, queues and running means follow. Called on all ranks."""
        clamp_scales(self)

    @torch.no_grad()
    def scalars(self, context: StepContext) -> dict[str, float]:
        """Metrics of the task itself for the row of a logged step, after `finish_step`."""
        return dict(context.metrics)


def scalars_of(loss: PairLoss) -> dict[str, float]:
    """The temperature and the bias, which may be learned, and what the loss has counted."""
    scalars = {name: float(x) for name, x in loss.metrics.items()}
    if isinstance(scale := getattr(loss, "scale", None), Scale):
        scalars["temperature"] = 1 / float(scale())
    if (bias := getattr(loss, "bias", None)) is not None:
        scalars["bias"] = float(bias)
    return scalars
