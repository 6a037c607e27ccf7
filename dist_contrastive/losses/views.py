"""Several views of the same samples, fed to any loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.losses.inputs import exchange_sizes


def compare_views(
    loss: PairLoss, views: Sequence[Tensor], labels: Tensor | None = None, num_global: int = 2
) -> Tensor:
    """The loss of several views, in the way that suits what it takes (`PairLoss.takes`).

    ``views``: the mean of ``loss(views[i], views[j])`` over all pairs i < j with i < num_global: of
        two views ``loss(*views)``, and with small crops behind the global views each pair has a
        global one, as in multi-crop (SwAV, arXiv 2006.09882).
    ``features``: the mean of ``loss(view)`` over the views. Views of one sample are not compared
        with each other: `SelfDiagonal` is then literally the seed's loss on each view by itself,
        pure repulsion, and draws no two views together.
    ``labels``: ``loss(stack(views, dim=1), labels)``, all rows with all; of a single view
        ``loss(view, labels)``.

    A loss that is called several times keeps the `PairLoss.metrics` of its last call: they are
    those of the last pair or of the last view.

    Args:
        views: [b, D] each, row i of all from the same sample; as many on every rank.
        labels: [b], see `LabelledLoss`, or None; other losses have no use for them.
        num_global: how many of the views, the first ones, are global; for losses of two views.

    Raises:
        ConfigError: on all ranks. Too few views, or more or fewer than on another rank; a
            num_global that is none of them; a loss of points, which are not views of samples.

    Collectives: one or two all-gathers of a few numbers, and those of the loss's calls.
    """
    _check_counts(loss, views)
    if loss.takes == "views":
        pairs = _pairs(len(views), num_global)
        return torch.stack([loss(views[i], views[j]) for i, j in pairs]).mean()
    if loss.takes == "features":
        return torch.stack([loss(view) for view in views]).mean()
    if loss.takes == "labels":
        return loss(_stacked(loss, views), labels)
    raise ConfigError(
        f"{type(loss).__name__} compares points of two kinds, not views of the same samples; "
        f"use a loss of views, of features or of labels"
    )


def _pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
    if not 1 <= num_global <= num_views:
        raise ConfigError(
            f"num_global={num_global} must be 1 to {num_views}, the number of views; set it to the "
            f"number of global ones among them"
        )
    return [(i, j) for i in range(num_global) for j in range(i + 1, num_views)]


def _stacked(loss: PairLoss, views: Sequence[Tensor]) -> Tensor:
    """[b, D] for one view, [b, V, D] for several; torch would refuse to stack on one rank alone."""
    exchange_sizes(loss.group, {f"views[{i}]": view for i, view in enumerate(views)})
    return views[0] if len(views) == 1 else torch.stack(list(views), dim=1)


def _check_counts(loss: PairLoss, views: Sequence[Tensor]) -> None:
    """Every rank has the same number of views, and enough of them."""
    told = {"views": views[0].new_empty(len(views), 0) if views else None}
    headers = collectives.exchange_headers(told, loss.group)["views"]
    counts = [header.rows if header else 0 for header in headers]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the ranks have {', '.join(map(str, counts))} views of their samples; give every rank "
            f"the same number"
        )
    least = 2 if loss.takes == "views" else 1
    if counts[0] < least:
        raise ConfigError(
            f"{type(loss).__name__} was given {counts[0]} view(s) of the samples and needs at "
            f"least {least}; make more views"
        )
