"""Scale of similarities, 1 / temperature: constant, or learnable within limits."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.errors import ConfigError

# What a learnable scale is kept within: CLIP's upper limit (arXiv 2103.00020, section 2.5), and a
# temperature of 1.
SCALES, TEMPERATURES = (1.0, 100.0), (0.01, 1.0)


def check_start(name: str, value: float, lowest: float, highest: float) -> None:
    """Refuse a learnable number that the first clamp would move. Raises: ValueError."""
    if not lowest <= value <= highest:
        raise ValueError(
            f"{name}={value:g} is learnable, hence kept from {lowest:g} to {highest:g}; "
            f"start it there, or set learnable to false"
        )


def refuse_parameters(loss: str, values: Iterable[Any]) -> None:
    """Refuse settings that are to be learned, and would be constants. Raises: ConfigError."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in values):
        raise ConfigError(
            f"{loss} was given a setting that requires a gradient, which no number gets; give the "
            f"number, and learnable=True where it is to be learned"
        )


class Scale(nn.Module):
    """1 / temperature, constant or learnable as its logarithm (CLIP's parametrisation)."""

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        log_scale = -math.log(temperature)
        # A vector of one number: DeepSpeed cannot share a parameter without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([log_scale])) if learnable else log_scale

    def forward(self) -> Tensor:
        """Scalar, differentiable; a constant keeps its fp64 digits whatever the module's dtype."""
        if isinstance(self.log_scale, Tensor):
            dtype = collectives.accumulation_dtype(self.log_scale.dtype)
            return self.log_scale.to(dtype).exp().squeeze()
        return torch.tensor(self.log_scale, dtype=torch.float64).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring a learnable scale back to 1 ... 100, in place; a constant one is left alone.

        To be called after the optimiser's step, as CLIP does. A clamp in `forward` would not do:
        beyond the limit its gradient is 0, and the scale would never come back.
        """
        if isinstance(self.log_scale, Tensor):
            self.log_scale.clamp_(*map(math.log, SCALES))


def clamp_scales(module: nn.Module) -> None:
    """Learnable temperatures inside a module brought back to 1/100 ... 1, to be called after
    ``optimizer.step()`` in a loop of one's own."""
    for part in module.modules():
        if isinstance(part, Scale):
            part.clamp_()
