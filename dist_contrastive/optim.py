"""Optimisers, and the learning rate as a function of the step."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from dist_contrastive.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
_BETAS = {"lion": (0.9, 0.99), "muon": (0.95, 0.95)}  # as their authors have them
# An update of theirs depends on the whole of a parameter: they cannot update a piece of it.
LAYERWISE = ("lars", "lamb", "muon")


class OptimConfig(Settings):
    """How parameters are updated."""

    name: Literal["adamw", "sgd", "lion", "lars", "lamb", "muon"] = "adamw"
    """adamw, sgd (Nesterov's momentum), lion; for very large batches lars and lamb, which keep the
    change of each parameter in proportion to its size; muon, which makes the changes of matrices
    orthogonal, at the learning rate of the AdamW that has the rest."""
    lr: PositiveFloat = 1e-3
    """Largest learning rate, reached after the warmup; for `lr_batch_size` if it is scaled."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How lr grows with data.global_batch_size / lr_batch_size."""
    lr_batch_size: PositiveInt = 256
    """Global batch for which lr is meant, where it is scaled."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate grows linearly from 0."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step as a fraction of lr; cosine decay in between."""
    weight_decay: NonNegativeFloat = 1e-4
    """Not applied to biases, norms and temperatures; decoupled from the gradient by all but sgd,
    lars and lamb, as they were published."""
    betas: tuple[Beta, Beta] | None = None
    """Decay of the averages of gradients and of their squares; sgd and lars have the first alone,
    their momentum. null: 0.9 and 0.999, of lion 0.99, of muon 0.95 both."""
    eps: PositiveFloat = 1e-8
    """What is added to the root of the mean square of gradients, which AdamW and LAMB divide by."""
    trust_coefficient: PositiveFloat = 1e-3
    """Of lars: change of a parameter by its size, at learning rate 1."""
    clip_norm: PositiveFloat | None = None
    """Gradients are scaled down to at most this norm; null leaves them."""


def learning_rate(
    step: int, num_steps: int, settings: OptimConfig, global_batch_size: int
) -> float:
    """Learning rate of a step (0 is the first): linear warmup, then cosine to the final ratio.

    A function of the step alone, so that a resumed run and any number of ranks follow one curve.

    References:
        Goyal et al. 2017, arXiv 1706.02677 (linear scaling); Krizhevsky 2014, arXiv 1404.5997
        (square root).
    """
    ratio = global_batch_size / settings.lr_batch_size
    largest = (
        settings.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[settings.lr_scaling]
    )
    if step < settings.warmup_steps:
        return largest * (step + 1) / settings.warmup_steps
    decaying = max(1, num_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / decaying)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return largest * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine)


def build_optimizer(
    module: nn.Module, settings: OptimConfig, fused: bool = False
) -> torch.optim.Optimizer:
    """Optimiser of the module's trainable parameters; vectors and scalars are not decayed.

    Args:
        fused: adamw and sgd update all parameters in one kernel.

    References:
        lion: Chen et al. 2023, arXiv 2302.06675; lars: You et al. 2017, arXiv 1708.03888, vectors
        by SGD; lamb: You et al. 2019, arXiv 1904.00962 (its third version: without correction of
        the averages' bias; sizes count up to 10); muon: Jordan 2024, scaled as in Liu et al. 2025,
        arXiv 2502.16982.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return _build([group for group in groups if group["params"]], settings, fused)


def _build(
    groups: list[dict[str, Any]], settings: OptimConfig, fused: bool
) -> torch.optim.Optimizer:
    lr, eps = settings.lr, settings.eps
    betas = settings.betas or _BETAS.get(settings.name, (0.9, 0.999))
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr, betas, eps, fused=fused or None)
        case "sgd":
            return torch.optim.SGD(groups, lr, betas[0], nesterov=betas[0] > 0, fused=fused or None)
    import pytorch_optimizer as more  # takes a second or two

    match settings.name:
        case "lion":
            return more.Lion(groups, lr, betas)
        case "lars":
            return more.LARS(
                groups, lr, momentum=betas[0], trust_coefficient=settings.trust_coefficient
            )
        case "lamb":
            # Without adam_debias its first steps would be 1 / (1 - beta ** step) times too long.
            return more.Lamb(groups, lr, betas, weight_decouple=False, eps=eps, adam_debias=True)
    for group in groups:
        first: Tensor = group["params"][0]
        group |= {"use_muon": first.dim() > 1, "lr": lr, "betas": betas, "eps": eps}
    return more.Muon(groups, lr, momentum=betas[0], use_adjusted_lr=True)
