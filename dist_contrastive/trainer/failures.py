"""Steps that fail: numbers that are not finite, memory that does not suffice."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from dist_contrastive import planner
from dist_contrastive.config import RunConfig
from dist_contrastive.errors import MemoryLimitError, NonFiniteError
from dist_contrastive.tasks.base import Terms
from dist_contrastive.trainer.run import Run


def check_finite(terms: Terms) -> None:
    """Raise NonFiniteError where a term is not finite, on all ranks alike; waits for the device."""
    for name, term in terms.items():
        if not term.isfinite():
            raise NonFiniteError(f"{name} of finite embeddings is {term.item()}")


def skip_update(run: Run, consumed: int, error: NonFiniteError) -> None:
    """Go on with the next batch, unless too many steps in a row were bad."""
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
    run.warning(f"step {step} is left out ({bad_steps} of at most {limit} in a row): {error}")
    run.progress = replace(run.progress, step=step, consumed=consumed, bad_steps=bad_steps)


# ------------------------------------------------------------------ memory


def out_of_memory(run: Run, error: torch.OutOfMemoryError) -> MemoryLimitError:
    """The error of a step whose rank had not the memory for it: one sentence with what was missing,
    what the loss takes by plan, and settings with which less is needed."""
    config, ranks = run.config, run.backend.world_size
    missing = str(error).partition(" Of the allocated memory")[0].partition(" If reserved")[0]
    plan = plan_of_run(config, ranks)
    takes = f", of which the loss takes {_gib(plan)} by plan" if plan else ""
    rows = -(-config.data.global_batch_size // ranks)
    remedies = list(_remedies(config, ranks, rows, run.clock.part == "compare"))
    return MemoryLimitError(
        f"step {run.progress.step + 1} of {rows} samples on rank {run.backend.rank} has not the "
        f"memory for what it does in {run.clock.part} ({' '.join(missing.split()).rstrip('.')}"
        f"{takes}); set {', or '.join(remedies)}"
    )


def _remedies(config: RunConfig, ranks: int, rows: int, is_loss: bool) -> Iterator[str]:
    """Settings with which a step needs less, those first that act where memory was missing."""
    parts = [_networks_need_less(config, ranks, rows), _loss_needs_less(config, ranks)]
    if is_loss:
        parts.reverse()
    for part in parts:
        yield from part
    yield f"data.global_batch_size below {config.data.global_batch_size}"


def _networks_need_less(config: RunConfig, ranks: int, rows: int) -> Iterator[str]:
    if (part := config.train.micro_batch_size or rows) > 1:
        yield f"train.micro_batch_size={part // 2}"
    if not config.backend.activation_checkpointing:
        yield "backend.activation_checkpointing=true"
    if config.backend.zero_stage < 2 and ranks > 1:
        yield "backend.zero_stage=2"


def _loss_needs_less(config: RunConfig, ranks: int) -> Iterator[str]:
    """Settings of the loss, with what it takes by plan where that is known."""
    loss = getattr(config.task, "loss", None)
    if getattr(loss, "impl", None) == "dense":
        yield "task.loss.impl=auto"
    if loss is not None and ranks > 1 and loss.keys_from == "gather":
        task = config.task.model_copy(
            update={"loss": loss.model_copy(update={"keys_from": "ring"})}
        )
        plan = plan_of_run(config.model_copy(update={"task": task}), ranks)
        yield "task.loss.keys_from=ring" + (f" (by plan {_gib(plan)})" if plan else "")
    if (size := getattr(loss, "chunk_size", None)) is not None and size > 1:
        yield f"task.loss.chunk_size={size // 2}"
    if config.backend.precision == "fp32":
        yield "backend.precision=bf16"


def _gib(plan: planner.Plan) -> str:
    return f"{plan.total_memory / 2**30:.2g} GiB"


def plan_of_run(config: RunConfig, ranks: int, card: str = "h100") -> planner.Plan | None:
    """Plan of the loss of a run, where a step calls it once and the planner knows it."""
    task = config.task
    settings, head = getattr(task, "loss", None), getattr(task, "head", None)
    is_known = task.name in ("two_view", "paired", "labelled") and not getattr(task, "crops", None)
    if not is_known or not head or not head.layers or settings is None:
        return None
    is_planned = settings.name in planner.LOSSES and settings.name != "self_diagonal"
    if not is_planned or config.data.global_batch_size % ranks:
        return None
    return planner.plan(
        planner.Asked(
            settings.name,
            config.data.global_batch_size * getattr(task, "num_views", 1),
            head.out,
            ranks,
            config.backend.precision,
            settings.keys_from if ranks > 1 else "gather",
            card,
            getattr(settings, "symmetric", False),
        )
    )
