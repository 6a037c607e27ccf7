"""Exchanges of tensors between ranks, and their gradients.

    group.py       ranks, and the failure of one; names that differ between torch versions
    headers.py     exchange of shapes, dtypes and objects; errors raised on all ranks
    schema.py      inputs of a loss, checked on all ranks together
    conversions.py what callers give, as tensors
    deferred.py    what is checked of values on a GPU, one call later
    rows.py        rows gathered, scattered, fetched; gradients are reduced over ranks
    ring.py        ring exchange
    reductions.py  sums, maxima, log-sum-exps and means over ranks

Everything works without a process group too: then there is one rank and nothing is sent.

The gradient contract rests on two rules. A gradient that crosses ranks is summed over them
(`rows`, `ring`, `sum_over_ranks`), and `global_mean` makes every rank's backward leave W times its
share, so that the mean over ranks that DDP and ZeRO take is the exact gradient.
"""

from dist_contrastive.collectives.conversions import as_labels, to_device
from dist_contrastive.collectives.deferred import check_numbers, forget_deferred, read_deferred
from dist_contrastive.collectives.group import (
    Group,
    accumulation_dtype,
    alone,
    is_distributed,
    is_lost_rank,
    rank,
    refuse_graph,
    world_size,
)
from dist_contrastive.collectives.headers import (
    RowHeader,
    describe,
    exchange_headers,
    gather_objects,
    raised_together,
)
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
    gather_on_host,
    gather_rows,
    reduce_scatter_rows,
)
from dist_contrastive.collectives.schema import (
    ClassLabels,
    Embeddings,
    Ids,
    Input,
    Integers,
    Labels,
    Sizes,
    Weights,
    check_inputs,
)

__all__ = [
    "ClassLabels",
    "Embeddings",
    "GradReduction",
    "Group",
    "Ids",
    "Input",
    "Integers",
    "Labels",
    "RowHeader",
    "Sizes",
    "Weights",
    "accumulation_dtype",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "alone",
    "as_labels",
    "check_inputs",
    "check_numbers",
    "describe",
    "exchange_headers",
    "fetch_rows",
    "forget_deferred",
    "gather_objects",
    "gather_on_host",
    "gather_rows",
    "global_mean",
    "is_distributed",
    "is_lost_rank",
    "logsumexp_over_ranks",
    "max_over_ranks",
    "raised_together",
    "rank",
    "read_deferred",
    "reduce_scatter_rows",
    "refuse_graph",
    "start_shift",
    "sum_over_ranks",
    "to_device",
    "world_size",
]
