"""An Accelerator that makes DeepSpeed engines."""

import logging
import os
import warnings
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from dist_contrastive.backend.settings import BackendSettings
from dist_contrastive.errors import ConfigError

# Parameters of fewer numbers stay whole on every rank under ZeRO 3: biases, norms, temperatures.
_WHOLE_BELOW = 4096
# Numbers that are reduced at a time; DeepSpeed allocates that many.
_BUCKET = 1 << 23
# Names that torch 2.13 replaced and DeepSpeed uses still.
_RENAMED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
_SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "DS_ACCELERATOR")


def zero_accelerator(
    settings: BackendSettings, process_group: InitProcessGroupKwargs, cpu: bool
) -> Accelerator:
    """An Accelerator that really makes a DeepSpeed engine: told otherwise that it is on a CPU, it
    makes DDP instead, and without these variables it counts one rank on each.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot do what is asked for.
    """
    if settings.precision == "fp16":
        raise ConfigError(
            f"backend.precision=fp16 with backend.zero_stage={settings.zero_stage}: DeepSpeed "
            f"scales the loss for weights in fp16 only, and ours are fp32; set precision=bf16, or "
            f"zero_stage=0"
        )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"backend.zero_stage={settings.zero_stage} needs DeepSpeed; install it with pip "
            f"install 'dist-contrastive[deepspeed]', or set backend.zero_stage=0"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)  # of steps that are skipped we tell ourselves
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
    # Reductions through shared memory, which it would compile first: gloo does well without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(hf_ds_config=_config(settings.zero_stage))
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[process_group])
    hide_from_transformers(accelerator)
    return accelerator


def hide_from_transformers(accelerator: Accelerator) -> None:
    """It would take the models that it makes apart by itself while it knows of the settings; those
    are to be whole until the engine takes the task."""
    accelerator.state.deepspeed_plugin.dschf = None


def forget_switches() -> None:
    """A later run in this process may be without DeepSpeed."""
    for name in _SWITCHES:
        os.environ.pop(name, None)


def _config(stage: int) -> dict[str, Any]:
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
