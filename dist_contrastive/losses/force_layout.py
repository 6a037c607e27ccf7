"""Where the points of all ranks stand among the keys of the contrastive force."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_contrastive.pairwise.force import Block

Gather = Callable[[Tensor], tuple[Tensor, int]]


class Layout:
    """Keys are the negatives of all ranks, then the positives, each kind sorted by label, so that
    the points of one label are two slices.

    Args:
        gather: rows of this rank to rows of all ranks, and this rank's offset.
        labels: [R] int64 of this rank's rows, m negatives and then positives, as `sort_rows` left
            them; all equal where there are no labels.
    """

    def __init__(self, gather: Gather, labels: Tensor, m: int) -> None:
        self._gather, self._m, self._row_labels = gather, m, labels
        negative, negative_offset = gather(labels[:m])
        positive, positive_offset = gather(labels[m:])
        self.num_negative = len(negative)
        self.num_positive = len(positive)
        joined = torch.cat([negative, positive])
        self._order = sort_rows(joined, self.num_negative)
        self.labels = joined[self._order]  # [K]
        gathered_at = torch.arange(len(labels), device=labels.device)
        gathered_at[:m] += negative_offset
        gathered_at[m:] += self.num_negative + positive_offset - m
        self.self_key = self._order.argsort()[gathered_at]  # [R], which key each row is

    def keys(self, rows: Tensor) -> Tensor:
        """Something of each row of this rank [R, ...] as it is of each key [K, ...]."""
        kinds = rows[: self._m], rows[self._m :]
        return torch.cat([self._gather(kind.contiguous())[0] for kind in kinds])[self._order]

    def blocks(self) -> tuple[Block, ...]:
        """Row slices and key slices of equal label; a slice holds points of one kind."""
        keys = _slices(self.labels, self.num_negative)
        rows = _slices(self._row_labels, self._m)
        return tuple((r, k) for label, mine in rows.items() for r in mine for k in keys[label])

    def num_pairs(self) -> int:
        """Pairs of keys of equal label; a key with itself counts."""
        return int(self.labels.unique(return_counts=True)[1].square().sum())


def sort_rows(labels: Tensor, m: int) -> Tensor:
    """Order of rows that sorts the first m and the others by label, each for themselves."""
    return torch.cat([labels[:m].argsort(stable=True), m + labels[m:].argsort(stable=True)])


def _slices(labels: Tensor, m: int) -> dict[int, list[slice]]:
    """For every label its slices: at most one among the first m, and one among the others."""
    found: dict[int, list[slice]] = {}
    for start, part in ((0, labels[:m]), (m, labels[m:])):
        values, counts = part.unique_consecutive(return_counts=True)
        for label, count in zip(values.tolist(), counts.tolist(), strict=True):
            found.setdefault(label, []).append(slice(start, start + count))
            start += count
    return found
