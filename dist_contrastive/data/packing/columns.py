"""Which columns of a `datasets` data set become which fields of a sample."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_contrastive.data.packing.pairs import TEXT_NAMES
from dist_contrastive.errors import ConfigError

NONE = "-"
"""Given as a column, it means that there is none."""
_LABEL_NAMES = ("label", "labels", "target", "class", "y")

Kind = Literal["image", "bytes", "class", "integer", "text", "array", "number", "plain", "other"]


@dataclass(frozen=True)
class Columns:
    """The part that every column plays; each is in at most one of them."""

    image: str | None
    text: str | None
    label: str | None
    images: tuple[str, ...]  # further ones
    arrays: tuple[str, ...]
    details: tuple[str, ...]  # for json


def choose_columns(
    features: Mapping[str, Any],
    wanted: Mapping[str, str | None],
    dropped: Collection[str],
) -> Columns:
    """Divide the columns among the fields.

    Args:
        features: of the data set.
        wanted: columns for "image", "text" and "label"; None finds one, "-" is none.
        dropped: columns that are left out.

    Raises:
        ConfigError: a column that is not there or cannot be what is wanted of it; several that
            could be; or one that no field can hold.
    """
    named = [*dropped, *(name for name in wanted.values() if name not in (None, NONE))]
    for name in named:
        if name not in features:
            raise ConfigError(f"there is no column {name!r}; give one of {', '.join(features)}")
    kinds = {name: kind_of(features[name]) for name in features if name not in dropped}
    image = _chosen(kinds, wanted, "image", ("image", "bytes", "array"), _only(kinds, "image"))
    text = _chosen(kinds, wanted, "text", ("text",), _texts(kinds))
    label = _chosen(kinds, wanted, "label", ("class", "integer", "text", "number"), _labels(kinds))
    rest = {name: kind for name, kind in kinds.items() if name not in (image, text, label)}
    for name, kind in rest.items():
        if kind in ("bytes", "other"):
            raise ConfigError(
                f"the column {name!r} holds {_told(features[name])}, for which there is no field; "
                f"leave it out with --drop {name}"
                + (f", or take it for the image with --image {name}" if kind == "bytes" else "")
            )
    if label is not None and (hidden := {"label", "class"} & rest.keys()):
        raise ConfigError(
            f"the column {min(hidden)!r} would be hidden by the label, which is taken from "
            f"{label!r}; give --label {min(hidden)} or --drop {min(hidden)}"
        )
    return Columns(
        image,
        text,
        label,
        images=tuple(name for name, kind in rest.items() if kind == "image"),
        arrays=tuple(name for name, kind in rest.items() if kind == "array"),
        details=tuple(name for name, kind in rest.items() if kind not in ("image", "array")),
    )


def kind_of(feature: Any) -> Kind:
    """What a column holds."""
    import datasets
    import pyarrow as pa

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    kind = datasets.Features({"x": feature}).arrow_schema.field("x").type
    if isinstance(kind, pa.ExtensionType):  # arrays of a fixed shape
        kind = kind.storage_type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return "other" if hasattr(feature, "decode") else "image"  # audio and video have both too
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "number"
    if _is_list(kind) and _is_numeric(_leaf(kind)):
        return "array"
    return "other" if _holds_bytes(kind) or hasattr(feature, "decode") else "plain"


def array_type(feature: Any) -> Any:
    """The NumPy type of a column of arrays."""
    import datasets
    import pyarrow as pa

    kind = datasets.Features({"x": feature}).arrow_schema.field("x").type
    return _leaf(
        kind.storage_type if isinstance(kind, pa.ExtensionType) else kind
    ).to_pandas_dtype()


def _only(kinds: Mapping[str, Kind], *wanted: Kind) -> list[str]:
    return [name for name, kind in kinds.items() if kind in wanted]


def _texts(kinds: Mapping[str, Kind]) -> list[str]:
    """Columns of texts with a name that says so; if there are none, all."""
    texts = _only(kinds, "text")
    return [name for name in texts if name.lower() in TEXT_NAMES] or texts


def _labels(kinds: Mapping[str, Kind]) -> list[str]:
    """Columns of classes; if there are none, whole numbers with a name that says so."""
    numbers = [name for name in _only(kinds, "integer") if name.lower() in _LABEL_NAMES]
    return _only(kinds, "class") or numbers


def _chosen(
    kinds: Mapping[str, Kind],
    wanted: Mapping[str, str | None],
    role: str,
    fitting: Sequence[Kind],
    found: Sequence[str],
) -> str | None:
    name = wanted.get(role)
    if name == NONE:
        return None
    if name is not None:
        kind = kinds.get(name)
        if kind not in fitting:
            raise ConfigError(
                f"the column {name!r} cannot be the {role}: it is "
                f"{'dropped' if kind is None else f'of the kind {kind}'}; give a column of the "
                f"kind {' or '.join(fitting)}"
            )
        return name
    # What has been asked for in another part is no candidate here.
    candidates = [name for name in found if name not in wanted.values()]
    if len(candidates) > 1:
        raise ConfigError(
            f"the columns {', '.join(candidates)} could each be the {role}; choose with --{role} "
            f"COLUMN, or --{role} {NONE} for none"
        )
    return candidates[0] if candidates else None


def _told(feature: Any) -> str:
    return type(feature).__name__ if hasattr(feature, "decode") else str(feature)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _leaf(kind: Any) -> Any:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if _is_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
