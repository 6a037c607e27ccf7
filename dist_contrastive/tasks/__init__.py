"""Tasks: what is embedded, and how the embeddings of the global batch are compared.

A task file reads as its settings and two answers: `embed` maps the inputs of some rows to
embeddings, `compare` maps the embeddings of this rank's rows to the terms of the loss over the
global batch. A config names a task of `TASKS`, or one of the user's own by its import path.
"""

from typing import Annotated

import torch
from torch import nn

from dist_contrastive.losses import PairLoss
from dist_contrastive.settings import Choice
from dist_contrastive.tasks.base import DataInfo, StepContext, Task
from dist_contrastive.tasks.drift import Drift
from dist_contrastive.tasks.hybrid import Hybrid
from dist_contrastive.tasks.images import ContrastiveTask, ImageTask
from dist_contrastive.tasks.labelled import Labelled
from dist_contrastive.tasks.moco import Moco
from dist_contrastive.tasks.paired import Paired
from dist_contrastive.tasks.two_view import TwoView

__all__ = [
    "TASKS",
    "AnyTask",
    "ContrastiveTask",
    "DataInfo",
    "Drift",
    "Hybrid",
    "ImageTask",
    "Labelled",
    "Moco",
    "Paired",
    "StepContext",
    "Task",
    "TwoView",
    "build_task",
]

TASKS: dict[str, type[Task]] = {
    "two_view": TwoView,
    "labelled": Labelled,
    "moco": Moco,
    "paired": Paired,
    "hybrid": Hybrid,
    "drift": Drift,
}
_TASK = Choice("task", Task, TASKS)
AnyTask = Annotated[Task.Config, _TASK]


def build_task(
    config: Task.Config,
    data: DataInfo,
    encoder: nn.Module | None = None,
    loss: PairLoss | None = None,
) -> Task:
    """Task of a config with fresh weights, which depend on the seed alone.

    Args:
        encoder: module from images [b, C, H, W] to [b, D], in the place of the configured one.
        loss: in the place of the configured one.

    Raises:
        ConfigError: the task has no use for such a module, or settings do not fit the data.
    """
    torch.manual_seed(data.seed)
    own = {name: x for name, x in (("encoder", encoder), ("loss", loss)) if x is not None}
    task: Task = _TASK.build(config, data, **own)
    return task
