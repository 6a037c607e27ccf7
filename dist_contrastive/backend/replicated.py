"""Engine that holds the whole model on every rank: one process alone, or several with DDP."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive.backend.engine import (
    Engine,
    OptimizerState,
    Step,
    finish_copies,
    group_counts,
    load_group_counts,
    to_cpu,
)


class Replicated(Engine):
    """The task whole on every rank; DDP averages gradients during the backward pass."""

    def _wrap(self) -> Any:
        is_half = self._dtype is torch.float16
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=is_half)
        # Counts that the host keeps are the same on all ranks, and a group may have no CPUs.
        buffers = self.module.to(self._device).named_buffers()
        on_host = [name for name, x in buffers if x.device.type != self._device.type]
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(self.module, on_host)
        wrapped = self._accelerator.prepare_model(self.module)
        if self._accelerator.num_processes == 1:
            return self.module  # a rank alone is wrapped too, with nothing to average
        if isinstance(wrapped, DistributedDataParallel):
            # A queue of keys or a running mean is computed alike on all ranks: not sent each step.
            wrapped.broadcast_buffers = False
            if self._device.type == "cpu":  # a GPU would wait for what is measured
                wrapped._set_ddp_runtime_logging_sample_rate(1)
        return wrapped

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._autocast():
            return self.wrapped(*inputs)

    def backward(self, losses: Callable[[int], Tensor], count: int = 1) -> None:
        self.discard_gradients()
        for part in range(count):
            is_last = part == count - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self.wrapped):
                self._scaler.scale(losses(part)).backward()
        self._count_reduction()

    def step(self, lr: float, loss: Tensor | None = None) -> Step:
        self._set_lr(lr)
        self._scaler.unscale_(self.optimizer)
        norm, *losses = self._clip([] if loss is None else [loss])
        applied = all(map(math.isfinite, (norm, *losses)))
        scale = 0.0
        if applied:
            self.optimizer.step()  # the scaler's own would read again whether all is finite
        elif all(map(math.isfinite, losses)):
            scale = self._scaler.get_scale()
        self._scaler.update()
        # A CPU keeps them until backward writes new ones: without them nothing is left between
        # steps, the heap is given back, and each of its pages is mapped anew, 5 % of a step.
        if self._device.type != "cpu":
            self.discard_gradients()
        # Below 1 the scale is not what makes it infinite.
        return Step(norm, applied, rescaled=scale > 1 and 1 <= self._scaler.get_scale() < scale)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        grad = parameter.grad
        scale = self._scaler.get_scale()
        return torch.zeros_like(parameter) if grad is None else grad.detach() / scale

    @contextmanager
    def scale_kept(self) -> Iterator[None]:
        state = self._scaler.state_dict()
        try:
            yield
        finally:
            if state:
                self._scaler.load_state_dict(state)

    def lower_scale(self) -> bool:
        scale = self._scaler.get_scale()
        if not self._scaler.is_enabled() or scale <= 1:
            return False
        self._scaler.update(scale / 2)
        return True

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        if not self._accelerator.is_main_process:
            return {}
        weights = {name: to_cpu(value) for name, value in self.module.state_dict().items()}
        finish_copies(self._device)
        return weights

    def optimizer_state(self) -> OptimizerState:
        if not self._accelerator.is_main_process:
            return {}
        names: dict[Any, str] = {p: name for name, p in self.module.named_parameters()}
        state = {
            names[parameter]: {key: to_cpu(value) for key, value in values.items()}
            for parameter, values in self.optimizer.state.items()
        }
        finish_copies(self._device)
        groups = group_counts(self.optimizer)
        return {"state": state, "groups": groups, "scaler": self._scaler.state_dict()}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        is_fused = bool(self.optimizer.defaults.get("fused"))
        for name, parameter in self.module.named_parameters():
            for key, value in state["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    # torch's optimizers keep the step counter on the CPU unless they are fused.
                    on_cpu = key == "step" and not is_fused
                    value = value.to("cpu" if on_cpu else parameter.device, copy=True)
                    if value.shape == parameter.shape and value.stride() != parameter.stride():
                        value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                self.optimizer.state[parameter][key] = value
        load_group_counts(self.optimizer, state["groups"])
        if state["scaler"]:  # empty of a run that was not in fp16, or by ZeRO
            self._scaler.load_state_dict(state["scaler"])

    def parameter_norm(self) -> float:
        trained = [p.detach() for p in self.module.parameters() if p.requires_grad]
        return float(nn.utils.get_total_norm(trained))

    def _clip(self, others: list[Tensor]) -> list[float]:
        """Norm of the gradient before it is scaled down to `clip_norm`, and the other scalars."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clip_norm, norm)
        read = torch.stack([x.detach().to(self._device, torch.float64) for x in (norm, *others)])
        return list(read.tolist())

    def _count_reduction(self) -> None:
        """DDP's own measure, of the step before this one. A hook that measured would run Python in
        the threads of gloo, and a data worker that is forked meanwhile may hang for ever."""
        if isinstance(self.wrapped, DistributedDataParallel):
            measured = self.wrapped._get_ddp_logging_data()
            self.reduce_s += measured.get("backward_comm_time", 0) * 1e-9
