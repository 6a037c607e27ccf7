"""Before the first step: do these ranks, this engine and these micro-batches leave the gradient
that one process with all rows would?"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError, UnreadableSample
from dist_contrastive.tasks import Task, build_task
from dist_contrastive.trainer.start import Run
from dist_contrastive.trainer.step import backward

_ROWS = 4  # of each rank, or a few more
_PARAMETERS = 16
_LONGEST_S = 60.0
_TOLERANCE = {"fp32": 1e-2, "bf16": 0.2, "fp16": 0.2}  # what goes wrong is wrong by a factor


def self_check(run: Run) -> str:
    """Compare gradients on the first few samples, in eval mode; nothing of it is left.

    Returns:
        What was found, or why it was not looked for.

    Raises:
        ConfigError: on all ranks: the gradient of a parameter is another one.

    Collectives: those of a step, and a gather for each of a few parameters.
    """
    settings, micro = run.config.backend, run.config.train.micro_batch_size
    if settings.compile:
        return "not looked at: backend.compile would compile for it"
    if run.backend.world_size == 1 and micro is None and not settings.zero_stage:
        return "that of one process"
    with collectives.raised_together():
        samples = _few_samples(run)
    if not all(collectives.gather_objects(samples is not None)) or samples is None:
        return "not looked at: too few samples, or too many that cannot be read"
    count, rank = len(samples.images) // run.backend.world_size, run.backend.rank
    mine = samples.rows(torch.arange(rank * count, (rank + 1) * count, device=run.backend.device))
    parameters = _some_of(run.task)
    progress = run.progress.step / run.config.train.steps
    half = None if micro is None else min(micro, math.ceil(count / 2))
    with _eval_mode(run.task):
        begin = time.perf_counter()
        context = run.task.begin_step(mine, progress=progress, micro_batch_size=half)
        backward(run, mine, context)
        found = [run.engine.gradient(p).cpu() for p in parameters.values()]
        run.engine.discard_gradients()
        took_s = max(collectives.gather_objects(time.perf_counter() - begin))
    if took_s * run.backend.world_size > _LONGEST_S:
        return f"not looked at: one process would take longer than {_LONGEST_S:g} s"
    weights = run.engine.weights()
    with collectives.raised_together():
        worst = 0.0
        if run.backend.is_main:
            expected = _single_process_gradients(run, samples, weights, list(parameters))
            worst = _compare(run, dict(zip(parameters, found, strict=True)), expected)
    worst = collectives.gather_objects(worst)[0]
    return f"{len(parameters)} parameters have that of one process to {worst:.0e}"


def _few_samples(run: Run) -> Samples | None:
    """The first ones that can be read, the same on every rank, as many as make equal ranks and
    groups."""
    data, step = run.data, math.lcm(run.backend.world_size, run.task.rows_multiple)
    wanted = step * math.ceil(_ROWS * run.backend.world_size / step)
    found: list[int] = []
    for number in range(min(wanted + run.config.data.max_skipped, len(data.index))):
        try:
            data.fields.read(data.index, [number])
        except UnreadableSample:
            continue
        found.append(number)
        if len(found) == wanted:
            samples = data.fields.read(data.index, found)
            if data.labels is not None:
                samples = replace(samples, labels=data.labels[samples.index])
            return samples.to(run.backend.device)
    return None


def _some_of(task: Task) -> dict[str, nn.Parameter]:
    """Trained parameters from all parts, those of the loss among them."""
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    names = list(trained)
    every = max(1, len(names) // _PARAMETERS)
    chosen = {*names[::every], *(name for name in names if name.startswith("loss"))}
    return {name: trained[name] for name in names if name in chosen}


@contextmanager
def _eval_mode(task: Task) -> Iterator[None]:
    """In training mode dropout would draw other masks for other ranks."""
    mode = task.training
    task.eval()
    try:
        yield
    finally:
        task.train(mode)


def _single_process_gradients(
    run: Run, samples: Samples, weights: dict[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """Gradients by the plain step, in fp32, of the task with these weights."""
    with collectives.alone():
        task = build_task(run.config, run.data.example).to(run.backend.device).eval()
        task.load_state_dict(weights)
        progress = run.progress.step / run.config.train.steps
        context = task.begin_step(samples, progress=progress)
        embeddings = task(*task.inputs(samples, context))
        torch.stack(list(task.compare(embeddings, samples, context).values())).sum().backward()
    grads = {name: task.get_parameter(name).grad for name in names}
    return {
        name: torch.zeros(task.get_parameter(name).shape) if grad is None else grad.cpu()
        for name, grad in grads.items()
    }


def _compare(run: Run, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference; small gradients, rounding for the most part, count by that
    of the largest."""
    settings = run.config.backend
    largest = max(float(grad.norm()) for grad in expected.values())
    worst = 0.0
    for name, grad in expected.items():
        size = max(float(grad.norm()), 1e-2 * largest, 1e-30)
        off = float((found[name].float() - grad).norm()) / size
        if not off <= _TOLERANCE[settings.precision]:
            ratio = float(found[name].norm()) / max(float(grad.norm()), 1e-30)
            raise ConfigError(
                f"the gradient of {name} on {run.backend.world_size} ranks (zero_stage="
                f"{settings.zero_stage}, micro_batch_size={run.config.train.micro_batch_size}) is "
                f"not that of one process: {ratio:.3g} times its norm, off by {off:.2g} of it; "
                f"look for networks whose rows depend on each other and losses of this rank alone, "
                f"or set train.self_check=false to train all the same"
            )
        worst = max(worst, off)
    return worst
