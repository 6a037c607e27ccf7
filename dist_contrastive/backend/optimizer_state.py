"""What an optimiser remembers, by the names of parameters: no engine's own form, so that any engine
on any number of ranks can go on with it."""

from typing import Any

import torch
from torch import Tensor, nn


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each parameter in the module's state_dict."""
    return {parameter: name for name, parameter in module.named_parameters()}


def group_counts(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Steps that an optimiser counts in its parameter groups; the rest of them is config."""
    return [{k: v for k, v in group.items() if k == "step"} for group in optimizer.param_groups]


def named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """State of an optimiser that holds the module's own parameters, as copies on the CPU."""
    names: dict[Any, str] = dict(parameter_names(module))
    state = {names[p]: {k: on_cpu(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    return {"state": state, "groups": group_counts(optimizer)}


def load_named_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: dict[str, Any]
) -> None:
    """Put back what `named_state` gave."""
    for name, parameter in module.named_parameters():
        if name in state["state"]:
            mine = optimizer.state[parameter]
            for key, value in state["state"][name].items():
                mine[key] = _placed(value, key, parameter)
    load_group_counts(optimizer, state["groups"])


def load_group_counts(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Steps that an optimiser counts in its parameter groups."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def on_cpu(value: Any) -> Any:
    """A copy of a tensor, on the CPU; a number as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _placed(value: Any, key: str, parameter: nn.Parameter) -> Any:
    """torch's optimisers keep the count of steps on the CPU, whatever the device."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if key == "step" else value.to(parameter.device, copy=True)
