"""A function on several ranks of this machine (gloo, CPU, a file store, no ports), for tests.

This package proves its losses with it, and others may prove theirs the same way.
"""

from dist_contrastive.ranks import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
