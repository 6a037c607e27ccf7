"""What a decision is worth: rewards for `PolicyGradient`, and how they are found and called."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.imports import import_module, is_import_path
from dist_contrastive.losses.hierarchy import Hierarchy

Reward = Callable[[Tensor, Tensor, Hierarchy], Tensor]
"""Decisions and labels, int64 [n], and their hierarchy, to rewards [n]; more is better.

Row i of the result may depend on row i of decisions and labels only. It need not be differentiable.
It is called on some ranks only (those that have labels), so it must not talk to the other ranks.
"""


def depth_credit(decisions: Tensor, labels: Tensor, hierarchy: Hierarchy) -> Tensor:
    """The part of the path that is right, from the root: 1 for the right class, fp64 [n]."""
    return hierarchy.matched_levels(decisions, labels).double() / hierarchy.depth


def load_reward(path: str) -> Reward:
    """The function that ``package.module:function`` names.

    Raises:
        ConfigError: no such form, module or name, or it cannot be called.
    """
    module_name, _, name = path.partition(":")
    form = "name a reward as package.module:function"
    if not is_import_path(path):
        raise ConfigError(f"reward {path!r} is not of the form package.module:function; {form}")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(
            f"reward {path!r} cannot be imported ({_one_line(error)}); {form}, from a module that "
            f"is installed or on PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"module {module_name} of reward {path!r} has no {name!r}; {form}")
    reward = getattr(module, name)
    if not callable(reward):
        raise ConfigError(f"reward {path!r} is {type(reward).__name__}, not a function; {form}")
    return reward


def reward_name(reward: Reward) -> str:
    """``package.module:function``, for messages."""
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return f"{reward.__module__}:{name}"


def call_reward(reward: Reward, decisions: Tensor, labels: Tensor, hierarchy: Hierarchy) -> Tensor:
    """The function's rewards of decisions and labels [n], without gradient: [n].

    It is not called where n = 0.

    Raises:
        ConfigError: it raises, or returns something else than n real numbers; naming it.
    """
    if len(decisions) == 0:
        return torch.zeros(0, device=decisions.device)
    try:
        rewards = reward(decisions, labels, hierarchy)
    except Exception as error:
        raise ConfigError(
            f"reward {reward_name(reward)} raised {type(error).__name__} ({_one_line(error)}); it "
            f"must take decisions [n], labels [n] and their hierarchy"
        ) from error
    found = type(rewards).__name__
    if isinstance(rewards, Tensor):
        found = f"{rewards.dtype} {list(rewards.shape)}"
        is_real = not rewards.is_complex() and rewards.dtype != torch.bool
        if is_real and rewards.shape == decisions.shape:
            return rewards.detach()
    raise ConfigError(
        f"reward {reward_name(reward)} returned {found} for {len(decisions)} decisions; return a "
        f"tensor of one number, floating or integer, for each"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
