"""NT-Xent over the global batch (SimCLR, Chen et al., arXiv 2002.05709, equation 1)."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive.collectives import Sizes
from dist_contrastive.losses.base import TemperatureLoss, normalised, not_below_zero
from dist_contrastive.pairwise import LogSumExp
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
        (z,) = normalised(views)
        scaled = z * self.scale()
        positive = (scaled * z.roll(len(view_a), 0)).sum(-1)
        terms = self.log_denominator(scaled, z, views, sizes) - positive
        return self.mean((not_below_zero(terms) if self.is_cross_entropy else terms).sum(), len(z))

    def log_denominator(self, scaled: Tensor, z: Tensor, views: Tensor, sizes: Sizes) -> Tensor:
        """Log-sum-exp over all views but the row itself: [2 * b]."""
        num_keys = tuple(2 * size for size in sizes)
        pairs = self.pairs(scaled, z, num_keys, multiples_of=(views, views))
        (row_lse,), _ = self.reduce(LogSumExp(leave_out="own"), pairs)
        return row_lse
