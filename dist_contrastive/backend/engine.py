"""What the trainer asks of any engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OptimizerState = dict[str, Any]
"""``{"state": {parameter: {key: tensor or number}}, "groups": [{"step": number}]}``, the same for
every engine and number of ranks; see `optimizer_state`."""


class Step(NamedTuple):
    """What an update did."""

    grad_norm: float  # of the gradient averaged over ranks, before clipping
    applied: bool  # False: it was not finite, and nothing has changed
    rescaled: bool = False  # not finite in fp16; the next loss is scaled less


class Engine(ABC):
    """A task and its optimiser on the ranks of a run.

    Every method is called on all ranks alike. The gradient of a step is that of the gradient
    contract: the mean over ranks of what their backwards leave.
    """

    module: nn.Module
    """The task, not wrapped."""
    reduce_s = 0.0
    """Seconds of reductions of gradients over ranks, from the first to the last of a step, backward
    beside them or not."""

    @abstractmethod
    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The task's `embed` in the precision of the run; the embeddings are fp32 (or fp64)."""

    @abstractmethod
    def backward(self, losses: Callable[[int], Tensor], count: int = 1) -> None:
        """Gradient of ``sum(losses(part) for part in range(count))``, reduced over ranks once.

        The losses are asked for one after another, so that only one graph is held; `losses` may
        call `embed`. Gradients are kept until `step` or `discard_gradients`, one of which comes
        before the next call.
        """

    @abstractmethod
    def step(self, lr: float) -> Step:
        """Clip the gradient and update the parameters; the gradient is used up. What is not
        finite, on any rank, updates nothing on all."""

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The whole reduced gradient of a parameter of `module` (a copy), before `step`."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Drop the gradients of `backward` as if it had not been called."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The task's state_dict, whole, as copies on the CPU; on ranks other than the first: {}."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """What the optimiser remembers, whole, on the CPU; on ranks other than the first: {}."""

    @abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put back what `optimizer_state` gave, of whichever engine and number of ranks."""

    @abstractmethod
    def parameter_norm(self) -> float:
        """Euclidean norm of all trained parameters."""

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Inside, `module` holds all of its parameters, and they may be changed in place, on all
        ranks alike."""
        return nullcontext()


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Networks compute in this dtype inside; None leaves them alone."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


def in_full_precision(embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Half precision to fp32."""
    half = (torch.bfloat16, torch.float16)
    return tuple(x.float() if x.dtype in half else x for x in embeddings)
