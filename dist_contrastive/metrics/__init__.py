"""Numbers that a run reports while it trains.

log.py     rows of metrics, where they go, and the ledger of keys
step.py    time and memory of a step, terms of its loss, geometry of its embeddings
"""

from dist_contrastive.metrics.log import JsonLines, Ledger, MetricsLog, forget_steps, read_rows
from dist_contrastive.metrics.step import (
    GEOMETRY_ROWS,
    Clock,
    duplicates,
    effective_rank,
    geometry,
    peak_memory_mb,
    rank_me,
    term_metrics,
)

__all__ = [
    "GEOMETRY_ROWS",
    "Clock",
    "JsonLines",
    "Ledger",
    "MetricsLog",
    "duplicates",
    "effective_rank",
    "forget_steps",
    "geometry",
    "peak_memory_mb",
    "rank_me",
    "read_rows",
    "term_metrics",
]
