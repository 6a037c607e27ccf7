"""Process of a run: alone, or one of the ranks that torchrun or SLURM started."""

import datetime
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from pydantic import Field
from torch import nn

from dist_contrastive import collectives, ranks
from dist_contrastive.backend.engine import (
    Engine,
    multiply_in_tf32,
    put_channels_last,
    recompute_blocks,
)
from dist_contrastive.backend.replicated import Replicated
from dist_contrastive.backend.zero import Zero, forget_switches, zero_accelerator
from dist_contrastive.errors import ConfigError, LostRankError
from dist_contrastive.malloc import keep_freed_memory
from dist_contrastive.settings import Settings

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Beyond the watchdog's limit, so that the rank that hangs reports before those that wait for it.
_GRACE_S = 60.0
_SILENT_S = 10.0  # ranks of one machine have found each other by then
_log = logging.getLogger(__name__)


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
        tf32: bool = False
        """On a GPU, products of fp32 numbers in the networks are of TF32 (10 bits after the point),
        several times as fast. Losses keep fp32."""
        channels_last: bool = False
        """Images, and weights of convolutions, have their channels last in memory (NHWC), which
        tensor cores read faster. Results are the same but for rounding."""
        activation_checkpointing: bool = False
        """Compute the insides of blocks of networks again in the backward pass instead of keeping
        them: less memory for a third more time."""
        timeout_s: float = Field(default=1800.0, gt=0, le=31_536_000)
        """Longest time in seconds that a rank may be silent, or wait for another one, before the
        run is ended."""

    def __init__(self, settings: Config) -> None:
        self.settings = settings
        keep_freed_memory()
        self._owns_group = not dist.is_initialized()
        # Without a word torch takes TF32 for convolutions, and fp32 for other products.
        matmul, convolutions = _fp32_products()
        self._products_before = [(x, x.fp32_precision) for x in (matmul, convolutions)]
        matmul.fp32_precision = "ieee"  # but in networks
        convolutions.fp32_precision = "tf32" if settings.tf32 else "ieee"
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
        if self.settings.channels_last:
            if self.settings.zero_stage:
                raise ConfigError(
                    f"backend.channels_last=true with backend.zero_stage={self.settings.zero_stage}"
                    f": DeepSpeed keeps weights in flat pieces; leave it out, or set zero_stage=0"
                )
            put_channels_last(module)
        if self.settings.tf32:
            multiply_in_tf32(module)
        if self.settings.compile:
            module.forward = torch.compile(module.forward)
        engine = Zero if self.settings.zero_stage else Replicated
        dtype = _DTYPES[self.settings.precision]
        return engine(self._accelerator, module, optimizer, dtype, clip_norm)

    def close(self) -> None:
        """Leave the process group; another run may start in this process."""
        for products, precision in self._products_before:
            products.fp32_precision = precision
        collectives.forget_deferred()  # of a step that failed
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        forget_switches()
        # Accelerate keeps the settings of the first Accelerator of a process for all later ones.
        AcceleratorState._reset_state(reset_partial_state=True)


def compute_device(settings: Backend.Config) -> torch.device:
    """Where one process alone computes: a GPU if there is one and it is wanted."""
    on_gpu = settings.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _fp32_products() -> list[Any]:
    """What holds the precision in which a GPU multiplies fp32 numbers: in matrix products, and in
    convolutions."""
    return [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]


def _accelerator(settings: Backend.Config) -> Accelerator:
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    has_ranks = ranks.join()
    _check_accelerate_launch(settings, has_ranks)
    if has_ranks and torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # SLURM shows a task nothing but its own GPU
    timeout_s = settings.timeout_s + _GRACE_S
    if has_ranks:
        with _waiting_for_ranks(timeout_s):
            process_group = _process_group(cpu, timeout_s)
            if settings.zero_stage:
                return zero_accelerator(settings.zero_stage, settings.precision, process_group, cpu)
            return Accelerator(cpu=cpu, kwargs_handlers=[process_group])
    if settings.zero_stage:
        raise ConfigError(
            f"backend.zero_stage={settings.zero_stage} shares a model among ranks, and this is one "
            f"process alone; start it with python -m launch.local CONFIG --ranks N, or set "
            f"backend.zero_stage=0"
        )
    if not dist.is_initialized() and (left := ranks.forget()):
        _log.warning(
            "%s, but nothing says that this process is one of several ranks: it trains alone; "
            "start with torchrun or srun for ranks that train together",
            left,
        )
    # Given a backend, Accelerate expects a process group even where there is one process.
    return Accelerator(cpu=cpu)


def _process_group(cpu: bool, timeout_s: float) -> InitProcessGroupKwargs:
    """The process group of all ranks, and what Accelerate is told of it.

    On GPUs it has gloo beside NCCL: what only the host knows, as whether to stop, is exchanged
    without waiting for what the GPU has yet to do.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if cpu else "cpu:gloo,cuda:nccl", timeout=timeout)
    return InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timeout)


@contextmanager
def _waiting_for_ranks(timeout_s: float) -> Iterator[None]:
    """Context in which this rank meets the others: it says for whom it waits, and gives up.

    Raises:
        ConfigError: the variables of this rank cannot be meant.
        LostRankError: the others never came.
    """
    if dist.is_initialized():
        yield
        return
    ranks.check()
    rank, size, host, port = (
        os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    text = (
        "rank %s of %s waits for the others at %s:%s, for %g s at most; to train alone, unset RANK"
    )
    arguments = text, rank, size, host, port, timeout_s
    timer = threading.Timer(_SILENT_S, _log.warning, arguments)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if not (collectives.is_lost_rank(error) or isinstance(error, dist.DistStoreError)):
            raise
        AcceleratorState._reset_state(reset_partial_state=True)
        reason = str(error).splitlines()[0].split(" Traceback")[0]
        raise LostRankError(
            f"rank {rank} of {size} did not meet the others at {host}:{port} within {timeout_s:g} "
            f"s ({reason}); start all ranks again, or unset RANK to train alone"
        ) from error
    finally:
        timer.cancel()


def _check_accelerate_launch(settings: Backend.Config, has_ranks: bool) -> None:
    """Refuse flags of `accelerate launch` that contradict the config.

    Raises:
        ConfigError: another precision, engine or compiler; or several processes that are one.
    """
    names = ("MIXED_PRECISION", "DYNAMO_BACKEND")
    precision, dynamo = (os.environ.get(f"ACCELERATE_{name}", "").lower() for name in names)
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
    engines = ("deepspeed", "fsdp", "megatron_lm", "parallelism_config")
    asked = [
        x for x in engines if os.environ.get(f"ACCELERATE_USE_{x.upper()}", "").lower() == "true"
    ]
    if asked:
        raise ConfigError(
            f"accelerate launch --use_{asked[0]} with backend.zero_stage={settings.zero_stage}: "
            f"the config decides; set backend.zero_stage, and give --multi_gpu instead"
        )
    if dynamo not in ("", "no"):
        raise ConfigError(
            f"accelerate launch --dynamo_backend {dynamo}: leave the flag out, and set "
            f"backend.compile=true"
        )
