"""InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748); symmetric, CLIP's loss."""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Embeddings, Ids, Sizes
from dist_contrastive.losses.base import TemperatureLoss
from dist_contrastive.losses.false_negatives import (
    FalseNegatives,
    FalseNegativeSettings,
    Masks,
    cross_entropy,
    id_tags,
    refuse_useless_ids,
)
from dist_contrastive.pairwise import LogSumExp, Pairs
from dist_contrastive.pairwise.distances import joined_rows


class InfoNCE(TemperatureLoss):
    """Row softmax cross-entropy of cosine similarities; row i's positive is key i.

    Equals, on the rows of all ranks together::

        q, k = normalize(queries), normalize(cat([keys, negatives, bank]))
        scores = (q @ k.T / temperature).masked_fill(false_negative, -inf)  # none but by choice
        loss = cross_entropy(scores, arange(B))

    and with ``symmetric=True`` the mean of that and of the same of ``k[:B] @ q.T / temperature``
    (CLIP, arXiv 2103.00020). The bank is a queue of past keys (MoCo, arXiv 1911.05722), which all
    ranks hold alike and which counts once. False negatives: see `FalseNegativeSettings`.

    Collectives: those of one `pairwise.reduce`. Symmetric costs no second matrix: each score is
    computed once and serves both directions. Of the bank nothing is exchanged.
    """

    takes = "views"

    class Config(TemperatureLoss.Config, FalseNegativeSettings):
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
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        bank_ids: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss.

        Args:
            queries: [b, D]. keys: [b, D], row i belongs to query i; any floating dtype.
            negatives: [n, D] further keys that are no one's positive; given on all ranks or none,
                n may differ between ranks.
            bank: [Q, D] further keys that are no one's positive, the same numbers on all ranks
                (shapes alone are compared); without gradient, given on all ranks or none.
            sizes: of checked inputs without further keys, see `PairLoss.check_rows`.
            ids: [b] integers from 0, -1 for none: other keys of a row's id are no negatives of it.
            negative_ids, bank_ids: [n], [Q], those of the further keys.
        """
        ids, negative_ids, bank_ids = map(collectives.as_labels, (ids, negative_ids, bank_ids))
        further = negatives, bank, negative_ids, bank_ids
        if sizes is not None and all(x is None for x in further):
            rows = {"n": sizes}
        else:
            inputs = {
                "queries": Embeddings(queries, "n D"),
                "keys": Embeddings(keys, "n D"),
                "negatives": Embeddings(negatives, "m D", optional=True),
                "bank": Embeddings(bank, "q D", optional=True, replicated=True),
                "ids": Ids(ids, "n", optional=True),
                "negative_ids": Ids(negative_ids, "m", optional=True),
                "bank_ids": Ids(bank_ids, "q", optional=True, replicated=True),
            }
            rows = collectives.check_inputs(inputs, self.group)
            refuse_useless_ids(inputs)
        num_keys = rows["n"]
        if negatives is not None:
            num_keys = tuple(map(sum, zip(rows["n"], rows["m"], strict=True)))
        self.check_batch(num_keys)
        scale, symmetric = self.scale(), self.settings.symmetric
        tags = None if ids is None else id_tags(ids, rows["n"], queries.device, self.group)
        thresholds = self.settings.thresholds(queries, keys, scale, self.impl)
        known = FalseNegatives(tags, thresholds)
        masks = known.of_pairs(negatives, negative_ids, symmetric)
        keys = keys if negatives is None else joined_rows(keys, negatives)
        pairs = self.pairs(queries, keys, num_keys, scale=scale, **masks)
        reduction = LogSumExp(known.leave_out, symmetric)
        (row_lse, positive), key_lses = self.reduce(reduction, pairs, partners=0)
        if bank is not None:
            row_lse = self._with_bank(row_lse, queries, bank, known.of_bank(bank_ids))
        if negatives is not None:
            key_lses = tuple(lse[: len(queries)] for lse in key_lses)
        lses = torch.stack([row_lse, *key_lses])
        terms = cross_entropy(lses, positive, known.leave_out)
        return self.mean(terms.sum(), terms.numel())

    def _with_bank(self, lse: Tensor, queries: Tensor, bank: Tensor, masks: Masks) -> Tensor:
        """The log-sum-exp of each row, over the bank as well: [b]."""
        pairs = Pairs(queries, bank, (len(bank),), "local", scale=self.scale(), **masks)
        (bank_lse,), _ = self.reduce(LogSumExp("similar" if "tags" in masks else "nothing"), pairs)
        bank_lse = bank_lse.double().clamp(min=-1e300)  # a sum of nothing has no derivative
        return torch.logaddexp(lse.double(), bank_lse).to(lse.dtype)
