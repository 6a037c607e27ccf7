"""Every rank holds all of the model: one process alone, or several with DDP."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive.backend.engine import (
    Engine,
    OptimizerState,
    Step,
    autocast,
    in_full_precision,
)
from dist_contrastive.backend.optimizer_state import load_named_state, named_state


class Replicated(Engine):
    """The task whole on every rank; DDP averages gradients while backward goes on.

    Args:
        dtype: of autocast; None for fp32.
        clip_norm: gradients are scaled down to at most this norm; None leaves them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None,
        clip_norm: float | None,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self._accelerator, self._dtype = accelerator, dtype
        self._clip_norm = clip_norm
        self._scaler = torch.amp.GradScaler(accelerator.device.type, enabled=dtype is torch.float16)
        self._wrapped = accelerator.prepare_model(module)
        if accelerator.num_processes == 1:
            self._wrapped = module  # a rank alone is wrapped too, where nothing is to be averaged
        if isinstance(self._wrapped, DistributedDataParallel):
            # A queue of keys or a running mean is computed alike on all ranks: not sent each step.
            self._wrapped.broadcast_buffers = False
            if accelerator.device.type == "cpu":  # a GPU would wait for what is measured
                self._wrapped._set_ddp_runtime_logging_sample_rate(1)

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with autocast(self._accelerator.device, self._dtype):
            found = self._wrapped(*inputs)
        return in_full_precision(found)

    def backward(self, losses: Callable[[int], Tensor], count: int = 1) -> None:
        self.discard_gradients()
        for part in range(count):
            is_last = part == count - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._wrapped):
                self._scaler.scale(losses(part)).backward()
        self._count_reduction()

    def step(self, lr: float) -> Step:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._scaler.unscale_(self.optimizer)
        norm = self._clipped()
        applied = math.isfinite(norm)
        if applied:
            self._scaler.step(self.optimizer)
        scale = self._scaler.get_scale()
        self._scaler.update()
        # A CPU keeps them until backward writes new ones: without them nothing is left between
        # steps, the heap is given back, and each of its pages is mapped anew, 5 % of a step.
        if self._accelerator.device.type != "cpu":
            self.discard_gradients()
        # Below 1 the scale is not what makes it infinite.
        return Step(norm, applied, rescaled=1 <= self._scaler.get_scale() < scale)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        grad = parameter.grad
        scale = self._scaler.get_scale()
        return torch.zeros_like(parameter) if grad is None else grad.detach() / scale

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        if not self._accelerator.is_main_process:
            return {}
        return {k: v.detach().to("cpu", copy=True) for k, v in self.module.state_dict().items()}

    def optimizer_state(self) -> OptimizerState:
        if not self._accelerator.is_main_process:
            return {}
        return {
            **named_state(self.optimizer, self.module),
            "scaler": self._scaler.state_dict(),
        }

    def load_optimizer_state(self, state: OptimizerState) -> None:
        load_named_state(self.optimizer, self.module, state)
        self._scaler.load_state_dict(state["scaler"])

    def parameter_norm(self) -> float:
        trained = [p.detach() for p in self.module.parameters() if p.requires_grad]
        return float(nn.utils.get_total_norm(trained))

    def _clipped(self) -> float:
        """Norm of the gradient before it is scaled down, if there is a limit."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clip_norm, norm)
        return float(norm)

    def _count_reduction(self) -> None:
        """DDP's own measure, of the step before this one. A hook that measured would run Python in
        the threads of gloo, and a data worker that is forked meanwhile may hang for ever."""
        if isinstance(self._wrapped, DistributedDataParallel):
            told = self._wrapped._get_ddp_logging_data()
            self.reduce_s += told.get("backward_comm_time", 0) * 1e-9
