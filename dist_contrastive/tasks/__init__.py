"""Tasks: what is embedded, and how the embeddings of the global batch are compared.

A task file reads as two answers: `embed` maps the inputs of some rows to embeddings, `compare`
maps the embeddings of this rank's rows to the terms of the loss over the global batch.
"""

import torch

from dist_contrastive.config import (
    DriftSettings,
    HybridSettings,
    LabelledSettings,
    MocoSettings,
    PairedSettings,
    RunConfig,
)
from dist_contrastive.data.fields import Samples
from dist_contrastive.tasks.base import Task
from dist_contrastive.tasks.drift import Drift
from dist_contrastive.tasks.hybrid import Hybrid
from dist_contrastive.tasks.images import ImageTask
from dist_contrastive.tasks.labelled import Labelled
from dist_contrastive.tasks.moco import Moco
from dist_contrastive.tasks.paired import Paired
from dist_contrastive.tasks.two_view import TwoView

__all__ = [
    "Drift",
    "Hybrid",
    "ImageTask",
    "Labelled",
    "Moco",
    "Paired",
    "Task",
    "TwoView",
    "build_task",
]


def build_task(config: RunConfig, example: Samples) -> Task:
    """The task of a config with fresh weights, which depend on the seed alone.

    Args:
        example: a row or more of the data, which tell shapes.
    """
    torch.manual_seed(config.seed)
    seed, num_classes = config.seed, config.data.num_classes
    match config.task:
        case LabelledSettings() as settings:
            return Labelled(settings, example, seed)
        case PairedSettings() as settings:
            return Paired(settings, example, seed)
        case MocoSettings() as settings:
            return Moco(settings, example, seed)
        case HybridSettings() as settings:
            assert num_classes is not None, "the config asks for classes"
            return Hybrid(settings, example, num_classes, seed)
        case DriftSettings() as settings:
            return Drift(settings, example, num_classes, seed)
        case settings:
            return TwoView(settings, example, seed)
