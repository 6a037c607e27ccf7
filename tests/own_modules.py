"""A user's own components, named in configs by import paths such as ``own_modules:Squares``."""

from collections.abc import Collection
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from dist_contrastive.data import Source
from dist_contrastive.data.keyed_random import uniform
from dist_contrastive.data.views import Views
from dist_contrastive.errors import UnreadableSample
from dist_contrastive.evaluation import Measure, Splits
from dist_contrastive.losses import InfoNCE, PairLoss
from dist_contrastive.losses.base import normalised
from dist_contrastive.pairwise import LogSumExp
from dist_contrastive.tasks import Task


class Squares(Source):
    """Images of a bright square, its side the class; made when they are read, never stored."""

    class Config(Source.Config):
        """Settings of the squares."""

        count: PositiveInt = 64
        """Samples."""
        damaged: tuple[int, ...] = ()
        """Numbers of samples that cannot be read."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.fields = ("cls", "png")
        self.shards = ("squares-0", "squares-1")
        self.shard_samples = (config.count // 2, config.count - config.count // 2)

    def read(self, sample_number: int, only: Collection[str] | None = None) -> dict[str, Any]:
        """Sample n: class n mod 4."""
        if sample_number in self.config.damaged:
            raise UnreadableSample(f"square {sample_number} is damaged")
        side = sample_number % 4
        image = torch.zeros(1, 8, 8, dtype=torch.uint8)
        image[:, : side + 2, : side + 2] = 255
        sample = {"__key__": f"square-{sample_number}", "cls": side, "png": image}
        return {name: x for name, x in sample.items() if only is None or name in {*only, "__key__"}}


class Dimmed(Views):
    """Views that are darker by a random factor."""

    class Config(Views.Config):
        """Settings of the dimming."""

        darkest: float = 0.5
        """Smallest factor."""

    config: Config

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images times a factor of each key."""
        factor = 1 - (1 - self.config.darkest) * uniform(keys, 1)
        return images * factor.view(-1, 1, 1, 1)


class Spread(Measure):
    """Mean deviation of representations from their centre, beside that of pixels."""

    class Config(Measure.Config):
        """Settings of the spread."""

        power: PositiveInt = 1
        """Power of the distances whose mean is taken."""

    config: Config

    def lines(self, task: Task, splits: Splits) -> list[tuple[str, float, dict[str, float]]]:
        """One line for the held-out samples."""
        images = splits.test.images

        def spread(x: Tensor) -> float:
            return (x - x.mean(0)).norm(dim=1).pow(self.config.power).mean().item()

        beside = {"raw pixels": spread(images.flatten(1))}
        return [("spread", spread(task.represent(images)), beside)]


class Careless(Measure):
    """A measure that returns no lines."""

    def lines(self, task: Task, splits: Splits) -> list[tuple[str, float, dict[str, float]]]:
        """A number alone."""
        return 0.5


class Uniformity(PairLoss):
    """Logarithm of each row's Gaussian potential (Wang and Isola, arXiv 2005.10242)."""

    takes = "features"

    class Config(PairLoss.Config):
        """Settings of the potential."""

        scale: PositiveFloat = 2.0
        """Of the squared distance."""

    settings: Config

    def forward(self, features: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """Scalar loss; features: [b, D]."""
        sizes = self.check_rows(sizes, features=features)
        (z,) = normalised(features)
        (lse,), _ = self.reduce(LogSumExp(), self.pairs(2 * self.settings.scale * z, z, sizes))
        return self.mean((lse - 2 * self.settings.scale).sum(), len(z))


class Constant(PairLoss):
    """A loss that depends on nothing that is trained."""

    takes = "features"

    def forward(self, features: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """Scalar loss; features: [b, D]."""
        return features.detach().square().mean()


class Doubled(InfoNCE):
    """A loss of this package with another setting and another value."""

    class Config(InfoNCE.Config):
        """Settings of the factor."""

        factor: PositiveFloat = 2.0
        """Multiplies the loss."""

    settings: Config

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Scalar loss."""
        return self.settings.factor * super().forward(*inputs, **options)
