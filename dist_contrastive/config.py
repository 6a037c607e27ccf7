"""The config of a run: composed from the settings of its parts; nothing below imports it.

Precedence: defaults < YAML file < ``key=value`` overrides. Unknown names are refused.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from dist_contrastive.backend import BackendSettings
from dist_contrastive.data.fields import Fields
from dist_contrastive.data.views import ViewSettings
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.settings import ContrastiveForceSettings, ViewLossSettings
from dist_contrastive.models import EncoderSettings, GeneratorSettings, ProjectionHeadSettings
from dist_contrastive.optim import OptimSettings
from dist_contrastive.settings import Settings


class DataSettings(Settings):
    """Where samples come from, and what makes a global batch."""

    train: Path
    """Folder of indexed shards to train on."""
    test: Path | None = None
    """Folder of held-out shards for `eval`."""
    image: str = "png"
    """Field of a sample that holds the image."""
    label: str | None = None
    """Field that holds an integer class, as `cls` or `json.label`; null without labels."""
    num_classes: PositiveInt | None = None
    """Labels are 0 ... num_classes - 1."""
    global_batch_size: int = Field(ge=2)
    """Samples of one step over all ranks: it defines the run, the number of ranks does not."""
    lanes: PositiveInt = 8
    """Parts in which an epoch is read; ranks x workers must divide it."""
    shuffle_window: PositiveInt = 4096
    """Samples of a lane that are shuffled among each other."""
    tail: Literal["carry", "drop"] = "carry"
    """What becomes of an epoch's rest that fills no batch."""
    num_workers: int = Field(default=0, ge=0)
    """Processes per rank that read ahead; 0 reads in the training process."""

    @property
    def fields(self) -> Fields:
        """Where a sample holds its image and its label."""
        return Fields(self.image, self.label, self.num_classes or 0)

    @model_validator(mode="after")
    def _labels_have_classes(self) -> Self:
        if (self.label is None) != (self.num_classes is None):
            raise ValueError("set both label and num_classes, or neither")
        return self


class TwoViewSettings(Settings):
    """Contrastive learning of an encoder from two views of each sample."""

    name: Literal["two_view"]
    encoder: EncoderSettings
    head: ProjectionHeadSettings = ProjectionHeadSettings()
    views: ViewSettings = ViewSettings()
    loss: ViewLossSettings


class PixelFeatures(Settings):
    """The force acts on pixels."""

    name: Literal["pixels"]


class RunFeatures(Settings):
    """The force acts on the representation of an encoder that an earlier run trained."""

    name: Literal["run"]
    run_dir: Path


FeatureSettings = Annotated[PixelFeatures | RunFeatures, Field(discriminator="name")]


class DriftSettings(Settings):
    """A one-step generator trained by the contrastive force."""

    name: Literal["drift"]
    generator: GeneratorSettings
    features: tuple[FeatureSettings, ...] = Field(min_length=1)
    """Spaces in which the force acts; their losses are added."""
    loss: ContrastiveForceSettings = ContrastiveForceSettings()


TaskSettings = Annotated[TwoViewSettings | DriftSettings, Field(discriminator="name")]


class TrainSettings(Settings):
    """Length of a run, and what it writes."""

    steps: PositiveInt
    log_every: PositiveInt = 10
    """Steps between rows of metrics."""
    save_every: PositiveInt = 200
    """Steps between checkpoints; one is always written at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep."""
    ledger: bool = False
    """Write the keys of every batch to ledger/rank-R.jsonl."""


class RunConfig(Settings):
    """Everything that defines a run."""

    run_dir: Path
    """Folder for everything that the run writes."""
    seed: int = Field(default=0, ge=0)
    data: DataSettings
    task: TaskSettings
    optim: OptimSettings = OptimSettings()
    train: TrainSettings
    backend: BackendSettings = BackendSettings()

    @field_validator("seed")
    @classmethod
    def _seed_fits(cls, seed: int) -> int:
        if seed >= 2**31:
            raise ValueError(f"must be below 2**31 = {2**31}")
        return seed


# Settings that a resumed run may change: they do not touch what is computed.
MAY_CHANGE = (
    "run_dir",
    "data.num_workers",
    "data.test",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
    "train.ledger",
    "backend.timeout_s",
)


def load(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply ``key=value`` overrides (dots for nesting, values as YAML).

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown, missing or out of range.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_sentence(detail) for detail in error.errors()]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(f"{path}: " + "; ".join(problems[:3]) + more) from None


def save(config: RunConfig, folder: Path) -> None:
    """Write the resolved config, defaults included, as folder/config.yaml."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(text)


def load_run(folder: Path | str) -> RunConfig:
    """The resolved config of a run directory; its run_dir is where the folder is now."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run directory: it has no config.yaml; train one first")
    return load(path).model_copy(update={"run_dir": Path(folder)})


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """``key: old -> new`` for every setting that a resumed run may not change."""
    before, after = (_flat(c.model_dump(mode="json")) for c in (old, new))
    keys = [key for key in {**before, **after} if key not in MAY_CHANGE]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    parts = [_flat(value, f"{prefix}{key}.") for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings; see configs/ for examples")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value, as in optim.lr=0.001")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override {override!r}: {parent} is a value, not a group of settings"
            )
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None


_LIMITS = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}


def _sentence(detail: ErrorDetails) -> str:
    """One validation error as a sentence with the setting, its value, the limit and the fix."""
    classes, names = _walk(detail["loc"])
    path, kind, context = ".".join(names), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = [name for cls in classes for name in cls.model_fields]
        return f"{path} is not a known setting{_nearest(names[-1], known)}"
    if kind == "union_tag_invalid":
        known = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        return f"{path}.name={context['tag']} is not known{_nearest(context['tag'], known)}"
    if kind == "union_tag_not_found":
        return f"{path}.name is missing; it says which kind of {names[-1]} to use"
    if kind == "missing":
        return f"{path} is missing; set it in the file or as {path}=VALUE"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if isinstance(detail["input"], dict):
        return f"{path}: {message}"
    limits = {name: context[name] for name in _LIMITS if name in context}
    fix = "".join(f"; set {_LIMITS[name].format(limit)}" for name, limit in limits.items())
    return f"{path}={detail['input']}: {message}{fix}"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]}?" if near else ";") + f" (known: {', '.join(known)})"


def _walk(loc: tuple[int | str, ...]) -> tuple[list[type[Settings]], list[str]]:
    """The settings classes that hold the last name of a pydantic location, and the names
    without the tags that pydantic puts in for the chosen member of a union."""
    classes: list[type[Settings]] = [RunConfig]
    names: list[str] = []
    inside = classes
    for part in loc:
        tagged = [cls for cls in classes if _tag(cls) == part]
        if tagged and not any(part in cls.model_fields for cls in classes):
            classes = tagged
            continue
        names.append(str(part))
        inside = classes
        found = [
            _classes_in(cls.model_fields[part].annotation)
            for cls in classes
            if part in cls.model_fields
        ]
        if not isinstance(part, int):
            classes = [cls for group in found for cls in group]
    return inside, names


def _tag(cls: type[Settings]) -> str | None:
    field = cls.model_fields.get("name")
    values = get_args(field.annotation) if field else ()
    return values[0] if values else None


def _classes_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in _classes_in(part)]
