"""A cache of remote shards that begins empty and is gone after use."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_contrastive.data.shards.block_cache import CacheSettings


@contextmanager
def temporary_cache() -> Iterator[CacheSettings]:
    """For commands that must see what a server holds now: blocks that an earlier run kept may be of
    a shard that has since been replaced by one of its size. It lies where temporary files do
    (TMPDIR), and grows to what `CacheSettings` allow."""
    with tempfile.TemporaryDirectory(prefix="dist_contrastive-") as folder:
        yield CacheSettings(folder=Path(folder))
