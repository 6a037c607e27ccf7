"""What of an evaluation is wanted: names of measures, samples, the held-out split."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.rows_source import Rows
from dist_contrastive.data.shards.index import ShardIndex
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import configs_of, sources_at
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.prompts import Prompts, read_prompts

_Encoders = Literal["knn", "probe", "few", "classifier", "retrieval", "zero-shot", "map"]
_Generators = Literal["distances", "classes", "manifold", "copies", "samples"]
_Further = Literal["ranking", "nmi", "rankme", "lidar", "alignment", "uniformity", "sweep"]
MeasureName = _Encoders | _Generators | _Further | Literal["own"]  # own: of evaluate.measures
USUAL: tuple[MeasureName, ...] = (*get_args(_Encoders), *get_args(_Generators), "own")
MEASURES: tuple[MeasureName, ...] = (*USUAL, *get_args(_Further))


@dataclass(frozen=True)
class EvalOptions:
    """What of an evaluation is wanted."""

    only: frozenset[MeasureName] = frozenset(USUAL)
    limit: int | None = None
    """Samples of each split, spread evenly over it; None: all."""
    baselines: bool = False
    """Raw pixels are measured however many there are."""
    few: tuple[float, ...] = ()
    """Labels a class of few-label probes, below 1 shares of them; none: 10, or what there are."""
    split: str | None = None
    """What is held out, as `held_out`; None: data.test."""
    prompts: Prompts | None = None
    """Texts of classes for zero-shot classification, beside those of training."""


def eval_options(
    only: str | None = None,
    limit: int | None = None,
    baselines: bool = False,
    few: str | None = None,
    split: str | None = None,
    prompts: Path | None = None,
) -> EvalOptions:
    """Options as they are written: names and numbers with commas between, shares in percent.

    Raises:
        ConfigError: a name or number is none of those that there are; or as `read_prompts`.
    """
    names = USUAL if only is None else tuple(name.strip() for name in only.split(","))
    names = MEASURES if names == ("all",) else names
    chosen = frozenset(name for name in MEASURES if name in names)
    if unknown := sorted(set(names) - chosen):
        raise ConfigError(
            f"--only {','.join(unknown)} is no measure; name some of {', '.join(MEASURES)}, or all"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves nothing to measure; give 1 or more")
    labels = () if few is None else tuple(_number_of_labels(x.strip()) for x in few.split(","))
    texts = None if prompts is None else read_prompts(prompts)
    return EvalOptions(chosen, limit, baselines, labels, split, texts)


def _number_of_labels(text: str) -> float:
    """Labels a class, or with a percent sign the share of them."""
    found = re.fullmatch(r"([0-9.]+)(%?)", text)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found and found[2] and 0 < number < 100:
        return number / 100
    if found and not found[2] and number >= 1 and number.is_integer():
        return number
    raise ConfigError(
        f"--few {text} is no number of labels a class, as 10, and no share of them, as 1%; give "
        f"some, with commas between"
    )


def held_out(data: DataConfig, split: str | None) -> DataConfig:
    """The same data with another held-out split as data.test.

    Args:
        split: the split of that name of a table; of shards and folders of images a folder beside
            data.test, or beside data.train where there is none; or with a slash another location.
            None: data.test.

    Raises:
        ConfigError: there is no such folder.
    """
    if split is None:
        return data
    if "/" in split:
        return data.model_copy(update={"test": sources_at(split)})
    sources = configs_of(data.test if data.test is not None else data.train)
    return data.model_copy(update={"test": tuple(_named(source, split) for source in sources)})


def _named(source: Source.Config, split: str) -> Source.Config:
    """The same source of another split. Raises: ConfigError, as `held_out`."""
    if isinstance(source, Rows.Config):
        return source.model_copy(update={"split": split, "weight": None})
    name = "shards" if isinstance(source, ShardIndex.Config) else "path"
    location = getattr(source, name, None)
    if not isinstance(location, str):
        raise ConfigError(
            f"--split {split}: the source {source.name} has no splits by name; give a location "
            f"with a slash"
        )
    beside = location.rstrip("/").rpartition("/")[0] or "."
    found = f"{beside}/{split}"
    if "://" not in found and not Path(found).exists():
        names = sorted(path.name for path in Path(beside).glob("*/"))
        raise ConfigError(
            f"--split {split} is no folder in {beside}; name one of {', '.join(names) or 'some'}, "
            f"or give a location with a slash"
        )
    return source.model_copy(update={name: found, "weight": None})
