"""One step: embed, compare, reduce the gradient, update."""

import math
from typing import Any

import torch

from dist_contrastive import collectives, optim
from dist_contrastive.backend import seed_everything
from dist_contrastive.checkpoint import Progress
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import NonFiniteError
from dist_contrastive.tasks.base import Embeddings, Terms
from dist_contrastive.trainer.start import Run


def train_step(run: Run, samples: Samples, consumed: int, is_logged: bool) -> dict[str, Any]:
    """One step on this rank's rows of a global batch; the row to log, if it is.

    Args:
        consumed: samples of the stream over all ranks, this batch included.
    """
    config, step = run.config, run.progress.step
    seed_everything(config.seed * 1_000_003 + step * 1009 + run.backend.rank)
    run.task.progress, run.task.is_logged = step / config.train.steps, is_logged
    embeddings = run.module(*run.task.inputs(samples))
    terms = _compare(run, embeddings, samples)
    loss = torch.stack(list(terms.values())).sum()
    parts = _of_terms(run, terms) if is_logged and len(terms) > 1 else {}
    run.optimizer.zero_grad(set_to_none=True)
    run.backend.backward(loss)
    norm = run.backend.gradient_norm(run.module, config.optim.clip_norm)
    _check_gradient(run, norm)
    lr = optim.learning_rate(step, config.train.steps, config.optim)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.task.finish_step(embeddings)
    run.progress = Progress(step + 1, consumed)
    if not is_logged:
        return {}
    row = {"step": step + 1, "loss": loss.item(), "lr": lr, "grad_norm": norm}
    return {**row, **parts, **run.task.scalars()}


def _compare(run: Run, embeddings: Embeddings, samples: Samples) -> Terms:
    """Terms of the loss; what is not finite is the same on all ranks, so all raise or none."""
    step = run.progress.step + 1
    try:
        terms = run.task.compare(embeddings, samples)
    except NonFiniteError as error:
        raise NonFiniteError(f"step {step}: {error}") from error
    for name, term in terms.items():
        if not term.isfinite():
            raise NonFiniteError(f"step {step}: {name} of finite embeddings is {term.item()}")
    return terms


def _check_gradient(run: Run, norm: float) -> None:
    """Norm of the gradient averaged over ranks: the same number on all of them."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"step {run.progress.step + 1}: the gradient averaged over all "
            f"{run.backend.world_size} ranks has norm {norm}; lower optim.lr"
        )


def _of_terms(run: Run, terms: Terms) -> dict[str, float]:
    """Value of each term, and the norm of its own gradient, the mean over ranks as in the step.

    A second backward for each term: for rows that are logged.
    """
    parameters = [p for p in run.task.parameters() if p.requires_grad]
    found: dict[str, float] = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        mine = torch.cat([x.flatten().double() for x in grads if x is not None])
        mean = collectives.all_reduce_sum(mine) / run.backend.world_size
        found |= {f"loss/{name}": term.item(), f"grad_norm/{name}": mean.norm().item()}
    return found
