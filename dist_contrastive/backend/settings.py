"""Settings of where and how a run computes."""

from typing import Literal

from pydantic import PositiveFloat

from dist_contrastive.settings import Settings


class BackendSettings(Settings):
    """Where, in which precision and by which engine a run computes."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks, by autocast: weights and their updates are fp32 always, losses keep their
    scores in fp32. fp16 scales the loss so that small gradients are not lost."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: every rank holds the whole model (DDP). DeepSpeed's ZeRO shares among ranks 1: the state
    of the optimiser, 2: gradients too, 3: weights too."""
    compile: bool = False
    """Compile the networks with torch.compile, which takes a while and makes steps faster."""
    activation_checkpointing: bool = False
    """Compute the insides of blocks of networks again in the backward pass instead of keeping them:
    less memory for a third more time."""
    timeout_s: PositiveFloat = 1800.0
    """How long a rank may be silent, or wait for another one, before the run is ended."""
