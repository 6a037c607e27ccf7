"""The training loop: the stream in, checkpoints and metrics out.

    data.py     what a run reads
    start.py    opens a run: its data, its task, the newest checkpoint
    step.py     one step

Everything random is a function of (seed, step, rank) or of the sample, so a run is determined by
its config and how far it is. Stopped anywhere and started again, it ends with the same weights.
"""

import sys
from collections.abc import Iterator
from contextlib import closing

from dist_contrastive import checkpoint, collectives
from dist_contrastive.backend import Backend
from dist_contrastive.checkpoint import Progress
from dist_contrastive.config import RunConfig
from dist_contrastive.data.collate import Batch
from dist_contrastive.data.fields import Samples
from dist_contrastive.metrics import Clock, Ledger, MetricsLog
from dist_contrastive.signals import stop_flag
from dist_contrastive.trainer.data import open_data
from dist_contrastive.trainer.start import Run, start
from dist_contrastive.trainer.step import train_step

EXIT_DONE = 0
EXIT_REQUEUE = 75  # stopped early with everything saved: start it again
_GO, _STOP, _FAILED = 0, 1, 2  # what a rank votes before a step; the largest vote counts


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
    open_data(config, Progress(), 0, world_size)


def _train(config: RunConfig, backend: Backend, stop_after: int | None) -> int:
    run = start(config, backend)
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
        closing(iter(run.data.stream)) as batches,
    ):
        while run.progress.step < stop_at:
            found = _next_samples(run, batches, clock, bool(signalled))
            if found is None:
                break
            keys, samples = found
            ledger.write(run.progress.step, keys)
            step = run.progress.step + 1
            is_logged = step % config.train.log_every == 0 or step == steps
            row = train_step(run, samples, is_logged)
            if is_logged:
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
        found = batch["__key__"], run.data.samples(batch).to(run.backend.device)
    except Exception as caught:
        error = caught
    vote = _FAILED if error else _STOP if stop else _GO
    verdict = collectives.max_over_ranks(vote, run.backend.device)
    if verdict == _FAILED:
        with collectives.raised_together():
            if error:
                raise error
    return found if verdict == _GO else None


def _save(run: Run) -> None:
    with collectives.raised_together():
        if run.backend.is_main:
            weights, state = run.task.state_dict(), run.optimizer.state_dict()
            root, keep_last = run.config.run_dir / "checkpoints", run.config.train.keep_last
            checkpoint.save(root, run.progress, weights, state, keep_last)


def _say(backend: Backend, text: str) -> None:
    if backend.is_main:
        print(text, file=sys.stderr, flush=True)
