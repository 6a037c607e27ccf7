"""Which rows of the global batch interact: those of one class, in one group of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive import collectives


@dataclass(frozen=True)
class Cells:
    """Numbers of the cells, ``group * num_classes + class``, the same on any number of ranks."""

    mine: Tensor  # [b] int64, of this rank's rows
    counts: list[int]  # rows of each cell, over all ranks
    num_classes: int
    are_whole: bool  # whether every rank holds whole groups, and as many as the others

    @property
    def present(self) -> list[int]:
        """Cells that have rows."""
        return [cell for cell, count in enumerate(self.counts) if count]


def cells_of(
    labels: Tensor | None, num_rows: int, num_classes: int, groups: int, device: torch.device
) -> Cells:
    """Cells of the global batch, whose rows form equal groups in the order of ranks.

    Args:
        labels: classes of this rank's rows [b]; None: all of one class.
        num_rows: b.

    Collectives: two all-gathers: of b, and of the labels.
    """
    mine = torch.zeros(num_rows, dtype=torch.int64, device=device) if labels is None else labels
    headers = collectives.exchange_headers({"labels": mine})["labels"]
    sizes = tuple(header.rows for header in headers if header)
    everyones = collectives.gather_rows(mine, sizes)
    group = torch.arange(len(everyones), device=device) * groups // max(1, len(everyones))
    cells = group * num_classes + everyones
    start = sum(sizes[: collectives.rank()])
    return Cells(
        cells[start : start + num_rows],
        cells.bincount(minlength=groups * num_classes).tolist(),
        num_classes,
        len(set(sizes)) == 1 and groups % len(sizes) == 0,
    )
