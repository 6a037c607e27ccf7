"""The training loop: the stream in, checkpoints and metrics out.

Everything random is a function of (seed, step, rank) or of the sample, so a run is determined by
its config and how far it is. Stopped anywhere and started again, it ends with the same weights.
"""

import json
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dist_contrastive
from dist_contrastive import checkpoint, collectives, optim
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend, seed_everything
from dist_contrastive.checkpoint import Checkpoint, Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.collate import Batch
from dist_contrastive.data.fields import Samples, image_shape
from dist_contrastive.data.stream import ShardStream
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.metrics import Clock, Ledger, MetricsLog
from dist_contrastive.signals import stop_flag
from dist_contrastive.tasks import Task, build_task
from dist_contrastive.tasks.base import Embeddings

EXIT_DONE = 0
EXIT_REQUEUE = 75  # stopped early with everything saved: start it again
_GO, _STOP, _FAILED = 0, 1, 2  # what a rank votes before a step; the largest vote counts


@dataclass
class Run:
    """A run in progress on this rank."""

    config: RunConfig
    backend: Backend
    task: Task
    module: nn.Module  # the task as the engine wrapped it
    optimizer: torch.optim.Optimizer
    stream: ShardStream
    progress: Progress


def train(config: RunConfig, stop_after: int | None = None) -> int:
    """Train to config.train.steps, or go on from the newest checkpoint in the run directory.

    Args:
        stop_after: stop after so many steps of this call, as a signal would.

    Returns:
        Exit code: 0 when all steps are done, 75 when stopped before, with everything saved.

    Raises:
        ConfigError: on every rank, before any step.
        DataError: on every rank, before the step whose samples cannot be read.
        NonFiniteError: NaN or infinity in loss or gradients; no checkpoint is written after it.
    """
    backend = Backend(config.backend)
    try:
        return _train(config, backend, stop_after)
    finally:
        backend.close()


def check(config: RunConfig, world_size: int) -> None:
    """Raise what would stop this config from starting on that many ranks."""
    _open_stream(config, Progress(), 0, world_size)


def _train(config: RunConfig, backend: Backend, stop_after: int | None) -> int:
    run = _start(config, backend)
    steps = config.train.steps
    first = run.progress.step
    stop_at = steps if stop_after is None else min(steps, first + stop_after)
    if first >= steps:
        _say(backend, f"{config.run_dir} is trained to step {first} already")
        return EXIT_DONE
    if first:
        _say(backend, f"going on from step {first} of {steps}")
    log = MetricsLog(config.run_dir, steps, first, enabled=backend.is_main)
    clock = Clock(run.progress.consumed)
    with (
        log,
        stop_flag() as signalled,
        Ledger(config.run_dir, backend.rank, config.train.ledger) as ledger,
        closing(iter(run.stream)) as batches,
    ):
        while run.progress.step < stop_at:
            found = _next_samples(run, batches, clock, bool(signalled))
            if found is None:
                break
            keys, samples = found
            ledger.write(run.progress.step, keys)
            row = train_step(run, samples)
            step = run.progress.step
            if step % config.train.log_every == 0 or step == steps:
                log.write({**row, **clock.rates(run.progress.consumed)})
            if step % config.train.save_every == 0:
                _save(run)
        if run.progress.step > first and run.progress.step % config.train.save_every:
            _save(run)
    return EXIT_DONE if run.progress.step >= steps else EXIT_REQUEUE


def _next_samples(
    run: Run, batches: Iterator[Batch], clock: Clock, stop: bool
) -> tuple[list[str], Samples] | None:
    """Keys and samples of the next batch; None on all ranks when one of them was asked to stop.

    A rank that cannot read its part tells the others before any of them enters the step.
    """
    found: tuple[list[str], Samples] | None = None
    error: Exception | None = None
    try:
        with clock.waiting():
            batch = next(batches)
        found = batch["__key__"], run.config.data.fields.samples(batch).to(run.backend.device)
    except Exception as caught:
        error = caught
    vote = _FAILED if error else _STOP if stop else _GO
    verdict = collectives.max_over_ranks(vote, run.backend.device)
    if verdict == _FAILED:
        with collectives.raised_together():
            if error:
                raise error
    return found if verdict == _GO else None


def train_step(run: Run, samples: Samples) -> dict[str, Any]:
    """One step on this rank's rows of a global batch; returns what is worth logging."""
    config, step = run.config, run.progress.step
    seed_everything(config.seed * 1_000_003 + step * 1009 + run.backend.rank)
    embeddings = run.module(*run.task.inputs(samples))
    loss = _compare(run, embeddings, samples)
    run.optimizer.zero_grad(set_to_none=True)
    run.backend.backward(loss)
    norm = run.backend.gradient_norm(run.module, config.optim.clip_norm)
    _check_gradient(run, norm)
    lr = optim.learning_rate(step, config.train.steps, config.optim)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.progress = Progress(step + 1, run.stream.consumed)
    value = loss.item()
    return {"step": step + 1, "loss": value, "lr": lr, "grad_norm": norm, **run.task.scalars()}


def _start(config: RunConfig, backend: Backend) -> Run:
    """Open everything; what is wrong on one rank is raised on all."""
    with collectives.raised_together():
        resumed = _find_checkpoint(config)
    seen = collectives.gather_objects(None if resumed is None else resumed.progress)
    if any(progress != seen[0] for progress in seen):
        raise ConfigError(
            f"ranks see different checkpoints in {config.run_dir} ({seen}); put run_dir on a file "
            f"system that all ranks share"
        )
    with collectives.raised_together():
        progress = resumed.progress if resumed else Progress()
        stream = _open_stream(config, progress, backend.rank, backend.world_size)
        task = build_task(config, image_shape(stream.index, config.data.image))
        optimizer = optim.build_optimizer(task, config.optim)
        if resumed:
            task.load_state_dict(resumed.weights())
            optimizer.load_state_dict(resumed.optimizer_state())
        if backend.is_main:
            _describe(config, backend)
    module, prepared = backend.prepare(task, optimizer)
    return Run(config, backend, task, module, prepared, stream, progress)


def _find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The newest checkpoint of this run directory, which must be of the same config."""
    found = checkpoint.newest(config.run_dir / "checkpoints")
    if found is None:
        return None
    changed = configs.differences(configs.load_run(config.run_dir), config)
    if changed:
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings ({'; '.join(changed[:3])}); choose "
            f"another run_dir, or delete that one to start over"
        )
    return found


def _open_stream(config: RunConfig, progress: Progress, rank: int, world_size: int) -> ShardStream:
    data = config.data
    return ShardStream(
        data.train,
        global_batch_size=data.global_batch_size,
        lanes=data.lanes,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_workers=data.num_workers,
        consumed=progress.consumed,
        shuffle_window=data.shuffle_window,
        tail=data.tail,
    )


def _describe(config: RunConfig, backend: Backend) -> None:
    """What the run is, written into its directory."""
    environment = {
        "dist_contrastive": dist_contrastive.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.node(),
        "device": str(backend.device),
        "world_size": backend.world_size,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(environment, indent=1) + "\n"
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        configs.save(config, config.run_dir)
        (config.run_dir / "environment.json").write_text(text)
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir} cannot be written ({error.strerror}); choose another folder"
        ) from error


def _save(run: Run) -> None:
    with collectives.raised_together():
        if run.backend.is_main:
            weights, state = run.task.state_dict(), run.optimizer.state_dict()
            root, keep_last = run.config.run_dir / "checkpoints", run.config.train.keep_last
            checkpoint.save(root, run.progress, weights, state, keep_last)


def _compare(run: Run, embeddings: Embeddings, samples: Samples) -> Tensor:
    """The loss; what is not finite about it is the same on all ranks, so all raise or none."""
    step = run.progress.step + 1
    try:
        loss = run.task.compare(embeddings, samples)
    except NonFiniteError as error:
        raise NonFiniteError(f"step {step}: {error}, optim.lr and optim.clip_norm") from error
    if not loss.isfinite():
        raise NonFiniteError(f"step {step}: the loss of finite embeddings is {loss.item()}")
    return loss


def _check_gradient(run: Run, norm: float) -> None:
    """Norm of the gradient averaged over ranks: the same number on all of them."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"step {run.progress.step + 1}: the gradient averaged over all "
            f"{run.backend.world_size} ranks has norm {norm}; lower optim.lr"
        )


def _say(backend: Backend, text: str) -> None:
    if backend.is_main:
        print(text, file=sys.stderr, flush=True)
