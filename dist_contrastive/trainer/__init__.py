"""The training loop: the stream in, checkpoints and metrics out.

    skipped.py      samples that could not be read
    watchdog.py     ends a rank that hangs
    attempts.py     stops a run that never comes further
    start.py        opens a run: its data, its task, the newest checkpoint
    lock.py         one run at a time in a run directory
    saving.py       checkpoints
    self_check.py   the gradient of this run against that of one process
    doctor.py       all that can be looked at before training
    describing.py   what the run is, in its directory
    recording.py    metrics, the ledger, a profile
    profiling.py    of some steps
    step.py         one step

Everything random is a function of (seed, step, rank) or of the sample, so a run is determined by
its config and how far it is. Stopped anywhere and started again, it ends with the same weights.
"""

from dist_contrastive import checkpoint, collectives
from dist_contrastive.backend import Backend
from dist_contrastive.config import RunConfig
from dist_contrastive.data.stream.prefetch import Prefetcher
from dist_contrastive.data.training import DeviceBatch, open_data
from dist_contrastive.errors import LostRankError, NonFiniteError, UserError
from dist_contrastive.signals import stop_flag
from dist_contrastive.trainer.lock import locked
from dist_contrastive.trainer.recording import Recorder
from dist_contrastive.trainer.saving import Saver
from dist_contrastive.trainer.self_check import self_check
from dist_contrastive.trainer.skipped import SkippedLog
from dist_contrastive.trainer.start import Run, start
from dist_contrastive.trainer.step import train_step
from dist_contrastive.trainer.watchdog import Watchdog

EXIT_DONE = 0
EXIT_REQUEUE = 75  # stopped early with everything saved: start it again
# What a rank votes before a step; the largest vote counts.
_GO, _SKIPPED, _STOP, _FAILED = 0, 1, 2, 3
_AHEAD = 2  # batches that are made ready, and copied to a GPU, while one is used


def train(config: RunConfig, stop_after: int | None = None) -> int:
    """Train to config.train.steps, or go on from the newest checkpoint in the run directory.

    Args:
        stop_after: stop after so many steps of this call, as a signal would.

    Returns:
        Exit code: 0 when all steps are done, 75 when stopped before, with everything saved.

    Raises:
        ConfigError: on every rank, before any step.
        DataError: on every rank, before the step whose samples cannot be read; what was done
            before is saved.
        NonFiniteError: NaN or infinity in loss or gradients; no checkpoint is written after it.
        LostRankError: on the ranks that are left, when another one has ended.
        StorageError: on every rank, when the last checkpoint could not be written.
        NoProgressError: on every rank, when it has been started too often without coming further.
        LockedError: on every rank, when another run writes into the run directory.
        ChangedError: on every rank, when another run has written there since this one looked.
    """
    backend = Backend(config.backend)
    try:
        code = _train(config, backend, stop_after)
    except Exception as error:
        if collectives.is_lost_rank(error):
            raise LostRankError("another rank has ended, see there; start again") from error
        if backend.world_size == 1 or isinstance(error, UserError | NonFiniteError):
            backend.close()
        # Otherwise this rank is alone with its error: the others must not lose it before it has
        # told what happened, and that is when the process ends.
        raise
    backend.close()
    return code


def check(config: RunConfig, world_size: int) -> None:
    """Raise what would stop this config from starting on that many ranks."""
    open_data(
        config.data,
        seed=config.seed,
        uses_labels=config.task.uses_labels,
        labels_required=config.task.labels_required,
        world_size=world_size,
    )


def _train(config: RunConfig, backend: Backend, stop_after: int | None) -> int:
    before = checkpoint.folders(config.run_dir / "checkpoints")
    run = start(config, backend)
    steps = config.train.steps
    first = run.progress.step
    stop_at = steps if stop_after is None else min(steps, first + stop_after)
    if first >= steps:
        run.say(f"{config.run_dir} is trained to step {first} already")
        return EXIT_DONE
    if first:
        run.say(f"going on from step {first} of {steps}")
    skipped = SkippedLog(config.run_dir, config.data.max_skipped, backend.is_main)
    with (
        locked(run, before),
        Recorder(run) as recorder,
        stop_flag() as signalled,
        Saver(run) as saver,
        Watchdog(config.backend.timeout_s, backend.rank) as watchdog,
        Prefetcher(run.data.batches(backend.device), _AHEAD) as batches,
    ):
        while run.progress.step < stop_at:
            watchdog.heard()
            taken = _next_batch(run, saver, batches, skipped, signalled)
            if taken is None:
                break
            if config.train.self_check and run.progress.step == first:
                self_check(run)  # now that workers are forked: threads of a backward would be there
            recorder.begin_step(taken.keys)
            step = run.progress.step + 1
            is_logged = step % config.train.log_every == 0 or step == steps
            row = train_step(run, taken.samples, taken.consumed, is_logged)
            if row:
                rates = run.clock.rates(run.progress.consumed, run.engine.reduce_s)
                row = {**row, **rates, **saver.timing(), "skipped": len(skipped)}
                recorder.write(row)
                saver.note(row)
            if step % config.train.save_every == 0 and step < steps:
                saver.save()
        saver.save_last()
    return EXIT_DONE if run.progress.step >= steps else EXIT_REQUEUE


def _next_batch(
    run: Run,
    saver: Saver,
    batches: Prefetcher[DeviceBatch],
    skipped: SkippedLog,
    signalled: list[int],
) -> DeviceBatch | None:
    """The next batch; None on all ranks when one of them was asked to stop, while it waited too.

    A rank that cannot read its part tells the others before any of them enters the step. What has
    been done is saved then, on all ranks.
    """
    taken: DeviceBatch | None = None
    error: Exception | None = None
    try:
        with run.clock.spent("data"):
            taken = batches.get(stop=lambda: bool(signalled))
    except Exception as caught:
        error = caught
    mine = taken.skipped if taken else []
    vote = _FAILED if error else _STOP if taken is None else _SKIPPED if mine else _GO
    verdict = collectives.max_over_ranks(vote, run.backend.device)
    if verdict == _FAILED:
        known = collectives.gather_objects(error is None or isinstance(error, UserError))
        if all(known):  # what is being trained is sound
            saver.save_last()
        with collectives.raised_together():
            if error:
                raise error
    if verdict == _SKIPPED:
        try:
            skipped.add(run.progress.step, mine)
        except UserError:
            saver.save_last()
            raise
    return taken.ready() if taken and verdict < _STOP else None
