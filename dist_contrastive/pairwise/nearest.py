"""Farthest positive and nearest negative of every row, tile by tile, without gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.pairwise.distances import Distance
from dist_contrastive.pairwise.keys import open_keys
from dist_contrastive.pairwise.pairs import Pairs, chunks


@dataclass(frozen=True)
class Extreme:
    """One key for every row."""

    distance: Tensor  # [b]; infinite where there is none
    number: Tensor  # [b] int64, among the keys of all ranks; the row's own where there is none

    @property
    def exists(self) -> Tensor:
        """Rows that have such a key: bool [b]."""
        return self.distance.isfinite()


@torch.no_grad()
def extremes(pairs: Pairs, distance: Distance, chunk_size: int | None) -> tuple[Extreme, Extreme]:
    """The farthest positive (similar, not the row's own) and the nearest negative (not similar).

    Among equally distant keys the first counts, whatever the order in which blocks arrive.

    Args:
        pairs: rows and keys prepared by the distance; tags tell what is similar.

    Collectives: those of one round over the keys.
    """
    farthest, nearest = _Minimum(pairs), _Minimum(pairs)
    for block in open_keys(pairs).blocks():
        assert block.tags is not None
        for r in chunks(slice(0, len(pairs.rows)), chunk_size):
            for k in chunks(slice(0, len(block.keys)), chunk_size):
                first, d = block.first + k.start, distance.tile(pairs.rows[r], block.keys[k])
                positive, negative = pairs.positive_and_negative(r, first, block.tags[k])
                farthest.update(r, first, (-d).masked_fill_(~positive, torch.inf))
                nearest.update(r, first, d.masked_fill_(~negative, torch.inf))
    return Extreme(-farthest.value, farthest.number), Extreme(nearest.value, nearest.number)


class _Minimum:
    """Running minimum of every row, and the key that it is of."""

    def __init__(self, pairs: Pairs) -> None:
        self.value = pairs.rows.new_full((len(pairs.rows),), torch.inf)
        self.number = pairs.start + torch.arange(len(pairs.rows), device=pairs.rows.device)

    def update(self, r: slice, first: int, values: Tensor) -> None:
        """Values [r, k] of the keys first, first + 1, ..."""
        value, at = values.min(1)
        number = at + first
        least, key = self.value[r], self.number[r]
        better = (value < least) | ((value == least) & value.isfinite() & (number < key))
        self.value[r] = torch.where(better, value, least)
        self.number[r] = torch.where(better, number, key)


def fetch(pairs: Pairs, number: Tensor) -> Tensor:
    """Keys by their number among those of all ranks, differentiable: [m] -> [m, D].

    Collectives: see `collectives.fetch_rows`; none for ``local``.
    """
    if pairs.keys_from == "local":
        return pairs.keys.index_select(0, number)
    return collectives.fetch_rows(pairs.keys, number, pairs.sizes, pairs.group)
