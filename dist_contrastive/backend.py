"""Device, precision and the reduction of gradients: the only file that knows Accelerate."""

import datetime
import os
import random
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive.settings import Settings


class BackendSettings(Settings):
    """Where and in which precision a run computes."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks; losses keep their scores in fp32 either way."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    timeout_s: PositiveFloat = 1800.0
    """How long a rank waits for the others in a collective."""


class Backend:
    """One process of a run: alone, or one of the ranks that torchrun started."""

    def __init__(self, settings: BackendSettings) -> None:
        cpu = settings.device == "cpu" or not torch.cuda.is_available()
        process_group = InitProcessGroupKwargs(
            backend="gloo" if cpu else "nccl",
            timeout=datetime.timedelta(seconds=settings.timeout_s),
        )
        # Given a backend, Accelerate expects a process group even where there is one process.
        handlers: list[KwargsHandler] = [process_group] if "LOCAL_RANK" in os.environ else []
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if settings.precision == "bf16" else "no",
            kwargs_handlers=handlers,
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        if self.world_size > 1 and dist.get_world_size() != self.world_size:
            raise RuntimeError(
                f"Accelerate counts {self.world_size} ranks, torch {dist.get_world_size()}"
            )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both for use across ranks: gradients are averaged in backward. Never give it a loader."""
        module, optimizer = self._accelerator.prepare(module, optimizer)
        if isinstance(module, DistributedDataParallel):
            # A queue of keys or a running mean is computed alike on all ranks: not sent each step.
            module.broadcast_buffers = False
        return module, optimizer

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over ranks."""
        self._accelerator.backward(loss)

    def gradient_norm(self, module: nn.Module, clip_norm: float | None) -> float:
        """Norm of the averaged gradient; scales it down to `clip_norm` if that is given."""
        limit = float("inf") if clip_norm is None else clip_norm
        return float(self._accelerator.clip_grad_norm_(module.parameters(), limit))

    def close(self) -> None:
        """Leave the process group; another run may start in this process."""
        if dist.is_initialized():
            dist.destroy_process_group()
        # Accelerate keeps the settings of the first Accelerator of a process for all later ones.
        AcceleratorState._reset_state(reset_partial_state=True)


def seed_everything(seed: int) -> None:
    """Start the generators of Python, NumPy and torch: called with a function of seed, step and
    rank before every step, so that a checkpoint needs to store none of their states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
