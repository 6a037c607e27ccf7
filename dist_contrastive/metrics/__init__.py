"""What a run tells while it trains.

log.py       rows of metrics: to metrics.jsonl, to trackers, and to who watches
display.py   a bar, or plain lines
lines.py     files of JSON lines, whole lines or none; the ledger of what every step was given
clock.py     time spent, and on what; memory
geometry.py  where the embeddings of a batch lie
"""

from dist_contrastive.metrics.clock import Clock
from dist_contrastive.metrics.geometry import duplicates, geometry
from dist_contrastive.metrics.lines import Ledger, forget_steps, read_rows
from dist_contrastive.metrics.log import MetricsLog

__all__ = ["Clock", "Ledger", "MetricsLog", "duplicates", "forget_steps", "geometry", "read_rows"]
