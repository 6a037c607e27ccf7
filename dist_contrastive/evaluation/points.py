"""Checked point sets [n, D]: input of the measures of generated samples."""

from torch import Tensor

from dist_contrastive.errors import ConfigError, DataError


def as_points(measure: str, least: int, **samples: Tensor) -> tuple[Tensor, ...]:
    """Each of `samples` as rows of one width.

    Args:
        measure: what needs them, for messages; so are the names of the samples.
        least: how many points there must be in each.
        samples: [n, D], or images [n, ...], which are flattened; any dtype.
    Returns:
        The same points in the same order, fp64 [n, D].
    Raises:
        ConfigError: there are fewer points than `least`.
        DataError: samples have not one width, or hold NaN or infinity.
    """
    points = {}
    for name, sample in samples.items():
        if sample.dim() < 2 or 0 in sample.shape[1:]:
            raise DataError(
                f"rows [n, D] are wanted for {measure}, but {name} has the shape "
                f"{list(sample.shape)}: give each sample a row of 1 value or more."
            )
        if len(sample) < least:
            raise ConfigError(
                f"{least} or more samples are wanted for {measure}, but {name} has {len(sample)}: "
                "generate or hold out more."
            )
        points[name] = sample.detach().flatten(1).double()
    widths = {name: rows.shape[1] for name, rows in points.items()}
    if len(set(widths.values())) > 1:
        listed = " and ".join(f"{width} in {name}" for name, width in widths.items())
        raise DataError(
            f"rows of one width are wanted for {measure}, but there are {listed}: take all from "
            "one space."
        )
    for name, rows in points.items():
        broken = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            raise DataError(
                f"finite numbers are wanted for {measure}, but {len(broken)} of the {len(rows)} "
                f"samples in {name} hold NaN or infinity, the first in row {broken[0]}: leave "
                "such samples out."
            )
    return tuple(points.values())


def check_labels(name: str, labels: Tensor, samples: Tensor) -> None:
    """Raises DataError unless there is one of `labels` for each sample."""
    if labels.shape != (len(samples),):
        raise DataError(
            f"there are {len(samples)} samples in {name}, but their labels have the shape "
            f"{list(labels.shape)}: give one integer for each."
        )
