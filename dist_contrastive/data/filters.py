"""Settings of a filter: which samples of a source are taken."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from dist_contrastive.settings import Settings

_BOUNDS = {"at_least", "at_most"}


def _conditions(conditions: Mapping[str, Any]) -> Mapping[str, Any]:
    if not conditions:
        raise ValueError("no conditions; give some, as {json.width: {at_least: 256}}")
    for name, wanted in conditions.items():
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        if isinstance(wanted, dict):
            values = list(wanted.values())
            are_numbers = all(type(x) in (int, float) for x in values)
            if not wanted or set(wanted) - _BOUNDS or not are_numbers:
                raise ValueError(
                    f"{name} is bounded by {wanted}; give numbers as at_least, at_most or both"
                )
        if not values or not all(isinstance(x, str | int | float) for x in values):
            raise ValueError(f"{name} has {wanted}; give a value, a list of some, or bounds")
    return conditions


class Filter(Settings):
    """The samples of a source that fulfil every condition named here; their shards stay as they
    are.

    An epoch is each of them once, in the order that shards with them alone would have.
    """

    keys: str | None = None
    """File of the keys of the samples: .txt (a key a line), .csv or .parquet (see column), .npy (of
    texts, or of pairs of uint64 as DataComp writes them)."""
    where: Annotated[Mapping[str, Any], AfterValidator(_conditions)] | None = None
    """What fields must hold: a value, a list of values of which one must be there, or bounds, as
    {json.language: [en, de], json.width: {at_least: 256}}. The fields of all samples are read once
    for it, before the run."""
    scores: str | None = None
    """File of scores by key, .csv or .parquet; null: score is a field."""
    score: str | None = None
    """Column of scores, or where there is no such file a field, as json.clip. A sample without a
    score is not taken."""
    top: Annotated[float, Field(gt=0, le=1)] | None = None
    """Take this fraction, that with the highest scores, of the samples that fulfil the other
    conditions and have a score; of equal scores the first."""
    above: float | None = None
    """Take the samples whose score is higher."""
    column: str = "key"
    """Column of the keys in files."""
    key_field: str | None = None
    """Field that holds what the files name, as json.uid; null: the keys of the samples."""
    max_unknown: NonNegativeInt = 0
    """Keys in files that may be of no sample; one more is refused."""

    @model_validator(mode="after")
    def _conditions_fit(self) -> Self:
        if self.keys is None and self.where is None and self.score is None:
            raise ValueError("a filter without conditions takes all; give keys, where or score")
        if self.scores is not None and self.score is None:
            raise ValueError("scores without score; name the column of the file that holds them")
        if (self.score is None) != (self.top is None and self.above is None):
            raise ValueError("score goes with top or above; give both, or neither")
        return self
