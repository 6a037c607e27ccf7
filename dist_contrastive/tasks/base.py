"""Interface of a task to the trainer, and what a task knows of a step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.scale import Scale, clamp_scales
from dist_contrastive.models import MomentumCopy
from dist_contrastive.settings import Choice, ComponentSettings, Settings

Embeddings = tuple[Tensor, ...]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class DataInfo:
    """Data that a task is built for."""

    example: Samples
    """A row or more, which show shapes."""
    num_classes: int | None
    """Labels are classes 0 ... num_classes - 1; None: continuous, or none."""
    seed: int
    """That of the run, with which views, noise and weights are drawn."""


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

    def rows(self, rows: slice) -> Self:
        """The context of some rows of this rank: of a micro-batch."""
        return self


class Task(nn.Module, ABC):
    """Objective over the global batch: `embed`, then `compare`.

    Its parameters, those of the loss included, are all that is trained. Randomness (views, noise)
    is drawn in `inputs`, keyed by the sample, so that it depends on neither rank nor batch. What a
    step needs is in its context; between steps only the weights and buffers of the task remain.

    A subclass is made as ``Class(config, data)``, data a `DataInfo`, with ``encoder=`` or ``loss=``
    where a module of the user's own takes the place of the configured one.
    """

    class Config(ComponentSettings):
        """Settings of a task."""

        uses_labels: ClassVar[bool] = False
        """Whether labels take part in training."""
        labels_required: ClassVar[bool] = False
        """Whether each sample must have one."""
        uses_pair: ClassVar[bool] = False
        """Whether a second modality of the samples takes part."""

        def check(self, data: DataConfig) -> None:
            """Raise ValueError, worded as a sentence, where the data does not fit the task."""
            for name in ("labels_per_class", "balance"):
                if getattr(data, name) is not None and not self.uses_labels:
                    raise ValueError(
                        f"data.{name} is set, but the task does not train with labels; leave it "
                        f"out, or use the task labelled or hybrid"
                    )
            if data.pair is not None and not self.uses_pair:
                raise ValueError(
                    f"data.pair={data.pair} is set, but the task has no second modality; leave it "
                    f"out, or use the task paired"
                )
            if self.uses_labels and data.label is None:
                raise ValueError(
                    "the task needs labels; set data.label to the field that holds them"
                )

        def check_labels(self, labels: Tensor) -> None:
            """Raise ConfigError where the labels of the whole data set, [N], leave nothing to
            learn; called if labels take part in training."""

    state_of_run: ClassVar[tuple[str, ...]] = ()
    """Buffers, and modules of buffers, that hold what a run has met and are no weights: a run that
    starts from the weights of another one has its own."""
    loss_tells: ClassVar[bool] = True
    """Whether a loss that stays the same means that nothing is learned."""
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

    def momentum_copies(self) -> dict[str, tuple[MomentumCopy, nn.Module]]:
        """Momentum copies by their names in the task, each with the module that it follows."""
        return {}

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


def check_loss(loss: nn.Module, config: Settings) -> None:
    """Refuse a loss of the user's own that the setting ``loss`` of a task could not name."""
    for choice in type(config).model_fields["loss"].metadata:
        if isinstance(choice, Choice):
            reason = None
            if not isinstance(loss, choice.base):
                reason = f"it is no {choice.base.__module__}.{choice.base.__qualname__}"
            if reason := reason or choice.unfit(type(loss)):
                raise ConfigError(
                    f"loss={type(loss).__name__} cannot be used by this task: {reason}; pass "
                    f"another loss, or leave it out for that of the config"
                )


def scalars_of(loss: PairLoss) -> dict[str, float]:
    """The temperature and the bias, which may be learned, and what the loss has counted."""
    scalars = {name: float(x) for name, x in loss.metrics.items()}
    if isinstance(scale := getattr(loss, "scale", None), Scale):
        scalars["temperature"] = 1 / float(scale())
    if (bias := getattr(loss, "bias", None)) is not None:
        scalars["bias"] = float(bias)
    return scalars
