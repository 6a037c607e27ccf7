"""InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748); symmetric, CLIP's loss."""

from typing import Unpack

import torch
from torch import Tensor

from dist_contrastive import collectives, pairwise
from dist_contrastive.losses.base import (
    PairLoss,
    PairOptions,
    Scale,
    check_batch,
    check_rows,
    normalised,
)


class InfoNCE(PairLoss):
    """Row softmax cross-entropy of cosine similarities; row i's positive is key i.

    Equals, on the rows of all ranks together::

        q, k = normalize(queries), normalize(cat([keys, negatives]))
        loss = cross_entropy(q @ k.T / temperature, arange(B))

    and with ``symmetric=True`` the mean of that and of
    ``cross_entropy(k[:B] @ q.T / temperature, arange(B))`` (CLIP, arXiv 2103.00020).

    Args:
        temperature: divides the similarities; above 0.
        symmetric: also classify the queries of every key.
        learnable: the temperature is a parameter, kept as ``log(1 / temperature)``.
        options: see `PairLoss`.

    Collectives: one gather of the keys (one more for negatives); symmetric adds two all-reduces of
    B numbers, since each score is computed once and serves both directions.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = False,
        learnable: bool = False,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(**options)
        self.scale = Scale(temperature, learnable)
        self.symmetric = symmetric

    def forward(self, queries: Tensor, keys: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Scalar loss.

        Args:
            queries: [b, D]. keys: [b, D], row i belongs to query i; any floating dtype.
            negatives: [n, D] further keys that are no one's positive; given on all ranks or none,
                n may differ between ranks.
        """
        check_rows(queries=queries, keys=keys)
        if negatives is not None:
            check_rows(negatives=negatives)
        q, k = normalised(queries), normalised(keys)
        scaled = q * self.scale()
        all_keys, offset = self.gather(k)
        num_keys = all_keys.shape[0]
        check_batch(num_keys)
        if negatives is not None:
            all_keys = torch.cat([all_keys, self.gather(normalised(negatives))[0]])
        row_lse, key_lse = pairwise.logsumexp(
            scaled, all_keys, impl=self.impl, chunk_size=self.chunk_size
        )
        positive = (scaled * k).sum(-1)
        if not self.symmetric:
            return self.mean((row_lse - positive).sum(), len(q))
        key_lse = self._over_ranks(key_lse[:num_keys])[offset : offset + len(q)]
        return self.mean(((row_lse + key_lse) / 2 - positive).sum(), len(q))

    def _over_ranks(self, key_lse: Tensor) -> Tensor:
        """From the log-sum-exp over this rank's queries to that over all queries."""
        if self.keys_from == "local":
            return key_lse
        return collectives.logsumexp_over_ranks(key_lse, self.group)
