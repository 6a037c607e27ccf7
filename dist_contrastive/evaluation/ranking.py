"""Retrieval: where the right answers to a query stand among all keys, sorted by cosine.

Scores are cosines in fp64, and those that differ by no more than TIE are equal. Ties count against:
a wrong key with the score of a right one stands before it, and so does one whose score is NaN. So
an encoder that maps everything to one point finds nothing, and the order of rows, tiles and ranks
changes no number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError

TIE = 1e-12
"""Cosines that differ by no more are equal: a product in fp64 is exact to about 1e-15."""
_FEW = 4  # right answers up to which comparing is faster than sorting
_TILE = 2048  # keys that are compared at a time
_NUMBERS = 2**22  # of a tile of scores, and of the ranks of a part of the queries: 32 MiB
_TOP = 100
MISSING = 2**62
"""Rank of a right answer that there is not."""


@dataclass(frozen=True)
class Ranking:
    """Ranks of the right answers of each query; 1 is the first."""

    ranks: Tensor  # [n, top] int64, of the first answers, ascending; MISSING where there are fewer
    counts: Tensor  # [n] int64, right answers of each query, 1 or more
    average_precision: Tensor  # [n] fp64
    num_keys: int
    top: int
    left_out: int = 0  # queries without a right answer, which are no rows

    def hit_rate(self, k: int) -> float:
        """Fraction of queries with a right answer among the first `k`: recall of image-text papers,
        torchmetrics' `RetrievalHitRate`."""
        self._check(k)
        return (self.ranks[:, 0] <= k).double().mean().item()

    def recall(self, k: int) -> float:
        """Fraction of the right answers of a query that are among the first `k`, mean over queries:
        found / right answers, as trec_eval and torchmetrics have it. With fewer than k + 1 right
        answers it can be 1."""
        return (self._found(k) / self.counts).mean().item()

    def capped_recall(self, k: int) -> float:
        """As `recall`, divided by min(k, right answers), so that 1 can always be reached."""
        return (self._found(k) / self.counts.clamp(max=k)).mean().item()

    def median_rank(self) -> float:
        """Median over queries of the rank of the first right answer; of an even number of queries
        the mean of the middle two."""
        return self.ranks[:, 0].double().quantile(0.5).item()

    def mean_reciprocal_rank(self) -> float:
        """Mean over queries of 1 / rank of the first right answer (MRR)."""
        return self.ranks[:, 0].double().reciprocal().mean().item()

    def ndcg(self, k: int) -> float:
        """Sum of 1 / log2(1 + rank) of right answers among the first `k`, over that of the best
        order; mean over queries. All right answers are equally right."""
        found = self._among(k)
        gained = (found / (1 + self.ranks.double()).log2()).sum(dim=1)
        best = torch.arange(2, 2 + k, device=found.device).double().log2().reciprocal().cumsum(0)
        return (gained / best[self.counts.clamp(max=k) - 1]).mean().item()

    def mean_average_precision(self) -> float:
        """Mean over queries of the mean over their right answers of (right answers up to it) / rank
        (MAP): divided by all right answers, down to the last key."""
        return self.average_precision.mean().item()

    def _found(self, k: int) -> Tensor:
        return self._among(k).sum(dim=1).double()

    def _among(self, k: int) -> Tensor:
        """Whether the rank of an answer is `k` or less: only the first k answers can be there."""
        self._check(k)
        if k > self.top:
            raise ConfigError(f"k is {k}, but only {self.top} ranks are kept: set top to {k}.")
        return self.ranks <= k

    def _check(self, k: int) -> None:
        if not 1 <= k <= self.num_keys:
            raise ConfigError(
                f"k is {k}, but there are {self.num_keys} keys: set k from 1 to {self.num_keys}."
            )


def rank(
    queries: Tensor,
    keys: Tensor,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    *,
    without_itself: bool = False,
    top: int = _TOP,
    tile: int = _TILE,
) -> Ranking:
    """Ranks of the right answers of each query among all keys, exact.

    It equals, of each query, all keys sorted by cosine, wrong ones first among equals.

    Args:
        queries: [n, D] of any dtype. keys: [m, D].
        query_groups, key_groups: int64 [n] and [m]; the keys of a query's group are its right
            answers. None for both: row i of both belong together, and n is m.
        without_itself: key i is query i, which is no answer to itself, right or wrong.
        top: right answers of each query whose ranks are kept: `recall` and `ndcg` go up to it.
        tile: keys that are compared at a time; bounds the memory, and changes no number.
    Raises:
        ConfigError: lengths do not match, there are none, or no query has a right answer.
    """
    queries, keys = (F.normalize(x.double(), dim=1) for x in (queries, keys))
    if query_groups is None or key_groups is None or without_itself:
        check_lengths("queries", len(queries), "keys", len(keys))
    rows = torch.arange(max(len(queries), len(keys)), device=keys.device)
    query_groups = rows if query_groups is None else query_groups.to(keys.device)
    key_groups = rows if key_groups is None else key_groups.to(keys.device)
    check_lengths("queries", len(queries), "groups of queries", len(query_groups))
    check_lengths("keys", len(keys), "groups of keys", len(key_groups))
    order = key_groups.argsort(stable=True)  # keys of one group come one after the other
    starts = torch.searchsorted(key_groups[order], query_groups)
    ends = torch.searchsorted(key_groups[order], query_groups, right=True)
    counts = ends - starts - int(without_itself)
    asked = (counts > 0).nonzero().flatten()
    if not len(asked):
        raise ConfigError(
            f"none of {len(queries)} queries has a right answer among {len(keys)} keys: give keys "
            f"of the groups of queries."
        )
    most = int(counts.max()) + int(without_itself)
    num_rows = max(1, _NUMBERS // max(most, min(tile, len(keys))))
    first_ranks, precisions = [], []
    for chosen in asked.split(num_rows):
        slots = torch.arange(most, device=keys.device)
        is_there = slots < (ends - starts)[chosen, None]
        answers = order[(starts[chosen, None] + slots).clamp(max=len(keys) - 1)]
        if without_itself:
            is_there &= answers != chosen[:, None]
        wrong = partial(_is_wrong, query_groups[chosen], key_groups)
        ranks = _ranks(queries[chosen], keys, wrong, answers, is_there, tile)
        # A slot r of a query holds its r-th right answer.
        precision = (1 + slots).double() / ranks * (ranks < MISSING)
        precisions.append(precision.sum(dim=1) / counts[chosen])
        first_ranks.append(ranks[:, :top].clone())
    found = torch.cat(first_ranks), counts[asked], torch.cat(precisions)
    return Ranking(*found, len(keys) - without_itself, top, len(queries) - len(asked))


def _is_wrong(query_groups: Tensor, key_groups: Tensor, part: slice) -> Tensor:
    return query_groups[:, None] != key_groups[part]


def _ranks(
    queries: Tensor,
    keys: Tensor,
    wrong: Callable[[slice], Tensor],
    answers: Tensor,
    is_there: Tensor,
    tile: int,
) -> Tensor:
    """Ranks [n, R] of answers [n, R], numbers of keys, ascending; wrong: bool [n, some keys]."""
    columns = [(queries * keys[column]).sum(dim=1) for column in answers.T]
    # A right answer without a score stands behind all.
    scores = torch.stack(columns, dim=1).nan_to_num(nan=-2.0)
    scores, _ = scores.masked_fill(~is_there, -math.inf).sort(dim=1, descending=True)
    before = torch.zeros_like(answers)
    for first in range(0, len(keys), tile):
        part = slice(first, first + tile)
        others = (queries @ keys[part].T).masked_fill_(~wrong(part), -math.inf)
        before += _count_not_below(others, scores - TIE)
    number = torch.arange(1, 1 + answers.shape[1], device=keys.device)
    return (before + number).masked_fill_(scores == -math.inf, MISSING)


def _count_not_below(others: Tensor, limits: Tensor) -> Tensor:
    """How many scores [n, m] are not below each of the limits [n, R]; NaN never is."""
    if limits.shape[1] <= _FEW:
        counted = [(~(others < limit[:, None])).sum(dim=1) for limit in limits.T]
        return torch.stack(counted, dim=1)
    ascending, _ = others.sort(dim=1)  # NaN last
    return others.shape[1] - torch.searchsorted(ascending, limits.contiguous())


def check_lengths(first: str, n: int, second: str, m: int) -> None:
    """Raises ConfigError unless n is m, and not 0."""
    if n != m or n == 0:
        raise ConfigError(
            f"there are {n} {first} and {m} {second}: give 1 or more, and as many of both."
        )
