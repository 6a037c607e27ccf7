"""Optimisers, and the learning rate as a function of the step."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from dist_contrastive.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Settings):
    """How parameters are updated."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Largest learning rate, reached after the warmup."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate grows linearly from 0."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step as a fraction of lr; cosine decay in between."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled; not applied to biases, norms and temperatures."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's; SGD uses the first as its momentum."""
    clip_norm: PositiveFloat | None = None
    """Gradients are scaled down to at most this norm; null leaves them."""


def learning_rate(step: int, num_steps: int, settings: OptimSettings) -> float:
    """Learning rate of a step (0 is the first): linear warmup, then cosine to the final ratio.

    A function of the step alone, so that a resumed run and any number of ranks follow one curve.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    decaying = max(1, num_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / decaying)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine)


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Optimiser of the module's trainable parameters; vectors and scalars are not decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        momentum = settings.betas[0]
        return torch.optim.SGD(groups, settings.lr, momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
