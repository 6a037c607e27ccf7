"""Training with the losses of pytorch-metric-learning, all else being equal.

The task of a config is built, fed and updated as the trainer does it in one process: the same
initial weights, batches, views, optimiser and learning rates. For table D of supervision.py.
"""

from collections.abc import Callable
from contextlib import closing

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from dist_contrastive import optim
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.training import open_data
from dist_contrastive.losses import NTXent, SupCon, Triplet, VICReg
from dist_contrastive.tasks import ImageTask, Labelled, TwoView

Loss = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
"""Of the embeddings [b, D] of each view, and the labels [b]."""


def equal_loss(settings: TwoView.Config | Labelled.Config) -> Loss:
    """Their loss with the definition of ours.

    Their default takes the mean over the terms above 0. For triplets, and for the dimensions of
    VICReg, it is replaced by the mean over all; of SupCon it leaves out the rows without a
    positive, as we do.

    Raises:
        ValueError: a loss that they do not have, or not in the same way.
    """
    loss = settings.loss
    match loss:
        case NTXent.Config(name="ntxent"):  # DCL is one, too
            return _of_views(losses.SelfSupervisedLoss(losses.NTXentLoss(loss.temperature)))
        case SupCon.Config():
            return _of_labels(losses.SupConLoss(loss.temperature))
        case Triplet.Config(mining="all", distance="cosine"):
            distance, reducer = CosineSimilarity(), MeanReducer()
            theirs = losses.TripletMarginLoss(loss.margin, distance=distance, reducer=reducer)
            return _of_labels(theirs)
        case VICReg.Config():
            weights = loss.invariance_weight, loss.variance_weight, loss.covariance_weight
            return _of_views(losses.VICRegLoss(*weights, eps=loss.eps, reducer=MeanReducer()))
    raise ValueError(f"pytorch-metric-learning has no equal of {loss}")


def _of_views(loss: nn.Module) -> Loss:
    return lambda views, labels: loss(views[0], ref_emb=views[1])


def _of_labels(loss: nn.Module) -> Loss:
    def of_views(views: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        assert labels is not None, "the config asks for labels"
        return loss(torch.cat(views), labels.repeat(len(views)))

    return of_views


def train(config: RunConfig) -> tuple[ImageTask, list[float]]:
    """Train the config's task to its end with their loss in the place of ours.

    Returns:
        The trained task; and of each step by how much the two losses of the same embeddings differ,
        relative to ours.
    """
    assert isinstance(config.task, TwoView.Config | Labelled.Config)
    loss = equal_loss(config.task)
    data = open_data(config.data, seed=config.seed, uses_labels=config.task.uses_labels)
    task = config.build_task(data.example)
    assert isinstance(task, ImageTask)
    optimizer = optim.build_optimizer(task, config.optim)
    differences = []
    with closing(iter(data.stream)) as batches:
        for step in range(config.train.steps):
            samples = data.samples(next(batches))
            embeddings = task(*task.inputs(samples, task.begin_step(samples)))
            value = loss(embeddings, samples.labels)
            differences.append(_difference(task, embeddings, samples, value))
            optimizer.zero_grad()
            value.backward()
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(
                    step, config.train.steps, config.optim, config.data.global_batch_size
                )
            optimizer.step()
    return task, differences


@torch.no_grad()
def _difference(
    task: ImageTask, embeddings: tuple[Tensor, ...], samples: Samples, theirs: Tensor
) -> float:
    terms = task.compare(embeddings, samples, task.begin_step(samples))
    ours = torch.stack(list(terms.values())).sum()
    return ((theirs - ours).abs() / ours.abs().clamp(min=1e-6)).item()  # a loss may become 0
