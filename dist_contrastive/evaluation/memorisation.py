"""Whether generated samples are copies of training samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive.evaluation.point_sets import as_points

LOW = 0.05
"""The quantile of distances that stands for the nearest ones."""
SUSPECT = 0.01
"""The quantile of held-out distances below which a generated sample is suspiciously near."""


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training sample, of generated and of held-out samples.

    Honest samples have the distances of held-out ones. A generator that copies has smaller ones,
    in the median if it does so often and in the low quantile if it does so sometimes; one whose
    samples lie off the data has larger ones, which is no merit.

    Attributes:
        generated_median, held_out_median: medians, in units of the points.
        generated_low, held_out_low: quantiles LOW.
        suspicious: fraction of generated samples that are as near to a training sample as the
            quantile SUSPECT of held-out samples, or nearer. Honest samples give about SUSPECT.
        copies, held_out_copies: how many equal a training sample in every value.
    """

    generated_median: float
    held_out_median: float
    generated_low: float
    held_out_low: float
    suspicious: float
    copies: int
    held_out_copies: int


def memorisation(
    generated: Tensor, train: Tensor, held_out: Tensor, chunk: int = 1024
) -> Memorisation:
    """How near generated samples come to training samples, beside how near held-out ones do.

    Args:
        generated, train, held_out: [n, D], [m, D] and [h, D], or images, which are flattened; h
            better 100 or more, or the quantile SUSPECT is little more than the nearest one.
        chunk: rows at a time; bounds the memory to chunk x m.
    Raises:
        ConfigError, DataError: as `as_points`.
    """
    generated, train, held_out = as_points(
        "memorisation", 1, generated=generated, train=train, held_out=held_out
    )
    ours, theirs = _to_nearest(generated, train, chunk), _to_nearest(held_out, train, chunk)
    return Memorisation(
        generated_median=ours.quantile(0.5).item(),
        held_out_median=theirs.quantile(0.5).item(),
        generated_low=ours.quantile(LOW).item(),
        held_out_low=theirs.quantile(LOW).item(),
        suspicious=(ours <= theirs.quantile(SUSPECT)).double().mean().item(),
        copies=int((ours == 0).sum()),
        held_out_copies=int((theirs == 0).sum()),
    )


def _to_nearest(points: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Distance [n] of each point to the nearest of `keys`."""
    centre = keys.mean(dim=0)
    centred, found = keys - centre, []
    for part in points.split(chunk):
        # Products find the nearest one fast, but only differences are exactly 0 for a copy.
        nearest = torch.cdist(part - centre, centred).argmin(dim=1)
        found.append((part - keys[nearest]).norm(dim=1))
    return torch.cat(found)
