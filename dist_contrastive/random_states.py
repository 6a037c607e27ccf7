"""Global random generators of torch, NumPy and Python: seeded, and replayed."""

import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

_R = TypeVar("_R")


def seed_everything(seed: int) -> None:
    """Seed the generators.

    Called with a function of seed, step, rank and micro-batch before every micro-batch, so that a
    checkpoint needs to store no generator state, and a micro-batch that is embedded twice is
    embedded alike.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def replayed(function: Callable[[int], _R]) -> Callable[[int], _R]:
    """The function, whose later calls for a number find the generators as the first one did.

    What is drawn after these calls is what would have been drawn without them.
    """
    states: dict[int, Any] = {}

    def call(number: int) -> _R:
        before = _states()
        if states.setdefault(number, before) is before:
            return function(number)
        _set_states(states[number])
        try:
            return function(number)
        finally:
            _set_states(before)

    return call


def _states() -> Any:
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), on_gpu, np.random.get_state(), random.getstate()


def _set_states(states: Any) -> None:
    on_cpu, on_gpu, of_numpy, of_python = states
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
