"""Toy distributions of points in the plane: eight Gaussians, a checkerboard, a swiss roll."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_contrastive.data import keyed_random
from dist_contrastive.data.packing.demos import pack_splits
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.errors import ConfigError

_STREAM, _NOISE_STREAM = (
    0x746F79,
    0x6E6F697365,
)  # "toy", "noise": not other uses of the same seed
_PARTS = 8
_REACH = 2.0  # radius of the circle, half a side of the board, outer end of the roll
_GAUSSIAN_STD, _ROLL_STD = 0.1, 0.05


def toy_points(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Independent points of a toy distribution, and which of its eight parts each belongs to.

    Every part k = 0..7 has probability 1/8:

        eight_gaussians  normal with standard deviation 0.1 in x and in y, about
                         2 (cos(k pi / 4), sin(k pi / 4))
        checkerboard     uniform on the k-th black square of a board of 4 x 4 squares over [-2, 2]²:
                         black where row + column is even, both counted from 0 at (-2, -2) with y
                         and x; numbered row by row
        swiss_roll       2 t / (9 pi / 2) (cos t, sin t), with t uniform in the k-th eighth of
                         [3 pi / 2, 9 pi / 2], plus normal noise of standard deviation 0.05 in x
                         and in y

    Args:
        name: one of these.
        count: how many. Point i depends on the name, the seed and i alone.

    Returns:
        Points, float32 [count, 2], and parts, int64 [count].

    Raises:
        ConfigError: another name, or a count below 0.
    """
    if name not in TOYS:
        raise ConfigError(f"the toy {name!r} is not known; use one of {', '.join(TOYS)}")
    if count < 0:
        raise ConfigError(f"count={count} is below 0; draw 0 points or more")
    keys = keyed_random.combine(seed, _STREAM, torch.arange(count))
    unit = keyed_random.uniform(keys, 3)
    noise = keyed_random.normal(keyed_random.combine(keys, _NOISE_STREAM), 2)
    place = _PARTS * unit[:, 0]
    return TOYS[name](place, unit[:, 1:], noise), place.long()


def pack_toy(
    name: str,
    folder: Path | str,
    train_samples: int = 8192,
    test_samples: int = 2048,
    samples_per_shard: int = 1024,
) -> dict[str, ShardIndex]:
    """Pack independent points of a toy distribution: seed 0 for train, seed 1 for test.

    Packing twice gives the same bytes. A sample has

        npy   float32 [2], the point
        json  "label": 0..7, the part; "index": its place in the split

    Args:
        name: see `toy_points`.
        folder, samples_per_shard, returns and raises: see `pack_splits`.

    Raises:
        ConfigError: another name, or no samples for a split.
    """
    splits = {"train": train_samples, "test": test_samples}
    for split, count in splits.items():
        if count < 1:
            raise ConfigError(f"{split}_samples={count} is below 1; set 1 or more")
    return pack_splits(
        folder,
        name,
        lambda: {s: _samples(name, splits[s], seed) for seed, s in enumerate(splits)},
        samples_per_shard,
    )


def _samples(name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    points, parts = toy_points(name, count, seed)
    for number, (point, part) in enumerate(zip(points.numpy(), parts.tolist(), strict=True)):
        key = f"point-{number:06d}"
        yield {"__key__": key, "npy": point, "json": {"label": part, "index": number}}


# Shapes: where in its eighth of the distribution a point lies, [n] in (0, 8) (the whole number is
# the part), two more numbers [n, 2] uniform in (0, 1), and standard normal noise [n, 2].


def _eight_gaussians(place: Tensor, _: Tensor, noise: Tensor) -> Tensor:
    return _REACH * _direction(place.floor() * (2 * math.pi / _PARTS)) + _GAUSSIAN_STD * noise


def _checkerboard(place: Tensor, square: Tensor, _: Tensor) -> Tensor:
    part = place.floor()
    row = (part / 2).floor()
    column = 2 * (part % 2) + row % 2
    return torch.stack([column, row], dim=1) + square - _REACH


def _swiss_roll(place: Tensor, _: Tensor, noise: Tensor) -> Tensor:
    start, stop = 1.5 * math.pi, 4.5 * math.pi
    angle = start + (stop - start) / _PARTS * place
    return (_REACH / stop) * angle[:, None] * _direction(angle) + _ROLL_STD * noise


def _direction(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


TOYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eight_gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "swiss_roll": _swiss_roll,
}
