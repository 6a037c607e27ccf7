"""Options of packing, apart from what packs: the command states their defaults without torch."""

from dataclasses import dataclass, fields
from typing import Literal

from dist_contrastive.errors import ConfigError

PATTERN_SIGNS = "/{}*?[]"
"""Signs that would not be taken literally in the name of a shard."""
_MOST_WORKERS = 1024


@dataclass(frozen=True)
class ShardBounds:
    """Largest number of samples of a shard and MiB of its tar; None is no bound. A sample that is
    larger has a shard of its own."""

    samples: int | None = 10_000
    mib: float | None = 256.0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples_per_shard={self.samples} is below 1; set 1 or more")
        if self.mib is not None and not self.mib > 0:
            raise ConfigError(f"shard_mb={self.mib:g} is not above 0; set the MiB of a shard")


@dataclass(frozen=True)
class PackOptions:
    """How samples are chosen, ordered and written, whatever their source.

    Raises:
        ConfigError: a value that is impossible.
    """

    name: str | None = None
    """Of shards, as in NAME-00000.tar; None is the name of their folder."""
    bounds: ShardBounds = ShardBounds()
    workers: int | None = None
    """Threads that read and encode; None is one for each CPU. The bytes do not depend on it."""
    seed: int | None = 0
    """Of the order in which samples are written; None keeps that of the source. A source sorted by
    class gives shards of one class each, from which no batch is well mixed."""
    verify: Literal["open", "decode"] = "open"
    """Of every image its headers, and of a PNG its checksums; or all of its pixels, which finds
    truncated JPEGs too and takes longer."""
    skip_unreadable: bool = False
    """Leave out samples that cannot be read, instead of stopping."""
    overwrite: bool = False
    """Replace shards of this name that the folder holds, and their index."""

    def __post_init__(self) -> None:
        if self.workers is not None and not 1 <= self.workers <= _MOST_WORKERS:
            raise ConfigError(
                f"workers={self.workers} is below 1 or above {_MOST_WORKERS}; set a thread or two "
                f"for each CPU"
            )
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed={self.seed} is below 0; set 0 or more")
        if self.name is not None and (not self.name or set(self.name) & set(PATTERN_SIGNS)):
            raise ConfigError(
                f"name={self.name!r} is empty or holds one of {PATTERN_SIGNS}, which patterns of "
                f"shards read otherwise; name shards by letters and digits"
            )


@dataclass(frozen=True)
class TextFormat:
    """How a table of text is written; of JSON `encoding` and `null` alone.

    Raises:
        ConfigError: a value that is impossible.
    """

    separator: str | None = None
    r"""Sign between cells; None is that of the file's kind, or else one of ``; \t | ,`` that the
    header holds."""
    quotes: Literal["csv", "none"] | None = None
    """"csv": quotation marks enclose cells; "none": they are text; None is "none" between tabs,
    where cells that could be either are refused, and "csv" otherwise."""
    encoding: str | None = None
    """None is UTF-8, or UTF-16 and UTF-32 where the file begins with their mark."""
    null: tuple[str, ...] = ()
    """Texts that stand for a missing value, as "NA"; an empty cell is the empty text."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a table without a header."""

    def __post_init__(self) -> None:
        if self.separator is not None and len(self.separator) != 1:
            raise ConfigError(
                f"separator={self.separator!r} has {len(self.separator)} signs; give one, as ';'"
            )
        if self.encoding is not None:
            try:
                b"a".decode(self.encoding)
            except UnicodeError:  # a sign of two bytes or more: it exists
                pass
            except LookupError as error:
                raise ConfigError(
                    f"encoding={self.encoding!r} is not known ({error}); give one of Python's, as "
                    f"utf-8, utf-16, cp1252, latin-1, gb18030"
                ) from error

    def flags(self) -> str:
        """Those of the command that differ from their defaults."""
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"--{field.name}" for field in changed)
