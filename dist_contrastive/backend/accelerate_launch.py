"""What `accelerate launch` asks for by variables, which the config of a run has already."""

import os

from dist_contrastive.backend.settings import BackendSettings
from dist_contrastive.errors import ConfigError

_KNOWN = ("MIXED_PRECISION", "USE_DEEPSPEED", "DYNAMO_BACKEND")
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def check_accelerate_launch(settings: BackendSettings, has_ranks: bool) -> None:
    """Refuse what is not what the config says, instead of following one of the two.

    Raises:
        ConfigError: another precision, engine or compiler; or several processes that are one.
    """
    given = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in _KNOWN}
    if given["MIXED_PRECISION"] and not has_ranks and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu with several processes starts one of them only; leave --cpu "
            "out and give --multi_gpu, which goes for CPUs too"
        )
    if given["MIXED_PRECISION"] not in ("", "no", _PRECISION[settings.precision]):
        raise ConfigError(
            f"accelerate launch --mixed_precision {given['MIXED_PRECISION']} with "
            f"backend.precision={settings.precision}: the config has the say; set "
            f"backend.precision, and leave the flag out"
        )
    if given["USE_DEEPSPEED"] == "true":
        raise ConfigError(
            f"accelerate launch --use_deepspeed with backend.zero_stage={settings.zero_stage}: the "
            f"config has the say; set backend.zero_stage, and give --multi_gpu instead"
        )
    if given["DYNAMO_BACKEND"] not in ("", "no"):
        raise ConfigError(
            f"accelerate launch --dynamo_backend {given['DYNAMO_BACKEND']}: leave the flag out, "
            f"and set backend.compile=true"
        )
