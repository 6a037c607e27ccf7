"""One step: embed, compare, backward with its reduction over ranks, update."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives, optim
from dist_contrastive.backend import seed_everything
from dist_contrastive.checkpoint import Progress
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.grad_cache import GradCache
from dist_contrastive.metrics import duplicates, geometry, term_metrics
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms
from dist_contrastive.trainer.failures import check_finite, out_of_memory, skip_update
from dist_contrastive.trainer.run import Run


def train_step(run: Run, samples: Samples, consumed: int, is_logged: bool) -> dict[str, Any]:
    """One step on this rank's rows of a global batch.

    NaN or infinity in embeddings, loss or gradient leaves the step without an update, on all ranks
    alike.

    Args:
        consumed: samples of the stream over all ranks, this batch included.

    Returns:
        The row of metrics; empty if the step is not logged or was without an update.

    Raises:
        NonFiniteError: on all ranks, after too many such steps in a row, or when the weights are
            not finite themselves.
        MemoryLimitError: on the rank whose GPU has not the memory for it.

    Collectives: those of the task, one gradient reduction, those of the metrics.
    """
    config, step = run.config, run.progress.step
    run.begin_step(is_logged)
    lr = optim.learning_rate(step, config.train.steps, config.optim, config.data.global_batch_size)
    context = run.task.begin_step(
        samples,
        progress=step / config.train.steps,
        is_logged=is_logged,
        micro_batch_size=config.train.micro_batch_size,
    )
    try:
        embeddings, terms, row = backward(run, samples, context)
        with run.clock.spent("optimizer"):
            update = run.engine.step(lr, _total(terms))
        collectives.read_deferred()  # known by now, since the update has waited for the device
        if update.rescaled:  # the search for a loss scale: no bad step
            run.progress = replace(run.progress, step=step + 1, consumed=consumed)
            return {}
        if not update.applied:
            check_finite(terms)
            raise NonFiniteError(
                f"the gradient averaged over all {run.backend.world_size} ranks has norm "
                f"{update.grad_norm}; lower optim.lr"
            )
    except NonFiniteError as error:
        skip_update(run, consumed, error)
        return {}
    except torch.OutOfMemoryError as error:
        raise out_of_memory(run, error) from error
    with run.clock.spent("optimizer"), run.engine.whole_parameters():
        run.task.finish_step(embeddings, samples, context)
    run.learn_online(samples)
    run.progress = Progress(step + 1, consumed)
    if not is_logged:
        return {}
    row = {"step": step + 1, **row, "lr": lr, "grad_norm": update.grad_norm}
    row |= {"parameter_norm": run.engine.parameter_norm(), **run.task.scalars(context)}
    row["duplicates"] = duplicates(samples.index)
    if (pairs := run.task.pairs(embeddings)) is not None:
        row |= geometry(*pairs, row.get("temperature"))
    return row


def backward(
    run: Run, samples: Samples, context: StepContext
) -> tuple[Embeddings, Terms, dict[str, float]]:
    """Gradient of a step, left in the engine.

    Returns:
        Embeddings of this rank's rows and terms of the loss, without their graphs; of a logged
        step, the row of the loss and its terms.

    Raises:
        NonFiniteError: embeddings are not finite, on any rank.
    """
    clock, engine = run.clock, run.engine
    parts = _MicroBatches(run, samples, context)
    if len(parts) == 1:
        with clock.spent("embed"):
            embeddings = parts.embed(0)
        with clock.spent("compare"):
            terms, row = _compare(run, embeddings, samples, context)
        with clock.spent("replay"):
            engine.backward(lambda _: _total(terms))
    else:
        with clock.spent("embed"):
            cache = GradCache(parts.embed, len(parts))
        embeddings = cache.embeddings
        with clock.spent("compare"):
            terms, row = _compare(run, embeddings, samples, context)
            cache.compared(_total(terms), [p for p in run.task.parameters() if p.requires_grad])
        with clock.spent("replay"):
            engine.backward(cache.replay, len(parts))
    return tuple(x.detach() for x in embeddings), {k: x.detach() for k, x in terms.items()}, row


class _MicroBatches:
    """This rank's rows of a batch in micro-batches, their inputs made when they are embedded."""

    def __init__(self, run: Run, samples: Samples, context: StepContext) -> None:
        self._run, self._samples, self._context = run, samples, context
        num_rows = max(1, len(samples.images))
        size = context.micro_batch_size or num_rows
        self._parts = [slice(first, first + size) for first in range(0, num_rows, size)]

    def __len__(self) -> int:
        return len(self._parts)

    def embed(self, part: int) -> Embeddings:
        """Embeddings of a micro-batch, the same at every call."""
        run, samples, context = self._run, self._samples, self._context
        if len(self) > 1:
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
) -> tuple[Terms, dict[str, float]]:
    """Terms of the loss, and for a logged step the loss and its terms as numbers."""
    terms = run.task.compare(embeddings, samples, context)
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
        raise ConfigError("the loss depends on nothing that is trained; let it, or freeze less")
    if not context.is_logged:
        return terms, {}
    row = {"loss": _total(terms).item()}
    return terms, row | (term_metrics(embeddings, terms) if len(terms) > 1 else {})


def _total(terms: Terms) -> Tensor:
    """The loss."""
    return torch.stack(list(terms.values())).sum()
