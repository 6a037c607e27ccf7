"""Public kernels of others for the same losses, on the same card in the same run, where they can be
imported: memeff (CLIP), inf-cl (CLIP), siglip-kernel (SigLIP)."""

import importlib
import math
from collections.abc import Callable

import torch
from dense import BIAS, SCALE, TEMPERATURE
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def memeff(device: str) -> Loss:
    """CLIP's loss; the temperature is a constant there."""
    module = importlib.import_module("memeff")
    loss: Loss = module.MemoryEfficientCLIPLoss(
        temperature=TEMPERATURE, stable=False, normalized_inputs=True
    )
    return loss


def inf_cl(device: str) -> Loss:
    """CLIP's loss, both directions by a call of their own."""
    compare = importlib.import_module("inf_cl").cal_flash_loss
    scale = torch.tensor(1 / TEMPERATURE, device=device, requires_grad=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        both: Tensor = compare(x, y, scale=scale) + compare(y, x, scale=scale)
        return both.mean() / 2

    return loss


def siglip_kernel(device: str) -> Loss:
    """SigLIP's loss, with gradients of scale and bias."""
    compare = importlib.import_module("siglip_kernel").fused_siglip_loss
    log_scale = torch.tensor(math.log(SCALE), device=device, requires_grad=True)
    bias = torch.tensor(BIAS, device=device, requires_grad=True)
    return lambda x, y: compare(x, y, log_scale, bias)


PEERS: dict[str, tuple[str, Callable[[str], Loss]]] = {
    "memeff": ("infonce, symmetric", memeff),
    "inf-cl": ("infonce, symmetric", inf_cl),
    "siglip-kernel": ("siglip", siglip_kernel),
}
"""By name: the loss that it computes, and what makes it. They take rows of unit length."""
