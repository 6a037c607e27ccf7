"""Trainer: batches of the stream in, checkpoints and metrics out.

    loop.py       the loop: data, step, log, save
    step.py       one step: embed, compare, backward, update
    failures.py   a step left out, or without the memory for it; the plan of a run's loss
    run.py        Run: what is trained, opened from the newest checkpoint
    initial.py    weights that a run starts from
    run_dir.py    files that describe and guard the run directory
    saving.py     checkpoints
    evaluating.py measures of held-out data, every so many steps
    online.py     classes from the features of training batches, at every step
    recording.py  metrics, the ledger, a profile
    checks.py     the gradient against one process; `doctor`
    watchdog.py   ends a rank that hangs

Everything random is a function of (seed, step, rank) or of the sample, so a run is determined by
its config and its progress. Stopped anywhere and started again, it ends with the same weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dist_contrastive import collectives
from dist_contrastive.backend import Backend
from dist_contrastive.config import RunConfig, resolve
from dist_contrastive.errors import LostRankError, MemoryLimitError, NonFiniteError, UserError
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.trainer.checks import check
from dist_contrastive.trainer.loop import EXIT_DONE, EXIT_REQUEUE, run_loop
from dist_contrastive.trainer.run import OwnModules

__all__ = ["EXIT_DONE", "EXIT_REQUEUE", "check", "train"]


def train(
    config: RunConfig | Mapping[str, Any] | Path | str,
    stop_after: int | None = None,
    *,
    overrides: Sequence[str] = (),
    model: nn.Module | None = None,
    loss: PairLoss | None = None,
    change: bool = False,
) -> int:
    """Train to config.train.steps, or go on from the newest checkpoint in the run directory.

    Called on each rank of torchrun, or in one process.

    Args:
        config: YAML file, settings as a dict, or a checked config.
        stop_after: stop after so many steps of this call, as a signal would.
        overrides: ``key=value`` settings to change.
        model: encoder in the place of ``task.encoder``, a module from images [b, C, H, W] to [b,
            D]. It is trained itself; all ranks start from the weights of the first one.
        loss: in the place of ``task.loss``.
        change: the run in the directory may go on with another number of steps, learning rate,
            schedule, precision or lanes; it is recorded there, in changes.jsonl.

    Returns:
        Exit code: 0 when all steps are done, 75 when stopped before, with everything saved.

    Raises:
        ConfigError: on every rank, before any step.
        DataError: on every rank, before the step whose samples cannot be read; what was done
            before is saved.
        NonFiniteError: NaN or infinity in loss or gradients; no checkpoint is written after it.
        MemoryLimitError: on a rank that has not the memory for a step; it names what needs less.
        LostRankError: on the ranks that are left, when another one has ended.
        StorageError: on every rank, when the last checkpoint could not be written.
        NoProgressError: on every rank, when it has been started too often without coming further.
        LockedError: on every rank, when another run writes into the run directory.
        ChangedError: on every rank, when another run has written there since this one looked.
    """
    checked, modules = resolve(config, overrides), OwnModules(model, loss)
    backend = Backend(checked.backend)
    try:
        code = run_loop(checked, backend, modules, stop_after, change)
    except Exception as error:
        if collectives.is_lost_rank(error):
            raise LostRankError("another rank has ended, see there; start again") from error
        of_all = isinstance(error, UserError | NonFiniteError)
        if backend.world_size == 1 or (of_all and not isinstance(error, MemoryLimitError)):
            backend.close()
        # Otherwise this rank is alone with its error: the others must not lose it before it has
        # reported it, and that is when the process ends.
        raise
    backend.close()
    return code
