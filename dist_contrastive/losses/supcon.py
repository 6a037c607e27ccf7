"""Supervised contrastive loss over the global batch (Khosla et al., arXiv 2004.11362, eq. 2)."""

from typing import Unpack

from torch import Tensor

from dist_contrastive.losses.base import PairOptions, Scale, normalised
from dist_contrastive.losses.labelled import LabelledLoss
from dist_contrastive.pairwise import LogSumExpAndPositives


class SupCon(LabelledLoss):
    """Each row must find all its positives, with the sum over them outside the logarithm (L_out).

    Equals, on the rows of all ranks together::

        z = normalize(features)
        scores = (z @ z.T / temperature).fill_diagonal_(-inf)
        log_p = scores.log_softmax(1)
        loss = -mean(mean(log_p[i, p] for p positive to i) for i that have a positive)

    A row without positives is a negative to the others and does not count in the mean; a batch in
    which no row has one gives 0 and no gradient. ``metrics["rows_with_positives"]`` counts them.

    Args:
        temperature: divides the similarities; above 0.
        learnable: the temperature is a parameter, kept as ``log(1 / temperature)``.
        max_delta: for continuous labels, see `LabelledLoss`, as for what is positive to what.
        options: see `PairLoss`.

    Collectives: those of one `pairwise.reduce`, and an all-reduce of one count.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable: bool = False,
        max_delta: float | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(max_delta, **options)
        self.scale = Scale(temperature, learnable)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scalar loss.

        Args:
            features: [b, D], or [b, V, D] for V views of every sample.
            labels: [b] integers or floats, see `LabelledLoss`; None: views alone are positives.
        """
        features, tags, sizes = self.points(features, labels)
        (z,) = normalised(features)
        pairs = self.pairs(z * self.scale(), z, sizes, tags, self.max_delta or 0.0)
        reduction = LogSumExpAndPositives(leave_out="own")
        (row_lse, positive_sum, num_positives), _ = self.reduce(reduction, pairs)
        has_positive = num_positives > 0
        loss = row_lse - positive_sum / num_positives.clamp(min=1)
        self.report_counts(rows_with_positives=has_positive.sum())
        return self.mean(loss[has_positive].sum(), has_positive.sum())
