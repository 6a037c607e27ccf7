"""Bound of the memory that new modules take, known before any of it is allocated."""

import math
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_contrastive.errors import ConfigError


class BoundedAllocation(TorchDispatchMode):
    """Context in which new tensors on the CPU must fit together into the memory of this machine.

    Raises:
        ConfigError: they do not; a kernel would have ended the process instead, later.
    """

    def __init__(self) -> None:
        super().__init__()
        self._most = psutil.virtual_memory().total
        self._new = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shape = args[0] if args and isinstance(args[0], list | tuple) else None
        if shape and all(isinstance(side, int) for side in shape):  # as of torch.empty
            self._count(shape, kwargs)
        return func(*args, **kwargs)

    def _count(self, shape: Any, options: dict[str, Any]) -> None:
        if torch.device(options.get("device") or "cpu").type != "cpu":
            return
        dtype = options.get("dtype") or torch.get_default_dtype()
        self._new += math.prod(shape) * dtype.itemsize
        if self._new > self._most:
            raise ConfigError(
                f"the task needs more than the {self._most / 2**30:.3g} GiB of memory of this "
                f"machine, at a tensor of {list(shape)}; set smaller widths, sizes or numbers of "
                f"layers"
            )
