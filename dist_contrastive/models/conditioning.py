"""What generators share: the call, what a class and a guidance strength do, sizes that halve."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError


class ConditionalGenerator(nn.Module, ABC):
    """Noise [b, noise_dim], with a class and a guidance strength where built for them, to samples.

    A sample depends on its own noise, label and strength alone: no batch statistics, no dropout.
    Works for b = 0, forward and backward.

    Args:
        noise_dim: numbers of Gaussian noise behind each sample.
        condition_dim: of the vector that stands for class and strength, the sum of their
            embeddings; `self.condition_dim` is 0 for a generator with neither.
        num_classes: labels are 0 ... num_classes - 1; None: the call takes none.
        guided: the call takes a strength.
    """

    def __init__(
        self, noise_dim: int, condition_dim: int, num_classes: int | None, guided: bool
    ) -> None:
        super().__init__()
        self.noise_dim, self.num_classes, self.guided = noise_dim, num_classes, guided
        self.condition_dim = condition_dim if num_classes or guided else 0
        self.class_embedding = nn.Embedding(num_classes, condition_dim) if num_classes else None
        self.guidance_embedding = _guidance_embedding(condition_dim) if guided else None

    def forward(
        self, noise: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Samples [b, ...].

        Args:
            noise: float [b, noise_dim], standard normal.
            labels: int64 [b].
            guidance: float [b], strength alpha of 1 (none) or more, of which the logarithm is
                embedded. Values are not checked: that would wait for the device in each step.
        Raises:
            ConfigError: labels or guidance that are missing, not wanted, or not one for each row.
        """
        return self.draw(noise, self._condition(noise, labels, guidance))

    @abstractmethod
    def draw(self, noise: Tensor, condition: Tensor) -> Tensor:
        """Samples [b, ...] of noise [b, noise_dim] and condition [b, self.condition_dim]."""

    def _condition(self, noise: Tensor, labels: Tensor | None, guidance: Tensor | None) -> Tensor:
        rows = len(noise)
        _check("class labels", labels, rows, "num_classes", self.num_classes)
        _check("guidance strengths", guidance, rows, "guided", self.guided)
        condition = noise.new_zeros(rows, self.condition_dim)
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(labels)
        if self.guidance_embedding is not None and guidance is not None:
            logarithm = guidance.to(noise.dtype).log().unsqueeze(1)
            condition = condition + self.guidance_embedding(logarithm)
        return condition


class Modulation(nn.Module):
    """`parts` vectors [b, width] made from a condition, to scale, shift or gate a layer's channels.

    All zero at first: multiply by 1 + scale. With a condition of dimension 0 they are learned
    constants.

    References:
        Peebles & Xie 2022, arXiv 2212.09748 (adaLN-Zero).
    """

    def __init__(self, condition_dim: int, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.bias = nn.Parameter(torch.zeros(parts * width))
        self.weight = (
            nn.Parameter(torch.zeros(parts * width, condition_dim)) if condition_dim else None
        )

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        values = self.bias.expand(len(condition), -1)
        if self.weight is not None:
            values = values + F.linear(F.silu(condition), self.weight)
        return values.chunk(self.parts, dim=1)


class AdaptiveGroupNorm(nn.GroupNorm):
    """GroupNorm whose output a condition [b, condition_dim] scales and shifts, channel by channel.

    With a condition of dimension 0 it is a GroupNorm.
    """

    def __init__(self, groups: int, width: int, condition_dim: int) -> None:
        super().__init__(groups, width)
        self.modulation = Modulation(condition_dim, width, parts=2) if condition_dim else None

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        normed = super().forward(input)
        if self.modulation is None:
            return normed
        scale, shift = (part[:, :, None, None] for part in self.modulation(condition))
        return normed * (1 + scale) + shift


def _guidance_embedding(dim: int) -> nn.Module:
    """From log alpha [b, 1] to [b, dim]: at the start about as large as a class's embedding."""
    out = nn.Linear(dim, dim)
    nn.init.normal_(out.weight, std=3 / dim**0.5)
    return nn.Sequential(nn.Linear(1, dim), nn.SiLU(), out)


def halved(size: tuple[int, int], times: int, steps: str) -> tuple[int, int]:
    """Height and width halved so often; ConfigError, with `steps` for what halves, if they cannot
    be."""
    factor = 2**times
    height, width = size
    if height % factor or width % factor:
        most = next(k for k in range(times, -1, -1) if not (height % 2**k or width % 2**k))
        raise ConfigError(
            f"images of {height}x{width} do not fit the generator's {times} {steps}, which need "
            f"multiples of {factor}: use at most {most}."
        )
    return height // factor, width // factor


def _check(
    what: str, given: Tensor | None, rows: int, setting: str, value: int | bool | None
) -> None:
    if (given is not None) != bool(value):
        needs = "needs" if given is None else "was built without"
        raise ConfigError(
            f"this generator {needs} {what} ({setting} is {value}): set {setting} to match the "
            "call."
        )
    if given is not None and given.shape != (rows,):
        raise ConfigError(
            f"{what} of shape {tuple(given.shape)} do not fit {rows} rows of noise: give one for "
            "each row."
        )
