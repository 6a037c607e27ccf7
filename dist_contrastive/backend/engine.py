"""Interface of an engine: a task and its optimizer on the ranks of a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_contrastive.errors import ConfigError

OptimizerState = dict[str, Any]
"""``{"state": {parameter name: {key: tensor or number}}, "groups": [{"step": number}], "scaler":
{...}}``: no engine's own form, so that any engine on any number of ranks resumes from it."""


class Step(NamedTuple):
    """Result of an update."""

    grad_norm: float  # of the gradient averaged over ranks, before clipping
    applied: bool  # False: it or the loss was not finite, and nothing has changed
    rescaled: bool = False  # not finite in fp16; the next loss is scaled less


class Engine(ABC):
    """A task and its optimizer on the ranks of a run.

    Every method is called on all ranks alike. The gradient of a step follows the gradient contract:
    it is the mean over ranks of what their backward passes leave.

    Args:
        module: the task, not wrapped; `wrapped` is how it is called: itself, in DDP, or in a
            DeepSpeed engine.
        dtype: of autocast; None for fp32.
        clip_norm: gradients are scaled down to at most this norm; None leaves them.
    """

    reduce_s = 0.0
    """Seconds of gradient reductions over ranks, from the first to the last of a step, overlapped
    with backward or not."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None,
        clip_norm: float | None,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self._accelerator, self._device = accelerator, accelerator.device
        self._dtype, self._clip_norm = dtype, clip_norm
        self.wrapped = self._wrap()

    @abstractmethod
    def _wrap(self) -> Any:
        """The task in the wrapper of the engine; called once, by the constructor."""

    @abstractmethod
    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The task's `embed` in the precision of the run, which its embeddings have too: losses
        keep their scores in fp32, and a GPU multiplies bf16 rows many times as fast."""

    @abstractmethod
    def backward(self, losses: Callable[[int], Tensor], count: int = 1) -> None:
        """Gradient of ``sum(losses(part) for part in range(count))``, reduced over ranks once.

        The losses are computed one after another, so that only one graph is held; `losses` may call
        `embed`. Gradients are kept until `step` or `discard_gradients`, one of which comes before
        the next call.
        """

    @abstractmethod
    def step(self, lr: float, loss: Tensor | None = None) -> Step:
        """Gradient clipping and update of the parameters; the gradient is used up. A gradient that
        is not finite, on any rank, updates nothing on all.

        Args:
            loss: the scalar that it is of, equal on all ranks; if it is not finite, nothing is
                updated either. It is read with the norm, where the host waits for the GPU once.
        """

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Whole reduced gradient of a parameter of `module` (a copy), before `step`."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Drop the gradients of `backward` as if it had not been called."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Whole state_dict of the task, copied to the CPU; on ranks other than the first: {}."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """Whole optimizer state, copied to the CPU; on ranks other than the first: {}."""

    @abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Restore what `optimizer_state` returned, on whichever engine and number of ranks."""

    @abstractmethod
    def parameter_norm(self) -> float:
        """Euclidean norm of all trained parameters."""

    def scale_kept(self) -> AbstractContextManager[None]:
        """Context that leaves the scale of losses in fp16 as it was."""
        return nullcontext()

    def lower_scale(self) -> bool:
        """Halve the scale of losses in fp16 after a backward pass; False where there is none."""
        return False

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Context in which `module` holds all of its parameters, and they may be changed in place,
        on all ranks alike."""
        return nullcontext()

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)


# ------------------------------------------------------------------ optimizer state


def group_counts(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Step counters in the parameter groups of an optimizer; the rest of them is config."""
    return [{k: v for k, v in group.items() if k == "step"} for group in optimizer.param_groups]


def load_group_counts(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Restore `group_counts`."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def to_cpu(value: Any) -> Any:
    """Copy of a tensor on the CPU; a number unchanged. From a GPU it is on its way into pinned
    memory until `finish_copies`."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cuda":
        return value.detach().to("cpu", copy=True)
    copy = torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
    return copy.copy_(value.detach(), non_blocking=True)


def finish_copies(device: torch.device) -> None:
    """Wait for the copies of `to_cpu`."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


# ------------------------------------------------------------------ networks on a GPU


def multiply_in_tf32(module: nn.Module) -> None:
    """Matrix products of a module's fp32 numbers in TF32 on a GPU, forward and backward; those of a
    loss of what it returns stay exact: at temperature 0.01 an error of theirs counts a hundredfold.
    """
    products = torch.backends.cuda.matmul

    def begin(*_: Any) -> None:
        products.fp32_precision = "tf32"

    def end(*_: Any) -> None:
        products.fp32_precision = "ieee"

    def in_backward(_: Tensor) -> None:
        begin()
        # DDP's own way to learn that a backward pass is over; there is no public one.
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def end_forward(_: nn.Module, __: Any, outputs: tuple[Tensor, ...]) -> None:
        end()
        for output in outputs:
            if output.requires_grad:
                output.register_hook(in_backward)  # when the loss is done, and the module begins

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end_forward)


def put_channels_last(module: nn.Module) -> None:
    """Weights of convolutions, and images that the module is given, with their channels last."""

    def last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs
        )

    module.to(memory_format=torch.channels_last)
    module.register_forward_pre_hook(last)


def recompute_blocks(module: nn.Module) -> None:
    """Activation checkpointing of the trained blocks of a module.

    A block is a child of a `ModuleList` or `Sequential` that has parts of its own, as a layer of a
    transformer; blocks in blocks are left as they are. Gradients are the same, with dropout too.

    Raises:
        ConfigError: there is no block.

    References:
        Chen et al. 2016, arXiv 1604.06174.
    """
    inside: set[nn.Module] = set()
    for parent in module.modules():
        if parent in inside or not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        for block in parent.children():
            trained = any(p.requires_grad for p in block.parameters())
            if trained and any(True for _ in block.children()):
                inside |= set(block.modules())
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if not inside:
        raise ConfigError(
            "backend.activation_checkpointing=true, but these networks have no blocks to compute "
            "again; leave it out, or set train.micro_batch_size"
        )
