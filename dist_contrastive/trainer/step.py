"""One step: embed, compare, send the gradient back and reduce it, update."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives, optim
from dist_contrastive.backend import seed_everything
from dist_contrastive.checkpoint import Progress
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import NonFiniteError
from dist_contrastive.grad_cache import GradCache
from dist_contrastive.metrics import duplicates, geometry
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.trainer.start import Run


def train_step(run: Run, samples: Samples, consumed: int, is_logged: bool) -> dict[str, Any]:
    """One step on this rank's rows of a global batch; the row to log, if it is.

    What is not finite, in embeddings, loss or gradient, changes nothing: the step is done without
    an update, on all ranks alike.

    Args:
        consumed: samples of the stream over all ranks, this batch included.

    Raises:
        NonFiniteError: on all ranks, when that happened in too many steps one after another, or
            when the weights are not finite themselves.
    """
    config, step = run.config, run.progress.step
    run.clock.begin_step(is_logged)
    lr = optim.learning_rate(step, config.train.steps, config.optim, config.data.global_batch_size)
    context = run.task.begin_step(
        samples,
        progress=step / config.train.steps,
        is_logged=is_logged,
        micro_batch_size=config.train.micro_batch_size,
    )
    try:
        embeddings, row = backward(run, samples, context)
        with run.clock.spent("optimizer"):
            updated = run.engine.step(lr)
        if updated.rescaled:  # what a loss scale is found by: no step is bad for it
            run.progress = replace(run.progress, step=step + 1, consumed=consumed)
            return {}
        _check_gradient(run, updated.grad_norm)
    except NonFiniteError as error:
        _without_update(run, consumed, error)
        return {}
    with run.clock.spent("optimizer"), run.engine.whole_parameters():
        run.task.finish_step(embeddings, samples, context)
    run.progress = Progress(step + 1, consumed)
    if not is_logged:
        return {}
    row = {"step": step + 1, **row, "lr": lr, "grad_norm": updated.grad_norm}
    row |= {"parameter_norm": run.engine.parameter_norm(), **run.task.scalars(context)}
    return row | _of_batch(run, embeddings, samples, row.get("temperature"))


def _of_batch(
    run: Run, embeddings: Embeddings, samples: Samples, temperature: float | None
) -> dict[str, float]:
    found: dict[str, float] = {"duplicates": duplicates(samples.index)}
    pairs = run.task.pairs(embeddings)
    return found if pairs is None else found | geometry(*pairs, temperature)


def backward(
    run: Run, samples: Samples, context: StepContext
) -> tuple[Embeddings, dict[str, float]]:
    """Leave the gradient of a step in the engine.

    Returns:
        Embeddings of this rank's rows without their graph, and the loss, with its terms if the step
        is logged.

    Raises:
        NonFiniteError: embeddings or loss are not finite, on any rank.
    """
    inputs = _Inputs(run, samples, context)
    if inputs.num_parts == 1:
        return _plain(run, inputs, samples, context)
    with run.clock.spent("embed"):
        cache = GradCache(inputs.embed, inputs.num_parts)
    with run.clock.spent("compare"):
        loss, row = _compare(run, cache.embeddings, samples, context)
        cache.compared(loss, [p for p in run.task.parameters() if p.requires_grad])
    with run.clock.spent("replay"):
        run.engine.backward(cache.replay, cache.num_parts)
    return tuple(x.detach() for x in cache.embeddings), row


def _plain(
    run: Run, inputs: "_Inputs", samples: Samples, context: StepContext
) -> tuple[Embeddings, dict[str, float]]:
    with run.clock.spent("embed"):
        embeddings = inputs.embed(0)
    with run.clock.spent("compare"):
        loss, row = _compare(run, embeddings, samples, context)
    with run.clock.spent("replay"):
        run.engine.backward(lambda _: loss)
    return tuple(x.detach() for x in embeddings), row


class _Inputs:
    """This rank's rows of a batch in micro-batches, each made and embedded when it is asked for."""

    def __init__(self, run: Run, samples: Samples, context: StepContext) -> None:
        self._run, self._samples, self._context = run, samples, context
        rows = torch.arange(len(samples.images), device=samples.images.device)
        self._parts = rows.split(context.micro_batch_size or max(1, len(rows)))

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    def embed(self, part: int) -> Embeddings:
        """Embeddings of a micro-batch, alike however often it is asked for."""
        run, samples, context = self._run, self._samples, self._context
        if self.num_parts > 1:
            rows = self._parts[part]
            samples, context = samples.rows(rows), context.rows(rows)
        seed_everything(
            run.config.seed * 1_000_003
            + run.progress.step * 1009
            + run.backend.rank
            + part * 2_147_483_647
        )
        return run.engine.embed(*run.task.inputs(samples, context))


def _compare(
    run: Run, embeddings: Embeddings, samples: Samples, context: StepContext
) -> tuple[Tensor, dict[str, float]]:
    """The loss; it and, if logged and several, its terms as numbers."""
    terms = run.task.compare(embeddings, samples, context)
    for name, term in terms.items():
        if not term.isfinite():
            raise NonFiniteError(f"{name} of finite embeddings is {term.item()}")
    loss = torch.stack(list(terms.values())).sum()
    if not context.is_logged:
        return loss, {}
    row = {"loss": loss.item()}
    return loss, row | (_of_terms(embeddings, terms) if len(terms) > 1 else {})


def _of_terms(embeddings: Embeddings, terms: Terms) -> dict[str, float]:
    """Value of each term, and the norm of its gradient by the embeddings of the global batch.

    A second backward through the comparison for each term: for rows that are logged.
    """
    found: dict[str, float] = {}
    inputs = [x for x in embeddings if x.requires_grad]
    for name, term in terms.items():
        grads = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
        squares = sum((x.double().square().sum() for x in grads if x is not None), torch.zeros(()))
        # Backward leaves each rank its share times the number of ranks.
        total = collectives.all_reduce_sum(squares).item() / collectives.world_size() ** 2
        found |= {f"loss/{name}": term.item(), f"embedding_grad_norm/{name}": math.sqrt(total)}
    return found


def _check_gradient(run: Run, norm: float) -> None:
    """Norm of the gradient averaged over ranks: the same number on all of them."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"the gradient averaged over all {run.backend.world_size} ranks has norm {norm}; lower "
            f"optim.lr"
        )


def _without_update(run: Run, consumed: int, error: NonFiniteError) -> None:
    """Go on with the next batch, unless that has been done too often."""
    step, limit = run.progress.step + 1, run.config.train.max_bad_steps
    run.engine.discard_gradients()
    bad_steps = run.progress.bad_steps + 1
    if not math.isfinite(run.engine.parameter_norm()):
        raise NonFiniteError(f"step {step}: {error}; the weights are not finite either") from error
    if bad_steps > limit:
        raise NonFiniteError(
            f"step {step}: {error}; it is bad step number {bad_steps} without a good one between, "
            f"and train.max_bad_steps={limit}"
        ) from error
    run.say(f"step {step} is left out ({bad_steps} of at most {limit} in a row): {error}")
    run.progress = replace(run.progress, step=step, consumed=consumed, bad_steps=bad_steps)
