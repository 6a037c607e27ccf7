"""Training loop: data, step, log, save."""

from dist_contrastive import checkpoint, collectives
from dist_contrastive.backend import Backend
from dist_contrastive.changes import changes_text
from dist_contrastive.config import RunConfig
from dist_contrastive.data.stream.shard_stream import Prefetcher
from dist_contrastive.data.training import DeviceBatch
from dist_contrastive.errors import EXIT_RESTART, UserError
from dist_contrastive.optim import learning_rate
from dist_contrastive.signals import stop_flag
from dist_contrastive.trainer.checks import self_check
from dist_contrastive.trainer.evaluating import Evaluator
from dist_contrastive.trainer.recording import Recorder
from dist_contrastive.trainer.run import OwnModules, Run, open_run
from dist_contrastive.trainer.run_dir import SkippedLog, locked
from dist_contrastive.trainer.saving import Saver
from dist_contrastive.trainer.step import train_step
from dist_contrastive.trainer.watchdog import Watchdog

EXIT_DONE = 0
EXIT_REQUEUE = EXIT_RESTART  # stopped early with everything saved
_PREFETCHED = 2  # batches that are made ready, and copied to a GPU, while one is used
_GO, _SKIPPED, _STOP, _FAILED = 0, 1, 2, 3  # votes of a rank before a step; the largest one counts


def run_loop(
    config: RunConfig,
    backend: Backend,
    modules: OwnModules,
    stop_after: int | None,
    change: bool = False,
) -> int:
    """Train from the newest checkpoint to the last step, or to `stop_after` steps from here.

    Returns:
        EXIT_DONE or EXIT_REQUEUE.
    """
    checkpoints_before = checkpoint.folders(config.run_dir / "checkpoints")
    run = open_run(config, backend, modules, change)
    steps, first = config.train.steps, run.progress.step
    stop_at = steps if stop_after is None else min(steps, first + stop_after)
    if first >= steps:
        run.info(f"{config.run_dir} is trained to step {first} already{run.next_commands()}")
        return EXIT_DONE
    _tell_start(run)
    skipped = SkippedLog.open(config.run_dir, config.data.max_skipped, backend.is_main)
    with (
        locked(config.run_dir, backend.is_main, checkpoints_before),
        Recorder.open(run) as recorder,
        stop_flag() as signals,
        Saver(run) as saver,
        Watchdog(config.backend.timeout_s, backend.rank) as watchdog,
        Prefetcher(run.data.batches(backend.device), _PREFETCHED) as batches,
    ):
        evaluator = Evaluator(run, watchdog.heartbeat)
        while run.progress.step < stop_at:
            watchdog.heartbeat()
            batch = _next_batch(run, batches, signals, saver, skipped)
            if batch is None:
                break
            if config.train.self_check and run.progress.step == first:
                self_check(run)  # after workers are forked: its backward pass starts threads

            step = run.progress.step + 1
            is_evaluated = evaluator.is_due(step)
            is_logged = step % config.train.log_every == 0 or step == steps or is_evaluated
            is_shown = is_logged or step == first + 1  # so that a wait has an end
            recorder.begin_step(batch.keys)
            row = train_step(run, batch.samples, batch.consumed, is_shown)

            if row:
                rates = run.clock.rates(run.progress.consumed, run.engine.reduce_s)
                row = {**row, **run.online.numbers(), **rates, **saver.timing()}
                row["skipped"] = len(skipped)
                row |= evaluator.measure() if is_evaluated else {}
                recorder.show(row)
                skipped.report()
            if row and is_logged:
                recorder.write(row, evaluator.take_pictures())
                saver.observe(row)

            if step % config.train.save_every == 0 and step < steps:
                saver.save()
        saver.save_last()
    skipped.report()
    return _end(run)


def _tell_start(run: Run) -> None:
    config, first = run.config, run.progress.step
    if first:
        run.info(f"going on from step {first} of {config.train.steps}")
    if run.changes:
        lr = learning_rate(first, config.train.steps, config.optim, config.data.global_batch_size)
        run.info(
            f"changed from step {first} on: {changes_text(run.changes)}; the learning rate goes on "
            f"at {lr:.3g}"
        )


def _end(run: Run) -> int:
    """Exit code of a run, which is told of with what to do next."""
    step, steps = run.progress.step, run.config.train.steps
    if step < steps:
        run.info(f"saved at step {step} of {steps}; the same command goes on from there")
        return EXIT_REQUEUE
    run.info(f"done: {steps} steps{run.next_commands()}")
    return EXIT_DONE


def _next_batch(
    run: Run,
    batches: Prefetcher[DeviceBatch],
    signals: list[int],
    saver: Saver,
    skipped: SkippedLog,
) -> DeviceBatch | None:
    """Next batch; None on all ranks when one of them was asked to stop, while it waited too.

    A rank that cannot read its part tells the others before any of them enters the step. What has
    been done is saved then, on all ranks.

    Collectives: a maximum over ranks; gathers of objects where a rank failed or skipped samples.
    """
    batch: DeviceBatch | None = None
    error: Exception | None = None
    try:
        with run.clock.spent("data"):
            batch = batches.get(stop=lambda: bool(signals))
    except Exception as caught:
        error = caught
    local_skipped = batch.skipped if batch else []
    vote = _FAILED if error else _STOP if batch is None else _SKIPPED if local_skipped else _GO
    verdict = collectives.max_over_ranks(vote)
    if verdict == _FAILED:
        expected = collectives.gather_objects(error is None or isinstance(error, UserError))
        if all(expected):  # what is being trained is sound
            saver.save_last()
        with collectives.raised_together():
            if error:
                raise error
    if verdict == _SKIPPED:
        try:
            skipped.add(run.progress.step, local_skipped)
        except UserError:
            skipped.report()
            saver.save_last()
            raise
    return batch.ready() if batch and verdict < _STOP else None
