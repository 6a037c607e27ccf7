"""Supervised contrastive loss over the global batch (Khosla et al., arXiv 2004.11362, eq. 2)."""

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import TemperatureLoss, normalised
from dist_contrastive.losses.labelled import LabelledLoss
from dist_contrastive.pairwise import LogSumExpAndPositives


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
        (z,) = normalised(features)
        pairs = self.pairs(z * self.scale(), z, sizes, tags, self.settings.max_delta or 0.0)
        reduction = LogSumExpAndPositives(leave_out="own")
        (row_lse, positive_sum, num_positives), _ = self.reduce(reduction, pairs)
        has_positive = num_positives > 0
        loss = row_lse - positive_sum / num_positives.clamp(min=1)
        self.report_counts(rows_with_positives=has_positive.sum())
        return self.mean(loss[has_positive].sum(), has_positive.sum())
