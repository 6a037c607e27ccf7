"""Reductions of numbers of points over the points of each label: with no atomics, in one order.

Labels are ids from 0 to below L; with L = 1 there is one label, and ids are not looked at.
"""

import torch
from torch import Tensor

from dist_contrastive.losses.force.kernel_calls import launch, tile_of
from dist_contrastive.losses.force.points import Counts


class Segments:
    """Points sorted by kind and label, and those of a label as ranges among them.

    Args:
        tags: kinds and labels [n, 2] int64.
        counts: points of each kind.
    """

    def __init__(self, tags: Tensor, counts: Counts, num_labels: int) -> None:
        self.labels, self.num_labels, self._counts = tags[: counts[0], 1], num_labels, counts
        self._bounds = tags
        if num_labels > 1:
            ids = torch.add(tags[:, 1], tags[:, 0], alpha=num_labels)
            number = torch.arange(len(counts) * num_labels + 1, device=tags.device)
            self._bounds = torch.searchsorted(ids, number)  # first place of each kind and label

    def counts(self, num_kinds: int = 1) -> Tensor:
        """Numbers of points of each label in the first kinds: [L] fp64."""
        if self.num_labels == 1:
            number = float(sum(self._counts[:num_kinds]))
            return torch.full((1,), number, dtype=torch.float64, device=self._bounds.device)
        of_kinds = self._bounds.diff().view(-1, self.num_labels)
        return of_kinds[:num_kinds].sum(0, dtype=torch.float64)

    def sums(self, x: Tensor) -> Tensor:
        """Sums over the points of each label: [..., m] fp64 of generated points, or [..., n] of
        all -> [..., L]."""
        return x.sum(-1, keepdim=True) if self.num_labels == 1 else self._reduced(x, "sum")

    def maxima(self, x: Tensor) -> Tensor:
        """The largest, likewise; -inf where there are none."""
        if self.num_labels > 1:
            return self._reduced(x, "max")
        return (
            x.amax(-1, keepdim=True) if x.shape[-1] else x.new_full((*x.shape[:-1], 1), -torch.inf)
        )

    def log_sums(self, x: Tensor) -> Tensor:
        """Log-sum-exps, likewise."""
        return (
            x.logsumexp(-1, keepdim=True) if self.num_labels == 1 else self._reduced(x, "logsumexp")
        )

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        num_points = x.shape[-1]
        num_kinds = 1 if num_points == self._counts[0] else len(self._counts)
        out, tile = x.new_empty(*x.shape[:-1], self.num_labels), tile_of("segments", 8)
        launch(
            "segment",
            out.numel(),
            tile,
            [x.contiguous(), self._bounds, out],
            [num_points, self.num_labels],
            {"KINDS": num_kinds, "HOW": how, "BN": tile.keys},
        )
        return out
