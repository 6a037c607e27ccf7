"""A copy of a network that follows it slowly (MoCo, BYOL, EMA); what may stand in such a pair."""

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_contrastive.errors import ConfigError


class MomentumCopy(nn.Module):
    """A deep copy of `module` that no gradient moves, only `update`.

    It is in eval mode always, so that a row of its output depends on that row alone. Parameters
    and buffers of half precision are kept in fp32, in which a step of 1 - momentum = 0.001 is not
    lost to rounding; others keep their dtype. The copy belongs to the `state_dict` of the module
    that holds it, so checkpoints have it.

    References:
        He et al. 2019, arXiv 1911.05722; Grill et al. 2020, arXiv 2006.07733.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What the copied module gives, without a graph."""
        return self.module(*inputs)

    @torch.no_grad()
    def update(self, source: nn.Module, momentum: float | Tensor) -> None:
        """p <- momentum p + (1 - momentum) source's p for parameters; buffers are copied.

        Every rank computes the same where `source` is the same on every rank; nothing is sent.

        Args:
            source: the copied module, not wrapped for ranks.
            momentum: 1 leaves the parameters as they are, 0 copies; a scalar tensor need not be
                read from its device.
        Raises:
            ValueError: the source has not as many parameters or buffers as the copy.
        """
        weight = 1 - momentum
        parameters = zip(self.module.parameters(), source.parameters(), strict=True)
        for average, current in list(parameters):  # all paired before the first of them changes
            rate = weight.to(average.dtype) if isinstance(weight, Tensor) else weight
            average.lerp_(current.to(average.dtype), rate)
        buffers = zip(self.module.buffers(), source.buffers(), strict=True)
        for buffer, newer in list(buffers):
            buffer.copy_(newer)


def momentum_at(progress: float, start: float) -> float:
    """Momentum that rises from `start` to 1 along half a cosine, as in BYOL and MoCo v3.

    1 - (1 - start) (1 + cos(pi progress)) / 2, with `progress` the part of the training that is
    done, kept within 0 and 1.

    References:
        Grill et al. 2020, arXiv 2006.07733, section 3.3; Chen et al. 2021, arXiv 2104.02057.
    """
    done = min(max(progress, 0.0), 1.0)
    return 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2


def ema_decay_at(step: int | Tensor, decay: float) -> Tensor:
    """Momentum of an average over a training's weights that does not dwell on the first ones.

    min(decay, (1 + step) / (10 + step)), a scalar in fp64 on the device of `step`, the optimiser
    steps before this one: it begins at 0.1 and reaches 0.999 after 8990 steps.

    References:
        `ExponentialMovingAverage` of TensorFlow 1.
    """
    done = torch.as_tensor(step, dtype=torch.float64)
    return ((1 + done) / (10 + done)).clamp(max=decay)


def check_row_independent(module: nn.Module, why: str) -> None:
    """Refuse a network in which a row's output depends on the other rows of its batch.

    That is one with a BatchNorm (SyncBatchNorm included) that takes its statistics from the batch
    when `module` is in training mode. In MoCo a query could find its own key by the statistics
    that both share, and the loss would fall while nothing is learned (arXiv 1911.05722, section
    3.3).

    Args:
        module: the network; it is left in the mode in which it came.
        why: what goes wrong with it, as in "a query could find its own key by them".
    Raises:
        ConfigError: such a layer was found; it is named.
    """
    mode = module.training
    module.train()
    found = [
        f"{name or 'the network'} ({type(layer).__name__})"
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and (layer.training or _has_no_statistics(layer))
    ]
    module.train(mode)
    if found:
        raise ConfigError(
            f"{found[0]} of {type(module).__name__} normalises with statistics of the batch, "
            f"and {why}: set row_independent: true, or use a network with GroupNorm."
        )


def _has_no_statistics(layer: _BatchNorm) -> bool:
    """Without stored statistics (track_running_stats=False) eval mode uses the batch's too."""
    running_mean: Tensor | None = layer.running_mean
    return running_mean is None
