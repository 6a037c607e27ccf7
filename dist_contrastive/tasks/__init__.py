"""Tasks: what is embedded, and how the embeddings of the global batch are compared.

A task file reads as two answers: `embed` maps the inputs of some rows to embeddings, `compare`
maps the embeddings of this rank's rows to the loss over the global batch.
"""

import torch

from dist_contrastive.config import RunConfig, TwoViewSettings
from dist_contrastive.tasks.base import Task
from dist_contrastive.tasks.drift import Drift
from dist_contrastive.tasks.two_view import TwoView

__all__ = ["Drift", "Task", "TwoView", "build_task"]


def build_task(config: RunConfig, image_shape: tuple[int, int, int]) -> Task:
    """The task of a config with fresh weights, which depend on the seed alone.

    Args:
        image_shape: (channels, height, width) of the data.
    """
    torch.manual_seed(config.seed)
    if isinstance(config.task, TwoViewSettings):
        return TwoView(config.task, image_shape, config.seed)
    return Drift(config.task, image_shape, config.data.num_classes, config.seed)
