"""InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748); symmetric, CLIP's loss."""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Embeddings, Sizes
from dist_contrastive.losses.base import TemperatureLoss, not_below_zero
from dist_contrastive.pairwise import LogSumExp, Pairs
from dist_contrastive.pairwise.distances import joined_rows


class InfoNCE(TemperatureLoss):
    """Row softmax cross-entropy of cosine similarities; row i's positive is key i.

    Equals, on the rows of all ranks together::

        q, k = normalize(queries), normalize(cat([keys, negatives, bank]))
        loss = cross_entropy(q @ k.T / temperature, arange(B))

    and with ``symmetric=True`` the mean of that and of
    ``cross_entropy(k[:B] @ q.T / temperature, arange(B))`` (CLIP, arXiv 2103.00020). The bank is a
    queue of past keys (MoCo, arXiv 1911.05722), which all ranks hold alike and which counts once.

    Collectives: those of one `pairwise.reduce`. Symmetric costs no second matrix: each score is
    computed once and serves both directions. Of the bank nothing is exchanged.
    """

    takes = "views"

    class Config(TemperatureLoss.Config):
        """InfoNCE between two views, the batch as negatives."""

        name: Literal["infonce"] = "infonce"
        temperature: PositiveFloat = 0.07
        symmetric: bool = False
        """Classify the queries of every key, too."""

    settings: Config

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        negatives: Tensor | None = None,
        bank: Tensor | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Scalar loss.

        Args:
            queries: [b, D]. keys: [b, D], row i belongs to query i; any floating dtype.
            negatives: [n, D] further keys that are no one's positive; given on all ranks or none,
                n may differ between ranks.
            bank: [Q, D] further keys that are no one's positive, the same numbers on all ranks
                (shapes alone are compared); without gradient, given on all ranks or none.
            sizes: of checked queries and keys without further ones, see `PairLoss.check_rows`.
        """
        num_keys = sizes
        if num_keys is None or negatives is not None or bank is not None:
            inputs = {
                "queries": Embeddings(queries, "n D"),
                "keys": Embeddings(keys, "n D"),
                "negatives": Embeddings(negatives, "m D", optional=True),
                "bank": Embeddings(bank, "q D", optional=True, replicated=True),
            }
            rows = collectives.check_inputs(inputs, self.group)
            num_keys = rows["n"]
            if negatives is not None:
                keys = joined_rows(keys, negatives)
                num_keys = tuple(map(sum, zip(rows["n"], rows["m"], strict=True)))
        self.check_batch(num_keys)
        pairs = self.pairs(queries, keys, num_keys, scale=self.scale())
        reduction = LogSumExp(both=self.settings.symmetric)
        (row_lse, positive), key_lse = self.reduce(reduction, pairs, partners=0)
        if bank is not None:
            row_lse = self._with_bank(row_lse, queries, bank)
        if self.settings.symmetric:
            row_lse = (row_lse + key_lse[0][: len(queries)]) / 2
        return self.mean(not_below_zero(row_lse - positive).sum(), len(queries))

    def _with_bank(self, row_lse: Tensor, queries: Tensor, bank: Tensor) -> Tensor:
        """The log-sum-exp of each row, over the bank as well: [b]."""
        pairs = Pairs(queries, bank, (len(bank),), "local", scale=self.scale())
        (bank_lse,), _ = self.reduce(LogSumExp(), pairs)
        return torch.logaddexp(row_lse.double(), bank_lse.double()).to(row_lse.dtype)
