"""Exchanges of tensors between ranks, and their gradients.

    group.py       who takes part; the collectives whose names differ between torch versions
    headers.py     what every rank is about to send, told to all before any data is
    rows.py        rows gathered, scattered, fetched; every gradient is summed on its way home
    ring.py        rows handed from rank to rank
    reductions.py  sums, maxima, log-sum-exps and means over ranks
    lost.py        errors that tell of a rank that has ended
    together.py    objects of all ranks; errors raised on all ranks

Everything works without a process group too: then there is one rank and nothing is sent.

The gradient contract rests on two rules. A gradient that crosses ranks is summed on its way home
(`rows`, `ring`, `sum_over_ranks`), and `global_mean` makes every rank's backward leave W times its
share, so that the mean over ranks that DDP and ZeRO take is the exact gradient.
"""

from dist_contrastive.collectives.group import (
    Group,
    accumulation_dtype,
    alone,
    is_distributed,
    rank,
    world_size,
)
from dist_contrastive.collectives.headers import RowHeader, describe, exchange_headers
from dist_contrastive.collectives.lost import is_lost_rank
from dist_contrastive.collectives.reductions import (
    GradReduction,
    all_reduce_max,
    all_reduce_sum,
    global_mean,
    logsumexp_over_ranks,
    max_over_ranks,
    sum_over_ranks,
)
from dist_contrastive.collectives.ring import start_shift
from dist_contrastive.collectives.rows import (
    all_gather_rows,
    fetch_rows,
    gather_rows,
    reduce_scatter_rows,
)
from dist_contrastive.collectives.together import gather_objects, raised_together

__all__ = [
    "GradReduction",
    "Group",
    "RowHeader",
    "accumulation_dtype",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "alone",
    "describe",
    "exchange_headers",
    "fetch_rows",
    "gather_objects",
    "gather_rows",
    "global_mean",
    "is_distributed",
    "is_lost_rank",
    "logsumexp_over_ranks",
    "max_over_ranks",
    "raised_together",
    "rank",
    "reduce_scatter_rows",
    "start_shift",
    "sum_over_ranks",
    "world_size",
]
