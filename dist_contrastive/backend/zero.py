"""Engine of DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054), on gloo and CPUs as on GPUs:
ranks share the optimizer state (1), gradients too (2), weights too (3)."""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.backend.engine import (
    Engine,
    OptimizerState,
    Step,
    finish_copies,
    group_counts,
    load_group_counts,
    to_cpu,
)
from dist_contrastive.errors import ConfigError

# Parameters of fewer numbers stay whole on every rank under ZeRO 3: biases, norms, temperatures.
_WHOLE_BELOW = 4096
# Numbers that are reduced at a time; DeepSpeed allocates that many.
_BUCKET = 1 << 23
# Names that torch 2.13 replaced and DeepSpeed uses still.
_RENAMED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
_SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "DS_ACCELERATOR")


def zero_accelerator(
    stage: int, precision: str, process_group: InitProcessGroupKwargs, cpu: bool
) -> Accelerator:
    """Accelerator that makes a DeepSpeed engine on CPUs too; told of a CPU in its own way it makes
    DDP instead, and without these variables it counts one rank on each.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot train in this precision.
    """
    if precision == "fp16":
        raise ConfigError(
            f"backend.precision=fp16 with backend.zero_stage={stage}: DeepSpeed scales the loss "
            f"for weights in fp16 only, and ours are fp32; set precision=bf16, or zero_stage=0"
        )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"backend.zero_stage={stage} needs DeepSpeed; install it with pip install "
            f"'dist-contrastive[deepspeed]', or set backend.zero_stage=0"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)  # the trainer reports skipped steps itself
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
    # Reductions through shared memory, which it would compile first: gloo does well without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(hf_ds_config=_deepspeed_config(stage))
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[process_group])
    _hide_from_transformers(accelerator)
    return accelerator


def forget_switches() -> None:
    """Unset the variables of `zero_accelerator`: a later run may be without DeepSpeed."""
    for name in _SWITCHES:
        os.environ.pop(name, None)


def _hide_from_transformers(accelerator: Accelerator) -> None:
    """Transformers would partition the models that it makes as soon as it sees this config; they
    must stay whole until the engine takes the task."""
    accelerator.state.deepspeed_plugin.dschf = None


def _deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no effect: losses are means already
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 31,
        "zero_allow_untested_optimizer": True,  # those that would go wrong are refused by `optim`
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": _WHOLE_BELOW,
        },
    }


class Zero(Engine):
    """The task in a DeepSpeed engine; weights and their updates are fp32.

    Private attributes of DeepSpeed's optimizers, each with a test of what it is for:

    - the flat tensors (`_flat_parameters`), `grad_position` and `_hp_mapping` (`_set_fragment`):
      safe_set_full_optimizer_state fails before the first step, when there is no state to set, and
      safe_set_full_fp32_param where a parameter does not divide by the number of ranks.
    - the gradient buffers (`discard_gradients`): DeepSpeed drops a step only when its own check
      finds NaN, and has no call for it.
    """

    def _wrap(self) -> Any:
        import deepspeed

        module, settings = self.module, self._accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = self._clip_norm or 0.0
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        # The engine turns off an autocast around it, so this one is inside.
        module.forward = self._with_autocast(module.forward)
        _check_parameters(module)
        engine, _ = self._accelerator.prepare(module, self.optimizer)
        _hide_from_transformers(self._accelerator)
        requested = settings["zero_optimization"]["stage"]
        is_zero = isinstance(engine, deepspeed.DeepSpeedEngine)
        self.stage = int(engine.zero_optimization_stage()) if is_zero else 0
        if self.stage != requested:
            raise RuntimeError(f"asked for ZeRO {requested}, got {type(engine).__name__}")
        if engine.world_size != collectives.world_size():
            raise RuntimeError(f"DeepSpeed counts {engine.world_size} ranks")
        self._has_gradients = False
        self._zero = engine.optimizer
        self.optimizer = self._zero.optimizer  # of flat pieces of parameters
        return engine

    def _with_autocast(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def embed(*inputs: Tensor) -> Any:
            with self._autocast():
                return forward(*inputs)

        return embed

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        embeddings = self.wrapped(*inputs)
        # A gradient that reaches what it returned counts as the backward of the step; a view's
        # does not.
        return tuple(x.view_as(x) for x in embeddings)

    def backward(self, losses: Callable[[int], Tensor], count: int = 1) -> None:
        with self.wrapped.coalesce_grad_reduction():
            for part in range(count):
                self.wrapped.backward(losses(part))
            begin = time.perf_counter()  # what is left is the reduction, on leaving the block
        self._has_gradients = True
        self.reduce_s += time.perf_counter() - begin

    def step(self, lr: float, loss: Tensor | None = None) -> Step:
        if loss is not None and not loss.isfinite():
            self.discard_gradients()
            return Step(math.nan, applied=False)
        self._set_lr(lr)
        self.wrapped.step()
        self._has_gradients = False
        if self._zero.overflow:
            return Step(math.inf, applied=False)
        return Step(float(self.wrapped.get_global_grad_norm()), applied=True)

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
        if self.stage == 3:  # the next ones do not overwrite the padding of a partition
            self._zero.grad_partitions_flat_buffer.zero_()

    def weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            with self._gathered([value]):
                if collectives.rank() == 0:
                    weights[name] = to_cpu(value)
        finish_copies(self._device)
        return weights

    def optimizer_state(self) -> OptimizerState:
        state = {}
        for parameter, flat in self._flat_parameters():
            keys = self.optimizer.state.get(flat, {})
            values = {key: self._whole_state(parameter, flat, key) for key in keys}
            values = {key: value for key, value in values.items() if value is not None}
            if values:
                state[self._names[parameter]] = values
        finish_copies(self._device)
        if collectives.rank():
            return {}
        return {"state": state, "groups": group_counts(self.optimizer), "scaler": {}}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for parameter, flat in self._flat_parameters():
            local = self.optimizer.state[flat]
            for key, value in state["state"].get(self._names[parameter], {}).items():
                if key == "step" or not isinstance(value, Tensor):
                    local[key] = to_cpu(value)
                    continue
                if key not in local:
                    local[key] = torch.zeros_like(flat)
                self._set_fragment(parameter, local[key], value.to(flat.device).flatten())
        load_group_counts(self.optimizer, state["groups"])

    def parameter_norm(self) -> float:
        trained: list[Any] = [p for p in self.module.parameters() if p.requires_grad]
        if self.stage < 3:
            return float(nn.utils.get_total_norm([p.detach() for p in trained]))
        squares = torch.stack([p.ds_tensor.double().square().sum() for p in trained]).sum()
        return math.sqrt(collectives.all_reduce_sum(squares).item())

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Trained parameters of more than one number must not be changed inside."""
        scalars = [x for x in self._flat_parameters() if math.prod(_shape(x[0])) == 1]
        with self._gathered(list(self.module.parameters()), change=True):
            yield
            after = [parameter.detach().flatten().clone() for parameter, _ in scalars]
        for (parameter, flat), value in zip(scalars, after, strict=True):
            self._set_fragment(parameter, flat.data, value)  # ZeRO updates copies of its own

    @contextmanager
    def _gathered(self, tensors: list[Tensor], change: bool = False) -> Iterator[None]:
        """Context in which the parameters that ZeRO 3 has partitioned are whole."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters = [x for x in tensors if hasattr(x, "ds_id")]
        root = 0 if change else None
        with GatheredParameters(parameters, modifier_rank=root, enabled=bool(parameters)):
            yield

    def _flat_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter, and the optimizer's flat tensor that holds a fragment of it."""
        if self.stage == 3:
            for parameter in (p for group in self._zero.fp16_groups for p in group):
                group, _, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                yield parameter, self._zero.fp32_partitioned_groups_flat[group]
            return
        flats = self._zero.single_partition_of_fp32_groups
        for parameters, flat in zip(self._zero.bit16_groups, flats, strict=True):
            for parameter in parameters:
                yield parameter, flat

    def _whole_state(self, parameter: nn.Parameter, flat: Tensor, key: str) -> Any:
        """Whole optimizer state of a parameter, on the CPU.

        Collectives: an all-reduce or all-gather.
        """
        value = self.optimizer.state[flat][key]
        if key == "step" or not isinstance(value, Tensor):
            return to_cpu(value)
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            return to_cpu(safe_get_full_optimizer_state(parameter, key)).view(_shape(parameter))
        whole = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
        for in_parameter, in_flat in _fragment(parameter):
            whole[in_parameter] = value[in_flat]
        return to_cpu(collectives.all_reduce_sum(whole)).view(parameter.shape)

    def _set_fragment(self, parameter: nn.Parameter, flat: Tensor, whole: Tensor) -> None:
        """Copy this rank's fragment of a parameter, or of its state, into a flat tensor."""
        if self.stage < 3:
            for in_parameter, in_flat in _fragment(parameter):
                flat[in_flat] = whole[in_parameter]
            return
        _, begin, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        fragment = whole[size * collectives.rank() :][:size]  # the last one may be short
        flat[begin : begin + len(fragment)] = fragment


def _check_parameters(module: nn.Module) -> None:
    """DeepSpeed sends parameters as bytes, which takes a dimension."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"parameter {name} has no dimensions, and DeepSpeed cannot share such a one; make "
                f"it a vector of one number, torch.zeros(1), or set backend.zero_stage=0"
            )


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _fragment(parameter: nn.Parameter) -> Iterator[tuple[slice, slice]]:
    """Slices of a parameter and of this rank's flat tensor that correspond; none if this rank holds
    nothing of it."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield (
            slice(here.start, here.start + here.numel),
            slice(there.start, there.start + there.numel),
        )
