"""Process of a run: alone, or one of the ranks that torchrun or SLURM started."""

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
from torch import nn

from dist_contrastive import ranks
from dist_contrastive.backend.engine import Engine, recompute_blocks
from dist_contrastive.backend.replicated import Replicated
from dist_contrastive.backend.zero import Zero, forget_switches, zero_accelerator
from dist_contrastive.errors import ConfigError
from dist_contrastive.malloc import keep_freed_memory
from dist_contrastive.settings import Settings

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Beyond the watchdog's limit, so that the rank that hangs reports before those that wait for it.
_GRACE_S = 60.0


class Backend:
    """One process of a run: alone, or one of the ranks.

    A process group that exists already is used and left alone.
    """

    class Config(Settings):
        """Device, precision and engine of a run."""

        precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        """Of the networks, by autocast: weights and their updates are fp32 always, losses keep
        their scores in fp32. fp16 scales the loss so that small gradients are not lost."""
        device: Literal["auto", "cpu"] = "auto"
        """auto takes a GPU where there is one."""
        zero_stage: Literal[0, 1, 2, 3] = 0
        """0: every rank holds the whole model (DDP). DeepSpeed's ZeRO shares among ranks 1: the
        optimizer state, 2: gradients too, 3: weights too."""
        compile: bool = False
        """Compile the networks with torch.compile, which takes a while and makes steps faster."""
        activation_checkpointing: bool = False
        """Compute the insides of blocks of networks again in the backward pass instead of keeping
        them: less memory for a third more time."""
        timeout_s: PositiveFloat = 1800.0
        """Longest time in seconds that a rank may be silent, or wait for another one, before the
        run is ended."""

    def __init__(self, settings: Config) -> None:
        self.settings = settings
        keep_freed_memory()
        self._owns_group = not dist.is_initialized()
        self._accelerator = _accelerator(settings)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks != self.world_size:
            raise RuntimeError(f"Accelerate counts {self.world_size} ranks, torch {num_ranks}")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None
    ) -> Engine:
        """Engine of the settings for a task and an optimizer of its parameters.

        Raises:
            ConfigError: it cannot train this task.
        """
        if self.settings.activation_checkpointing:
            recompute_blocks(module)
        if self.settings.compile:
            module.forward = torch.compile(module.forward)
        engine = Zero if self.settings.zero_stage else Replicated
        dtype = _DTYPES[self.settings.precision]
        return engine(self._accelerator, module, optimizer, dtype, clip_norm)

    def close(self) -> None:
        """Leave the process group; another run may start in this process."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        forget_switches()
        # Accelerate keeps the settings of the first Accelerator of a process for all later ones.
        AcceleratorState._reset_state(reset_partial_state=True)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch.

    Called with a function of seed, step, rank and micro-batch before every micro-batch, so that a
    checkpoint needs to store no generator state, and a micro-batch that is embedded twice is
    embedded alike.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _accelerator(settings: Backend.Config) -> Accelerator:
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    has_ranks = ranks.join()
    _check_accelerate_launch(settings, has_ranks)
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
    return zero_accelerator(settings.zero_stage, settings.precision, process_group, cpu)


def _check_accelerate_launch(settings: Backend.Config, has_ranks: bool) -> None:
    """Refuse flags of `accelerate launch` that contradict the config.

    Raises:
        ConfigError: another precision, engine or compiler; or several processes that are one.
    """
    names = ("MIXED_PRECISION", "USE_DEEPSPEED", "DYNAMO_BACKEND")
    precision, deepspeed, dynamo = (
        os.environ.get(f"ACCELERATE_{name}", "").lower() for name in names
    )
    if precision and not has_ranks and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu with several processes starts one of them only; leave --cpu "
            "out and give --multi_gpu, which works on CPUs too"
        )
    if precision not in ("", "no", settings.precision):
        raise ConfigError(
            f"accelerate launch --mixed_precision {precision} with backend.precision="
            f"{settings.precision}: the config decides; set backend.precision, and leave the flag "
            f"out"
        )
    if deepspeed == "true":
        raise ConfigError(
            f"accelerate launch --use_deepspeed with backend.zero_stage={settings.zero_stage}: the "
            f"config decides; set backend.zero_stage, and give --multi_gpu instead"
        )
    if dynamo not in ("", "no"):
        raise ConfigError(
            f"accelerate launch --dynamo_backend {dynamo}: leave the flag out, and set "
            f"backend.compile=true"
        )
