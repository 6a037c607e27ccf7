"""NT-Xent over the global batch (SimCLR, Chen et al., arXiv 2002.05709, equation 1)."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import TemperatureLoss, not_below_zero
from dist_contrastive.pairwise import LogSumExp, Pairs
from dist_contrastive.pairwise.distances import joined_rows


class NTXent(TemperatureLoss):
    """Each view must find the other view of its sample among the 2B - 1 other views.

    Equals, on the rows of all ranks together::

        z = normalize(cat([view_a, view_b]))
        scores = (z @ z.T / temperature).fill_diagonal_(-inf)
        loss = cross_entropy(scores, (arange(2 * B) + B) % (2 * B))

    Collectives: those of one `pairwise.reduce` of both views.
    """

    takes = "views"
    reduction: ClassVar[LogSumExp] = LogSumExp(leave_out="own")
    """Log-denominator of each view."""
    is_cross_entropy: ClassVar[bool] = True
    """Whether the positive is in the denominator: then no term is below 0."""

    class Config(TemperatureLoss.Config):
        """SimCLR's loss."""

        name: Literal["ntxent"] = "ntxent"
        temperature: PositiveFloat = 0.5

    settings: Config

    def forward(self, view_a: Tensor, view_b: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Scalar loss; view_a, view_b: [b, D], row i of both from the same sample."""
        sizes = self.check_rows(sizes, view_a=view_a, view_b=view_b)
        views = joined_rows(view_a, view_b)
        pairs = self.compared(views, sizes)
        (denominator, positive), _ = self.reduce(self.reduction, pairs, partners=len(view_a))
        terms = denominator - positive
        terms = not_below_zero(terms) if self.is_cross_entropy else terms
        return self.mean(terms.sum(), len(views))

    def compared(self, views: Tensor, sizes: Sizes) -> Pairs:
        """All pairs of views [2 * b, D]."""
        num_keys = tuple(2 * size for size in sizes)
        return self.pairs(views, views, num_keys, scale=self.scale())
