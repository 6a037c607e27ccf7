"""Sources that a config names: opened, and joined to one data set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from dist_contrastive.data.folder import ImageFolder
from dist_contrastive.data.rows_source import ParquetRows, Rows
from dist_contrastive.data.shards.encoding import WHITE
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.data.shards.storage import BlockCache
from dist_contrastive.data.source import JoinedSource, Source
from dist_contrastive.data.subset import open_subset
from dist_contrastive.errors import ConfigError, DataError, is_redacted
from dist_contrastive.settings import Choice

_KNOWN = {"shards": ShardIndex, "folder": ImageFolder, "rows": Rows, "parquet": ParquetRows}
SOURCE = Choice("data source", Source, _KNOWN, default="shards")

AnySource = Annotated[Source.Config, SOURCE]
AnySources = Annotated[
    Annotated[str, Tag("<location>")]
    | Annotated[AnySource, Tag("<source>")]
    | Annotated[tuple[AnySource, ...], Tag("<list>")],
    Discriminator(lambda value: _kind(value)),
]
"""Location of shards, as `ShardIndex.Config.shards`; or a source; or a list of sources."""

Location = Source | Path | str


def configs_of(sources: AnySources) -> tuple[Source.Config, ...]:
    """Settings of each source."""
    if isinstance(sources, str):
        return (ShardIndex.Config(shards=sources),)
    return (sources,) if isinstance(sources, Source.Config) else sources


def sources_at(location: str) -> tuple[Source.Config, ...]:
    """Settings of what lies at a location: shards; a folder without any is one of images."""
    folder = Path(location)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return (ImageFolder.Config(path=location),)
    return configs_of(location)


def open_source(config: Source.Config, cache: BlockCache.Config, background: str = WHITE) -> Source:
    """Source that a config names, or the subset that its filter takes.

    Raises: as `load_index` and `open_subset`, or what an own source raises.
    """
    source = _whole_source(config, cache, background)
    if config.filter is None:
        return source
    return open_subset(source, config.filter, cache.folder / "subsets")


def _whole_source(config: Source.Config, cache: BlockCache.Config, background: str) -> Source:
    if isinstance(config, ShardIndex.Config):
        if is_redacted(config.shards):
            raise ConfigError(
                f"{config.shards} is in a run directory, which keeps no passwords or signatures; "
                f"write the whole URL in its place"
            )
        return replace(load_index(config.shards, cache), background=background)
    if isinstance(config, ImageFolder.Config):
        return ImageFolder(config, background)
    if isinstance(config, Rows.Config):
        return Rows(config, background)
    if isinstance(config, ParquetRows.Config):
        return ParquetRows(config, background)
    return SOURCE.build(config)


def open_locations(source: Location | Sequence[Location]) -> list[Source]:
    """Sources, or what `load_index` takes, one or several.

    Raises:
        ConfigError: none, or something else, as an IterableDataset.
        DataError, UnreachableError: as `load_index`.
    """
    several: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
    if not several:
        raise ConfigError("no shards are given; name a folder, a pattern or an index of some")
    for one in several:
        if not isinstance(one, Source | Path | str):
            raise ConfigError(
                f"a {type(one).__name__} is no source of samples: what gives them one after the "
                f"other (an IterableDataset) has no order that other ranks could go on with; write "
                f"it to files (`to_parquet`) and read these by {{name: parquet, path: "
                f"FILE}}, or pack it: `dist-contrastive shards pack dataset`"
            )
    return [one if isinstance(one, Source) else load_index(one) for one in several]


def join_sources(sources: Sequence[Source]) -> Source:
    """One data set of several, whose samples are numbered through.

    Raises:
        DataError: a shard is in two of them, of which neither is a subset.
    """
    if len(sources) == 1:
        return sources[0]
    indexes = [source for source in sources if isinstance(source, ShardIndex)]
    shards = Counter(shard for index in indexes for shard in index.shards)
    if repeated := [shard for shard, count in shards.items() if count > 1]:
        raise DataError(
            f"shard {repeated[0]} is given twice; name every shard in one source only, or give "
            f"each a filter"
        )
    return JoinedSource(sources)  # and not one index: large ones are mapped, and stay so


def _kind(value: object) -> str:
    if isinstance(value, dict | Source.Config):
        return "<source>"
    return "<list>" if isinstance(value, list | tuple) else "<location>"
