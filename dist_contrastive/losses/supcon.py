"""Supervised contrastive loss over the global batch (Khosla et al., arXiv 2004.11362), and
the similar pairs that it shares with other losses of labels."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Embeddings, Labels, Sizes
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import PairLoss, TemperatureLoss, not_below_zero
from dist_contrastive.pairwise import LogSumExpAndPositives


class LabelledLoss(PairLoss):
    """Base of the losses of features and labels.

    Two rows are similar when they are views of one sample, or when their labels are: equal ones
    where labels are integers, ones that differ by at most `max_delta` where they are floating. A
    missing label (-1, or one that is not finite) is similar to no other: its sample's own views are
    all its positives, and everything else is dissimilar to it. Without labels all are missing
    (self-supervised).
    """

    takes = "labels"

    class Config(PairLoss.Config):
        """Settings of what is similar."""

        max_delta: NonNegativeFloat | None = None
        """Largest difference of similar continuous labels; null for integer labels."""

        def learns(self, similar: bool, dissimilar: bool) -> bool:
            """Whether there is something to learn where some rows are similar, some dissimilar."""
            return True

        def check_labels(self, labels: Tensor, num_views: int) -> None:
            """Refuse labels of a whole data set [N] that leave nothing to learn.

            Raises:
                ConfigError: no two samples are similar, or none dissimilar, where the loss needs
                    such pairs.
            """
            similar, dissimilar = kinds_of_pairs(labels, self.max_delta)
            if self.learns(similar or num_views > 1, dissimilar):
                return
            alike = "" if self.max_delta is None else f" within max_delta={self.max_delta:g}"
            if similar:
                raise ConfigError(
                    f"all {len(labels)} labels are similar{alike}, so the loss {self.name} has "
                    f"nothing to tell apart; set data.label to a field with more values, or "
                    f"another loss"
                )
            raise ConfigError(
                f"no two of {len(labels)} labels are similar{alike}, so no row has a positive and "
                f"the loss {self.name} has nothing to learn from; set task.num_views to 2 or "
                f"more, or give labels that samples share"
            )

    settings: Config

    def points(
        self, features: Tensor, labels: Tensor | None, samples: Sizes | None
    ) -> tuple[Tensor, Tensor, Sizes]:
        """Rows [n, D] with n = b or b * V, their tags (see `label_tags`), and n of every rank.

        Args:
            samples: b of every rank, of inputs that have been checked; None checks them here.
        """
        labels = collectives.as_labels(labels)
        if samples is None:
            inputs = {
                "features": Embeddings(features, "n D | n V D"),
                "labels": Labels(labels, "n", optional=True),
            }
            samples = collectives.check_inputs(inputs, self.group)["n"]
        if labels is None and features.dim() == 2:
            raise ConfigError(
                f"features [rows, {features.shape[1]}] have one view a sample and no labels, hence "
                f"no two are similar; give labels, or features [rows, views, dim]"
            )
        first = sum(samples[: collectives.rank(self.group)])
        tags = label_tags(labels, len(features), first, self.settings.max_delta, features.device)
        if features.dim() == 3:
            views = features.shape[1]
            features, tags = features.flatten(0, 1), tags.repeat_interleave(views, dim=0)
            samples = tuple(views * size for size in samples)
        self.check_batch(samples)
        return features, tags, samples


class SupCon(TemperatureLoss, LabelledLoss):
    """Each row must find all its positives, with the sum over them outside the logarithm (L_out).

    Equals, on the rows of all ranks together::

        z = normalize(features)
        scores = (z @ z.T / temperature).fill_diagonal_(-inf)
        log_p = scores.log_softmax(1)
        loss = -mean(mean(log_p[i, p] for p positive to i) for i that have a positive)

    A row without positives is a negative to the others and does not count in the mean; a batch in
    which no row has one gives 0 and no gradient. ``metrics["rows_with_positives"]`` counts them.

    Collectives: those of one `pairwise.reduce`, and an all-reduce of one count.
    """

    class Config(TemperatureLoss.Config, LabelledLoss.Config):
        """Each embedding finds all that are similar to it."""

        name: Literal["supcon"] = "supcon"
        temperature: PositiveFloat = 0.1

        def learns(self, similar: bool, dissimilar: bool) -> bool:
            """Rows without a positive do not count."""
            return similar

    settings: Config

    def forward(
        self, features: Tensor, labels: Tensor | None = None, sizes: Sizes | None = None
    ) -> Tensor:
        """Scalar loss.

        Args:
            features: [b, D], or [b, V, D] for V views of every sample.
            labels: [b] integers or floats, see `LabelledLoss`; None: views alone are positives.
            sizes: b of every rank, of inputs that have been checked.
        """
        features, tags, sizes = self.points(features, labels, sizes)
        max_delta, scale = self.settings.max_delta or 0.0, self.scale()
        pairs = self.pairs(features, features, sizes, tags, max_delta, scale=scale)
        reduction = LogSumExpAndPositives(leave_out="own")
        (row_lse, positive_sum, num_positives), _ = self.reduce(reduction, pairs)
        has_positive = num_positives > 0
        loss = not_below_zero(row_lse - positive_sum / num_positives.clamp(min=1))
        self.report_counts(rows_with_positives=has_positive.sum())
        return self.mean(torch.where(has_positive, loss, 0.0).sum(), has_positive.sum())


def label_tags(
    labels: Tensor | None, num_rows: int, first: int, max_delta: float | None, device: torch.device
) -> Tensor:
    """Tags of rows for `pairwise.Pairs`: similar rows have equal ones, or near ones.

    Args:
        labels: [b] or None. first: the number of this rank's first row among those of all ranks.

    Returns:
        [b] int64, or for continuous labels [b, 2] fp64: label and row number.
    """
    if labels is None:
        return torch.arange(first, first + num_rows, device=device)
    _check_max_delta(labels, max_delta)
    labels = collectives.to_device(labels, device)
    if not labels.is_floating_point():
        labels = labels.to(torch.int64)
        unlike_all = torch.arange(-2 - first, -2 - first - num_rows, -1, device=device)
        return torch.where(labels == -1, unlike_all, labels)
    labels = labels.double()
    labels = torch.where(labels.isfinite(), labels, torch.nan)
    number = torch.arange(first, first + num_rows, dtype=torch.float64, device=device)
    return torch.stack([labels, number], dim=1)


def kinds_of_pairs(labels: Tensor, max_delta: float | None) -> tuple[bool, bool]:
    """Whether some two of the labels [N] are similar, and whether some are not.

    Missing ones, -1 or NaN, are similar to no other.
    """
    if max_delta is None:
        present, counts = labels[labels >= 0].unique(return_counts=True)
        return bool((counts > 1).any()), len(present) > 1 or bool((labels < 0).any())
    present = labels[labels.isfinite()].double().sort().values
    similar = bool((present.diff() <= max_delta).any())
    apart = len(present) > 1 and bool(present[-1] - present[0] > max_delta)
    return similar, apart or len(present) < len(labels)


def _check_max_delta(labels: Tensor, max_delta: float | None) -> None:
    if labels.is_floating_point() and max_delta is None:
        raise ConfigError(
            f"labels are {labels.dtype}, of which hardly two are equal; set max_delta, the largest "
            f"difference of similar samples, or give integer labels"
        )
    if not labels.is_floating_point() and max_delta is not None:
        raise ConfigError(
            f"max_delta={max_delta} is for continuous labels, and these are {labels.dtype}; leave "
            f"it out or give floating labels"
        )
