"""Several views of the same samples, fed to any loss."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Embeddings, Input, Labels, Sizes
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss


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

    Collectives: one all-gather of a few numbers, and those of the loss's calls without theirs.
    """
    if loss.takes == "points":
        raise ConfigError(
            f"{type(loss).__name__} compares points of two kinds, not views of the same samples; "
            f"use a loss of views, of features or of labels"
        )
    labels = collectives.as_labels(labels)
    sizes = _check_views(loss, views, labels)
    # A loss of the user's own may check its inputs once more.
    known = {"sizes": sizes} if "sizes" in inspect.signature(loss.forward).parameters else {}
    if loss.takes == "views":
        pairs = _pairs(len(views), num_global)
        return torch.stack([loss(views[i], views[j], **known) for i, j in pairs]).mean()
    if loss.takes == "features":
        return torch.stack([loss(view, **known) for view in views]).mean()
    features = views[0] if len(views) == 1 else torch.stack(list(views), dim=1)
    return loss(features, labels, **known)


def _pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
    if not 1 <= num_global <= num_views:
        raise ConfigError(
            f"num_global={num_global} must be 1 to {num_views}, the number of views; set it to the "
            f"number of global ones among them"
        )
    return [(i, j) for i in range(num_global) for j in range(i + 1, num_views)]


def _check_views(loss: PairLoss, views: Sequence[Tensor], labels: Tensor | None) -> Sizes:
    """Rows of every rank; all have the same number of views, and enough of them."""
    inputs: dict[str, Input] = {"views": Embeddings(tuple(views), "V n D", optional=True)}
    if loss.takes == "labels":
        inputs["labels"] = Labels(labels, "n", optional=True)
    sizes = collectives.check_inputs(inputs, loss.group)
    least = 2 if loss.takes == "views" else 1
    if len(views) < least:
        raise ConfigError(
            f"{type(loss).__name__} was given {len(views)} view(s) of the samples and needs at "
            f"least {least}; make more views"
        )
    return sizes["n"]
