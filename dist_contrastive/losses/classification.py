"""Cross-entropy of labelled rows on every level of a hierarchy of classes."""

from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.collectives import ClassLabels, Embeddings, Group
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.hierarchy import Hierarchy
from dist_contrastive.settings import Settings, settings_from


class PathCrossEntropy(nn.Module):
    """The cross-entropy of every decision on the path from the root to the label.

    Equals, on the rows of all ranks together, with log p(node | parent) of the `Hierarchy`::

        rows = labels >= 0
        node = hierarchy.paths[labels[rows]]                                           [n, L]
        log_p = hierarchy.level_log_probabilities(logits[rows]).gather(1, node)        [n, L]
        loss = -(level_weights * log_p).sum(1).mean()

    With weights of 1 that is -log p(label), and with one level `torch.nn.functional.cross_entropy`.
    Without any label on any rank it is 0, and so are all gradients. The gradient contract is that
    of `PairLoss`, for reducers that take the mean.

    Args:
        args, settings: those of the nested `Config`.
        group: process group; None means all ranks.

    Collectives: one all-gather of a few numbers, one all-reduce of two.
    """

    class Config(Settings):
        """Cross-entropy of a classifier."""

        level_weights: tuple[NonNegativeFloat, ...] | None = None
        """Weight of each level of the hierarchy, from the root; null: 1 each."""

    def __init__(
        self, hierarchy: Hierarchy, *args: Any, group: Group = None, **settings: Any
    ) -> None:
        super().__init__()
        weights = settings_from(self.Config, args, settings).level_weights
        weights = (1.0,) * hierarchy.depth if weights is None else weights
        if len(weights) != hierarchy.depth:
            raise ConfigError(
                f"level_weights={weights} for a hierarchy of {hierarchy.depth} level(s); give one "
                f"weight for each level"
            )
        self.hierarchy = hierarchy
        self.level_weights = weights
        self.group = group

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            logits: floating [b, num_nodes]. labels: integers [b], -1 where missing.

        Raises:
            ConfigError, NonFiniteError: logits that are not finite, labels that are neither a class
                nor -1; on all ranks. How many logits a row has is left to the hierarchy.
        """
        labels = collectives.as_labels(labels)
        inputs = {
            "logits": Embeddings(logits, "n K"),
            "labels": ClassLabels(labels, "n", num_classes=self.hierarchy.num_classes),
        }
        collectives.check_inputs(inputs, self.group)
        labels = collectives.to_device(labels, logits.device)
        has_label = labels >= 0
        log_p = self.hierarchy.level_log_probabilities(logits)
        # Of all rows, since how many have a label is not known to the host.
        on_path = log_p.gather(1, self.hierarchy.ancestors(labels.clamp(min=0)))
        levels = zip(self.level_weights, on_path.unbind(1), strict=True)
        weighted = torch.stack([weight * level for weight, level in levels]).sum(0)
        total = -torch.where(has_label, weighted, 0.0).sum()
        return collectives.global_mean(total, has_label.sum(), self.group)
