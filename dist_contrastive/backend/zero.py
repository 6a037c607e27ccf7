"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054), on gloo and CPUs as on GPUs: ranks share
the state of the optimiser (1), gradients too (2), weights too (3)."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.backend.engine import (
    Engine,
    OptimizerState,
    Step,
    autocast,
    in_full_precision,
)
from dist_contrastive.backend.optimizer_state import (
    group_counts,
    load_group_counts,
    on_cpu,
    parameter_names,
)
from dist_contrastive.backend.zero_setup import hide_from_transformers
from dist_contrastive.errors import ConfigError


def _check_parameters(module: nn.Module) -> None:
    """DeepSpeed sends parameters as bytes, which takes a dimension."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"parameter {name} has no dimensions, and DeepSpeed cannot share such a one; make "
                f"it a vector of one number, torch.zeros(1), or set backend.zero_stage=0"
            )


class Zero(Engine):
    """The task on a DeepSpeed engine. Weights and their updates are fp32.

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
        import deepspeed

        self.module, self._dtype, self._device = module, dtype, accelerator.device
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = clip_norm or 0.0
        self._names = parameter_names(module)
        embed = module.forward
        # The engine turns off an autocast around it, so this one is inside.
        module.forward = self._autocast(embed)
        _check_parameters(module)
        self._engine, _ = accelerator.prepare(module, optimizer)
        hide_from_transformers(accelerator)
        asked = settings["zero_optimization"]["stage"]
        if not isinstance(self._engine, deepspeed.DeepSpeedEngine) or self.stage != asked:
            raise RuntimeError(f"asked for ZeRO {asked}, got {type(self._engine).__name__}")
        if self._engine.world_size != collectives.world_size():
            raise RuntimeError(f"DeepSpeed counts {self._engine.world_size} ranks")
        self._has_gradients = False
        self._zero = self._engine.optimizer
        self.optimizer = self._zero.optimizer  # of flat pieces of parameters

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return int(self._engine.zero_optimization_stage())

    def _autocast(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def embed(*inputs: Tensor) -> Any:
            with autocast(self._device, self._dtype):
                return forward(*inputs)

        return embed

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = in_full_precision(self._engine(*inputs))
        # It takes any gradient by what it returned for the backward of the step, by a view not.
        return tuple(x.view_as(x) for x in found)

    def backward(self, losses: Callable[[int], Tensor], count: int = 1) -> None:
        with self._engine.coalesce_grad_reduction():
            for part in range(count):
                self._engine.backward(losses(part))
            begin = time.perf_counter()  # what is left is the reduction, on leaving the block
        self._has_gradients = True
        self.reduce_s += time.perf_counter() - begin

    def step(self, lr: float) -> Step:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self._has_gradients = False
        if self._zero.overflow:
            return Step(math.inf, applied=False)
        return Step(float(self._engine.get_global_grad_norm()), applied=True)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        grad = safe_get_full_grad(parameter)
        return torch.zeros(parameter.shape) if grad is None else grad.detach().clone()

    def discard_gradients(self) -> None:
        """Through DeepSpeed's own way out of a step that is not finite."""
        if not self._has_gradients:
            return
        if self.stage == 3:
            self._zero.grad_partitions_flat_buffer.fill_(math.nan)
        else:
            for grads in self._zero.averaged_gradients.values():
                for grad in grads or ():
                    grad.fill_(math.nan)
        updated = self.step(0.0)
        assert not updated.applied, "gradients that are to be dropped have been used"
        if self.stage == 3:  # the next ones are not written into what only fills up a partition
            self._zero.grad_partitions_flat_buffer.zero_()

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            with self._whole([value]):
                if collectives.rank() == 0:
                    found[name] = value.detach().to("cpu", copy=True)
        return found

    def optimizer_state(self) -> OptimizerState:
        state = {}
        for parameter, flat in self._trained():
            mine = self.optimizer.state.get(flat, {})
            found = {key: self._whole_state(parameter, flat, key) for key in mine}
            found = {key: value for key, value in found.items() if value is not None}
            if found:
                state[self._names[parameter]] = found
        if collectives.rank():
            return {}
        return {"state": state, "groups": group_counts(self.optimizer), "scaler": {}}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for parameter, flat in self._trained():
            for key, value in state["state"].get(self._names[parameter], {}).items():
                mine = self.optimizer.state[flat]
                if key == "step" or not isinstance(value, Tensor):
                    mine[key] = on_cpu(value)
                    continue
                if key not in mine:
                    mine[key] = torch.zeros_like(flat)
                self._put(parameter, mine[key], value.to(flat.device).flatten())
        load_group_counts(self.optimizer, state["groups"])

    def parameter_norm(self) -> float:
        trained: list[Any] = [p for p in self.module.parameters() if p.requires_grad]
        if self.stage < 3:
            return float(nn.utils.get_total_norm([p.detach() for p in trained]))
        squares = torch.stack([p.ds_tensor.double().square().sum() for p in trained]).sum()
        return math.sqrt(collectives.all_reduce_sum(squares).item())

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Trained parameters of more than one number must be left alone inside."""
        scalars = [x for x in self._trained() if math.prod(self._shape(x[0])) == 1]
        with self._whole(list(self.module.parameters()), change=True):
            yield
            after = [parameter.detach().flatten().clone() for parameter, _ in scalars]
        for (parameter, flat), value in zip(scalars, after, strict=True):
            self._put(parameter, flat.data, value)  # ZeRO updates copies of its own

    @contextmanager
    def _whole(self, tensors: list[Tensor], change: bool = False) -> Iterator[None]:
        """ZeRO 3 has put aside the parameters among these; inside they are there."""
        from deepspeed.runtime.zero import GatheredParameters

        aside = [x for x in tensors if hasattr(x, "ds_id")]
        with GatheredParameters(aside, modifier_rank=0 if change else None, enabled=bool(aside)):
            yield

    @staticmethod
    def _shape(parameter: Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def _trained(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter, and the flat tensor of the optimiser that holds a piece of it."""
        if self.stage == 3:
            for parameter in (p for group in self._zero.fp16_groups for p in group):
                place, _, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                yield parameter, self._zero.fp32_partitioned_groups_flat[place]
            return
        flats = self._zero.single_partition_of_fp32_groups
        for group, flat in zip(self._zero.bit16_groups, flats, strict=True):
            for parameter in group:
                yield parameter, flat

    def _whole_state(self, parameter: nn.Parameter, flat: Tensor, key: str) -> Any:
        """What the optimiser remembers of a parameter, on the CPU; collective."""
        value = self.optimizer.state[flat][key]
        if key == "step" or not isinstance(value, Tensor):
            return on_cpu(value)
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            return on_cpu(safe_get_full_optimizer_state(parameter, key)).view(
                self._shape(parameter)
            )
        whole = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
        for in_parameter, in_flat in self._piece(parameter):
            whole[in_parameter] = value[in_flat]
        return on_cpu(collectives.all_reduce_sum(whole)).view(parameter.shape)

    def _put(self, parameter: nn.Parameter, mine: Tensor, whole: Tensor) -> None:
        """This rank's piece of a parameter, or of what the optimiser remembers of it, into a flat
        tensor."""
        if self.stage < 3:
            for in_parameter, in_flat in self._piece(parameter):
                mine[in_flat] = whole[in_parameter]
            return
        _, begin, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        piece = whole[size * collectives.rank() :][:size]  # the last one may be short
        mine[begin : begin + len(piece)] = piece

    @staticmethod
    def _piece(parameter: nn.Parameter) -> Iterator[tuple[slice, slice]]:
        """Which part of a parameter lies where in the flat tensor of this rank, if any does."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield (
                slice(here.start, here.start + here.numel),
                slice(there.start, there.start + there.numel),
            )
