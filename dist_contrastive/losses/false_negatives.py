"""Negatives of a row's own id, or too like it: false ones, left out of the denominator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import FiniteFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import softplus

from dist_contrastive import collectives, pairwise
from dist_contrastive.collectives import Group, Input, Sizes
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import not_below_zero
from dist_contrastive.losses.supcon import label_tags
from dist_contrastive.pairwise import Impl, LeaveOut
from dist_contrastive.settings import ComponentSettings

Masks = dict[str, Any]
"""Fields of `Pairs` that say which pairs do not count."""


@dataclass(frozen=True)
class FalseNegatives:
    """What tells the false negatives of this rank's rows."""

    tags: Tensor | None  # [b]: a key of an equal one is no negative
    thresholds: Tensor | None  # [b]: neither is one whose score is above it

    @property
    def leave_out(self) -> LeaveOut:
        """Pairs that do not count in `LogSumExp`; but for nothing, positives are among them."""
        if self.tags is not None:
            return "similar"
        return "nothing" if self.thresholds is None else "own"

    def of_pairs(self, further: Tensor | None, ids: Tensor | None, symmetric: bool) -> Masks:
        """Masks of rows with their keys and further ones [n, D], whose ids are [n]."""
        masks: Masks = {}
        if self.tags is not None:
            masks["tags"] = self.tags
            if further is not None:
                if ids is None:
                    more = self.tags.new_full((len(further),), _NO_ID)
                else:
                    more = collectives.to_device(ids, self.tags.device).to(torch.int64)
                masks["tags"] = torch.cat([self.tags, more])
        if self.thresholds is not None:
            of_keys = None
            if symmetric:  # what a key is compared with is a query: those of its own sample
                num_further = 0 if further is None else len(further)
                of_keys = torch.nn.functional.pad(
                    self.thresholds, (0, num_further), value=torch.inf
                )
            masks["thresholds"] = self.thresholds, of_keys
        return masks

    def of_bank(self, ids: Tensor | None) -> Masks:
        """Masks of rows with keys that are no one's positive, whose ids are [n]."""
        masks: Masks = {}
        if self.tags is not None and ids is not None:
            tags = collectives.to_device(ids, self.tags.device).to(torch.int64)
            masks = {"tags": tags, "row_tags": self.tags}
        if self.thresholds is not None:
            masks["thresholds"] = self.thresholds, None
        return masks


_NO_ID = -1  # that of no row: a row without id has one below


class FalseNegativeSettings(ComponentSettings):
    """Which negatives are false: by ids if there are some, and by a limit of their own.

    A negative of a row's id is one, unless that is -1, and one whose cosine similarity with the
    row, s, is too near that of the positive, s_p::

        s > s_p + false_negative_margin  or  s > s_p * false_negative_ratio

    For the queries of a key (``symmetric``) s_p is that of the key. One that equals the limit
    stays, but for rounding, by which forward and backward decide alike. There s_p has no gradient.
    """

    false_negative_margin: FiniteFloat | None = None
    """Leave out negatives whose cosine similarity is higher than the positive's by more than this:
    0.1 in Qwen3-Embedding (arXiv 2506.05176), below 0 in NV-Retriever (arXiv 2407.15831); null:
    none."""
    false_negative_ratio: PositiveFloat | None = None
    """Leave out negatives whose cosine similarity is more than this times the positive's: 0.95 in
    NV-Retriever; null: none."""

    @torch.no_grad()
    def thresholds(
        self, rows: Tensor, positives: Tensor, scale: Tensor, impl: Impl
    ) -> Tensor | None:
        """Scores [b], of cosine similarities times the scale, above which negatives are false;
        None: there is no limit.

        Args:
            rows, positives: [b, D] of any length.
        """
        margin, ratio = self.false_negative_margin, self.false_negative_ratio
        if margin is None and ratio is None:
            return None
        cosines = pairwise.by_kernels.cosines(rows, positives, impl)
        limits = [] if margin is None else [cosines + margin]
        limits += [] if ratio is None else [cosines * ratio]
        return scale * (torch.minimum(*limits) if len(limits) > 1 else limits[0])


def id_tags(ids: Tensor, sizes: Sizes, device: torch.device, group: Group) -> Tensor:
    """Tags of this rank's rows from their ids [b], -1 unlike all others: [b] int64."""
    rank = collectives.rank(group)
    return label_tags(ids, sizes[rank], sum(sizes[:rank]), None, device)


def cross_entropy(lses: Tensor, positive: Tensor, leave_out: LeaveOut) -> Tensor:
    """Terms of a loss [..., b], none below 0, from log-sum-exps, and scores of positives [b].

    Args:
        leave_out: of the log-sum-exps; unless it is nothing, they are without the positives.
    """
    if leave_out == "nothing":
        return not_below_zero(lses - positive)
    return softplus(lses - positive, threshold=40)  # 0 where no negative is left


def refuse_useless_ids(inputs: Mapping[str, Input]) -> None:
    """Refuse ids of keys that are not given, or that no ids of rows are compared with.

    Args:
        inputs: that have been checked, so that all ranks have the same ones.
    """
    given = [name for name, x in inputs.items() if x.tensor is not None]
    for name, keys in {"negative_ids": "negatives", "bank_ids": "bank"}.items():
        for other in (keys, "ids"):
            if name in given and other not in given:
                raise ConfigError(f"{name} are given without {other}; give both, or leave them out")
