"""Pairs of rows of this rank and keys of all ranks, and which of them are similar."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Group
from dist_contrastive.pairwise.distances import unit_rows

KeysFrom = Literal["gather", "ring", "local"]
KEYS_FROM = ("gather", "ring", "local")

# 1024 x 1024 fp32 scores are 4 MiB: large enough for the matrix product, small beside the inputs.
_DEFAULT_CHUNK = 1024


@dataclass(frozen=True)
class Pairs:
    """Rows of this rank and the keys they are compared with.

    Row i's *own* key is key i of the same rank: the row itself, or its partner in the other view.
    Two points are *similar* where their tags are equal; tags of two columns are a continuous label
    and a sample, and similar means that the labels differ by at most `max_delta` (NaN differs from
    all) or that the sample is the same.
    """

    rows: Tensor  # [b, D]
    keys: Tensor  # [n, D], n >= b: those that this rank brings
    sizes: tuple[int, ...]  # n of every rank
    keys_from: KeysFrom = "gather"
    tags: Tensor | None = None  # [n] or [n, 2], of the keys; the first b are those of the rows
    max_delta: float = 0.0
    group: Group = None
    bias: Tensor | None = None  # one number, added to all scores
    scale: Tensor | float | None = None
    """Where it is given, rows and keys are of any length, and scores are their cosines times it.
    Kernels multiply rows in half precision as they are, so that none is rounded to unit length."""
    factors: tuple[Tensor, Tensor] | None = None
    """Of kernels alone, which multiply rows [b] and keys [n] by them in fp32."""
    row_tags: Tensor | None = None
    """[b], where rows are not the first of the keys."""
    thresholds: tuple[Tensor, Tensor | None] | None = None
    """Of rows [b], and of keys [n] where they have statistics: a pair whose score is above its
    row's does not count for the row, nor above its key's for the key. No gradient is theirs."""

    @property
    def start(self) -> int:
        """The number of this rank's first key among those the rows are compared with."""
        return 0 if self.keys_from == "local" else sum(self.sizes[: collectives.rank(self.group)])

    @property
    def num_keys(self) -> int:
        """How many keys each row is compared with."""
        return len(self.keys) if self.keys_from == "local" else sum(self.sizes)

    @property
    def tags_of_rows(self) -> Tensor:
        """Tags of the rows: [b, ...]."""
        assert self.tags is not None, "without tags no pair is known to be similar"
        return self.tags[: len(self.rows)] if self.row_tags is None else self.row_tags

    @property
    def beside_keys(self) -> dict[str, Tensor]:
        """What there is of each key beside its dimensions, by its name in a `Block`."""
        of_keys = {"factors": self.factors, "thresholds": self.thresholds}
        found = {name: x and x[1] for name, x in of_keys.items()} | {"tags": self.tags}
        return {name: x for name, x in found.items() if x is not None}

    def multiplied(self) -> "Pairs":
        """The same pairs in fp32 or fp64, whose scores are the products of rows and keys."""
        dtype = torch.promote_types(self.rows.dtype, self.keys.dtype)
        dtype = collectives.accumulation_dtype(dtype)
        rows, keys = self.rows.to(dtype), self.keys.to(dtype)
        if self.scale is not None:
            unit = unit_rows(rows)
            keys = unit if self.keys is self.rows else unit_rows(keys)
            rows = unit * self.scale
        return replace(self, rows=rows, keys=keys, scale=None)

    def partners(self, shift: int) -> Tensor:
        """Scores of row i and key (i + shift) % b of the same rank, of pairs `multiplied`: [b]."""
        keys = self.keys[: len(self.rows)]
        return (self.rows * (keys.roll(-shift, 0) if shift else keys)).sum(-1)

    def own(self, r: slice, first: int, last: int) -> Tensor | None:
        """Which of the keys first to last are rows' own: bool [r, last - first], None for none."""
        begin, end = self.start + r.start, self.start + r.stop
        if end <= first or last <= begin:
            return None
        device = self.rows.device
        return torch.arange(begin, end, device=device)[:, None] == torch.arange(
            first, last, device=device
        )

    def similar(self, r: slice, key_tags: Tensor) -> Tensor:
        """Which pairs are similar; a row and its own key are: bool [r, k]."""
        row_tags = self.tags_of_rows[r, None]
        if key_tags.dim() == 1:
            return row_tags == key_tags
        within = (row_tags[..., 0] - key_tags[:, 0]).abs() <= self.max_delta
        return within | (row_tags[..., 1] == key_tags[:, 1])

    def positive_and_negative(
        self, r: slice, first: int, key_tags: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pairs that are similar, but for rows with their own keys, and pairs that are not.

        Args:
            key_tags: of the keys first, first + 1, ...
        """
        similar, own = self.similar(r, key_tags), self.own(r, first, first + len(key_tags))
        return similar if own is None else similar & ~own, ~similar

    def tile(self, r: slice, block: "Block") -> "Tile":
        """Rows r against the keys of a block."""
        rows, keys = self.rows[r], block.keys
        own = self.own(r, block.span.start, block.span.stop)
        similar = None if block.tags is None else self.similar(r, block.tags)
        scores = rows @ keys.T if self.bias is None else torch.addmm(self.bias, rows, keys.T)
        above = above_key = None
        if self.thresholds is not None:
            above = scores > self.thresholds[0][r, None]
            above_key = None if block.thresholds is None else scores > block.thresholds
        return Tile(scores, own, similar, above, above_key)


@dataclass(frozen=True)
class Block:
    """Keys first, first + 1, ... of those the rows are compared with, and what there is of each."""

    first: int
    keys: Tensor  # [k, D]
    tags: Tensor | None = None  # [k] or [k, 2]
    factors: Tensor | None = None  # [k]
    thresholds: Tensor | None = None  # [k]
    extras: tuple[Tensor, ...] = ()  # each [k, ...]

    @property
    def span(self) -> slice:
        """The numbers of its keys."""
        return slice(self.first, self.first + len(self.keys))

    def part(self, k: slice) -> Self:
        """Its keys k, without extras."""
        of_keys = {"tags": self.tags, "factors": self.factors, "thresholds": self.thresholds}
        beside = {name: x if x is None else x[k] for name, x in of_keys.items()}
        return replace(self, first=self.first + k.start, keys=self.keys[k], **beside, extras=())


@dataclass(frozen=True)
class Tile:
    """Scores of some rows with some keys, and what is known of these pairs."""

    scores: Tensor  # [r, k]
    own: Tensor | None  # bool [r, k]; None where no row meets its own key
    similar: Tensor | None  # bool [r, k], own included; None without tags
    above: Tensor | None = None  # bool [r, k]: above the row's threshold; None without thresholds
    above_key: Tensor | None = None  # above the key's

    def positive(self) -> Tensor:
        """Similar pairs other than a row and its own key: bool [r, k]."""
        assert self.similar is not None, "positives need tags"
        return self.similar if self.own is None else self.similar & ~self.own

    def without_own(self, x: Tensor) -> Tensor:
        """Numbers of the pairs [r, k], 0 for a row and its own key."""
        return x if self.own is None else x.masked_fill(self.own, 0.0)


def chunks(whole: slice, chunk_size: int | None) -> Iterator[slice]:
    """Slices of at most `chunk_size` that cover the whole."""
    step = chunk_size or _DEFAULT_CHUNK
    for begin in range(whole.start, whole.stop, step):
        yield slice(begin, min(begin + step, whole.stop))
