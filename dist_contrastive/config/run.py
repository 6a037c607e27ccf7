"""Everything that defines a run, and what of it a resumed run may change."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from torch import nn

from dist_contrastive.backend import Backend, TrackerName
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.errors import redacted
from dist_contrastive.evaluation.measure import EvaluateSettings
from dist_contrastive.losses import PairLoss
from dist_contrastive.models.allocation import BoundedAllocation
from dist_contrastive.optim import LAYERWISE, OptimConfig
from dist_contrastive.settings import Settings
from dist_contrastive.tasks import AnyTask, DataInfo, Drift, ImageTask, Paired, Task, build_task


class KeepBestSettings(Settings):
    """Which checkpoint is the best one."""

    metric: str
    """A number in metrics.jsonl; its mean since the checkpoint before counts."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest one is the best."""


class TrainSettings(Settings):
    """Length of a run, and what it writes."""

    steps: PositiveInt
    """Updates of the weights in all."""
    log_every: PositiveInt = 10
    """Steps between rows of metrics."""
    save_every: PositiveInt = 200
    """Steps between checkpoints; one is always written at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of it are kept too."""
    keep_best: KeepBestSettings | None = None
    """The best one is kept too."""
    async_save: bool = False
    """Write checkpoints beside the training, from a copy of them in memory."""
    micro_batch_size: PositiveInt | None = None
    """Rows of a rank that networks are given at a time; the batch may be as large as its embeddings
    allow (gradient caching). null: all rows at once. It changes gradients by rounding alone."""
    self_check: bool = True
    """Before the first step, compare the gradient of a few samples with that of one process, unless
    that took more than a minute."""
    max_bad_steps: NonNegativeInt = 3
    """Steps in a row whose loss or gradient may be not finite; they change nothing."""
    max_stalled_starts: PositiveInt = 5
    """How often a run may be started from the same checkpoint without coming to the next one."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where rows of metrics are sent besides metrics.jsonl."""
    tracker_project: str = "dist_contrastive"
    """Name under which wandb and trackio keep the run."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step (1 is the first) of a profile, written to profile/rank-R.json."""
    ledger: bool = False
    """Write the keys of every batch to ledger/rank-R.jsonl."""


class RunConfig(Settings):
    """Everything that defines a run."""

    run_dir: Path
    """Folder for everything that the run writes."""
    init_from: Path | None = None
    """Weights to start from: a run directory (its newest checkpoint), an export, a checkpoint, or
    another folder or file of safetensors. null: those of the seed."""
    init_strict: bool = True
    """Refuse `init_from` unless its weights are those of this task, name by name and shape by
    shape; false takes those that fit, and leaves the others as the seed makes them."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: weights, order of samples, views, noise."""
    data: DataConfig
    """Samples, and how they become batches."""
    task: AnyTask
    """What is trained by which objective."""
    optim: OptimConfig = OptimConfig()
    """Updates of the weights."""
    train: TrainSettings
    """Length of the run, and what it writes."""
    backend: Backend.Config = Backend.Config()
    """Device, precision and distribution over ranks."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """What `eval` measures beside the measures of the task."""

    @field_validator("run_dir", mode="before")
    @classmethod
    def _folder_name(cls, run_dir: Any) -> Any:
        if isinstance(run_dir, str) and not (run_dir.strip() and run_dir.isprintable()):
            raise ValueError("is no name of a folder; give it one")
        if any(len(part.encode()) > 255 for part in str(run_dir).split("/")):
            raise ValueError("has a name of more than 255 bytes; give it a shorter one")
        if "://" in str(run_dir):
            raise ValueError("is a URL, and checkpoints are written to disks; give it a folder")
        return run_dir

    @field_validator("seed")
    @classmethod
    def _seed_fits(cls, seed: int) -> int:
        if seed >= 2**31:
            raise ValueError(f"must be below 2**31 = {2**31}")
        return seed

    @model_validator(mode="after")
    def _task_fits_data(self) -> Self:
        self.task.check(self.data)
        return self

    @model_validator(mode="after")
    def _can_be_evaluated(self) -> Self:
        """What is measured during training must be there."""
        evaluate, data = self.evaluate, self.data
        if evaluate.every is None:
            return self
        of_encoder = [name for name in evaluate.during if name != "samples"]
        by_labels = [name for name in of_encoder if name != "retrieval"]
        is_encoder, is_generator = (isinstance(self.task, x.Config) for x in (ImageTask, Drift))
        lacks = {
            "data.test, a folder of held-out shards": of_encoder and data.test is None,
            "a task with an encoder of images": of_encoder and not is_encoder,
            "the task drift, for samples": "samples" in evaluate.during and not is_generator,
            f"data.label, by which {' and '.join(by_labels)} goes": by_labels and not data.label,
            "the task paired, for retrieval": (
                "retrieval" in evaluate.during and not isinstance(self.task, Paired.Config)
            ),
        }
        if missing := [what for what, is_missing in lacks.items() if is_missing]:
            raise ValueError(
                f"evaluate.every={evaluate.every} needs {missing[0]}; set that, or leave "
                f"evaluate.every out"
            )
        return self

    @model_validator(mode="after")
    def _can_learn_online(self) -> Self:
        """Online probes learn classes from the training batches."""
        online, data = self.evaluate.online, self.data
        lacks = {
            "a task with an encoder of images": not isinstance(self.task, ImageTask.Config),
            "data.label and data.num_classes, the classes of the training data": (
                data.label is None or data.num_classes is None
            ),
        }
        missing = [what for what, is_missing in lacks.items() if is_missing]
        if online and missing:
            raise ValueError(
                f"evaluate.online={list(online)} needs {missing[0]}; set that, or leave "
                f"evaluate.online out"
            )
        if len(set(online)) < len(online):
            raise ValueError(f"evaluate.online={list(online)} names one twice; name each once")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        optim, train, stage = self.optim, self.train, self.backend.zero_stage
        if optim.name in LAYERWISE and stage:
            raise ValueError(
                f"optim.name={optim.name} with backend.zero_stage={stage}: its updates depend on "
                f"the whole of each parameter, and a rank of ZeRO updates pieces; set "
                f"backend.zero_stage=0, or optim.name to adamw, lion or sgd"
            )
        if train.keep_every is not None and train.keep_every % train.save_every:
            raise ValueError(
                f"train.keep_every={train.keep_every} is no multiple of train.save_every="
                f"{train.save_every}, so that there may be no such checkpoint; set a multiple"
            )
        first, last = train.profile_steps or (1, 1)
        if not first <= last <= train.steps:
            raise ValueError(
                f"train.profile_steps={[first, last]} with train.steps={train.steps}; give the "
                f"first one first, and steps that are there"
            )
        return self

    @property
    def fields(self) -> Fields:
        """Where a sample holds what the task takes."""
        return self.data.fields(self.task.labels_required, self.seed)

    def build_task(
        self, example: Samples, encoder: nn.Module | None = None, loss: PairLoss | None = None
    ) -> Task:
        """The task with fresh weights.

        Args:
            example: a row or more of the data, which show shapes.
            encoder, loss: as in `tasks.build_task`.
        """
        data = DataInfo(example, self.data.num_classes, self.seed)
        with BoundedAllocation():
            return build_task(self.task, data, encoder, loss)


# Settings that a resumed run may change: they do not touch what is computed. Where samples come
# from is one of them, since a run remembers what they were (`data.record`).
MAY_CHANGE = (
    "run_dir",
    "data.train",
    "data.test",
    "data.num_workers",
    "data.prefetch_factor",
    "data.worker_start",
    "data.max_skipped",
    "data.cache.folder",
    "data.cache.limit_mb",
    "data.cache.block_mb",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.async_save",
    "train.trackers",
    "train.tracker_project",
    "train.profile_steps",
    "train.ledger",
    "train.micro_batch_size",
    "train.self_check",
    "train.max_bad_steps",
    "train.max_stalled_starts",
    "backend.device",
    "backend.zero_stage",
    "backend.compile",
    "backend.activation_checkpointing",
    "backend.channels_last",
    "backend.timeout_s",
    "evaluate",
)


# Settings that a run may change when it is told so (--change); each change is recorded. They are
# not its data, model, objective or batch. Lanes change where an epoch ends alone.
CHANGEABLE = (
    "data.lanes",
    "train.steps",
    "optim.lr",
    "optim.lr_scaling",
    "optim.lr_batch_size",
    "optim.warmup_steps",
    "optim.final_lr_ratio",
    "optim.weight_decay",
    "optim.betas",
    "optim.eps",
    "optim.trust_coefficient",
    "optim.clip_norm",
    "backend.precision",
    "backend.tf32",
)

_PATHS = ("run_dir", "init_from", "pretrained")
_DATA_PATHS = ("train", "test", "shards", "path")


def changed(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Old and new value of the settings that differ, but for those that may without a word."""
    trees = [redacted(config.model_dump(mode="json")) for config in (old, new)]  # as it is kept
    before, after = map(_flat, trees)
    there, here = (_flat(map_paths(tree, os.path.abspath)) for tree in trees)
    free = tuple(f"{name}." for name in MAY_CHANGE)
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if not f"{key}.".startswith(free) and there.get(key) != here.get(key)
    }


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """``key: old -> new`` of all that are `changed`."""
    return [f"{key}: {before} -> {after}" for key, (before, after) in changed(old, new).items()]


def map_paths(tree: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The same tree of settings, with `change` applied to its paths; URLs stay."""

    def visit(node: Any, names: tuple[str, ...]) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, dict | list):
                visit(value, _DATA_PATHS if key == "data" else names)
            elif isinstance(value, str) and key in names and "://" not in value:
                node[key] = change(value)

    visit(tree, _PATHS)
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    parts = [_flat(value, f"{prefix}{key}.") for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}
