"""This process of a run: alone, or one of the ranks that torchrun or SLURM started."""

import datetime
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from torch import nn

from dist_contrastive import ranks
from dist_contrastive.backend.accelerate_launch import check_accelerate_launch
from dist_contrastive.backend.engine import Engine
from dist_contrastive.backend.recompute import recompute_blocks
from dist_contrastive.backend.replicated import Replicated
from dist_contrastive.backend.settings import BackendSettings
from dist_contrastive.backend.zero import Zero
from dist_contrastive.backend.zero_setup import forget_switches, zero_accelerator
from dist_contrastive.errors import ConfigError

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Beyond the watchdog's limit, so that the rank that hangs is heard before those that wait for it.
_GRACE_S = 60.0


class Backend:
    """One process of a run: alone, or one of the ranks.

    A process group that exists already is used and left alone.
    """

    def __init__(self, settings: BackendSettings) -> None:
        self.settings = settings
        self._owns_group = not dist.is_initialized()
        self._accelerator = _accelerator(settings)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        of_torch = dist.get_world_size() if dist.is_initialized() else 1
        if of_torch != self.world_size:
            raise RuntimeError(f"Accelerate counts {self.world_size} ranks, torch {of_torch}")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None
    ) -> Engine:
        """The engine that the settings name, for a task and an optimiser of its parameters.

        Raises:
            ConfigError: it cannot train this task.
        """
        if self.settings.activation_checkpointing:
            recompute_blocks(module)
        if self.settings.compile:
            module.forward = torch.compile(module.forward)
        dtype = _DTYPES[self.settings.precision]
        if self.settings.zero_stage:
            return Zero(self._accelerator, module, optimizer, dtype, clip_norm)
        return Replicated(self._accelerator, module, optimizer, dtype, clip_norm)

    def close(self) -> None:
        """Leave the process group; another run may start in this process."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        forget_switches()
        # Accelerate keeps the settings of the first Accelerator of a process for all later ones.
        AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator(settings: BackendSettings) -> Accelerator:
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    has_ranks = ranks.join()
    check_accelerate_launch(settings, has_ranks)
    if has_ranks and torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # SLURM shows a task nothing but its own GPU
    process_group = InitProcessGroupKwargs(
        backend="gloo" if cpu else "nccl",
        timeout=datetime.timedelta(seconds=settings.timeout_s + _GRACE_S),
    )
    if not settings.zero_stage:
        # Given a backend, Accelerate expects a process group even where there is one process.
        handlers: list[KwargsHandler] = [process_group] if has_ranks else []
        return Accelerator(cpu=cpu, kwargs_handlers=handlers)
    if not has_ranks:
        raise ConfigError(
            f"backend.zero_stage={settings.zero_stage} shares a model among ranks, and this is one "
            f"process alone; start it with python -m launch.local CONFIG --ranks N, or set "
            f"backend.zero_stage=0"
        )
    return zero_accelerator(settings, process_group, cpu)
