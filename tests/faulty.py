"""Faults for real runs: a reward function whose module makes one rank fail at a step.

FAULT=KIND:RANK:STEP in the environment, or KIND:RANK:STEP:FILE for a fault that happens once, when
FILE is not there; the config names ``task.reward.function=faulty:reward``.
"""

import os
import signal
import time
from pathlib import Path

import torch

from dist_contrastive.losses.rewards import depth_credit as reward  # noqa: F401
from dist_contrastive.trainer import loop

_kind, _rank, _step, *_once = os.environ["FAULT"].split(":")
_train_step = loop.train_step


def _is_due():
    if not _once:
        return True
    is_due = not Path(_once[0]).exists()
    Path(_once[0]).touch()
    return is_due


def _faulty_step(run, samples, *rest):
    if run.backend.rank == int(_rank) and run.progress.step == int(_step) and _is_due():
        match _kind:
            case "raise":
                raise KeyError("a bug of the model")
            case "hang":
                while True:  # somewhere in a network, out of reach of others
                    time.sleep(0.1)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "nan":
                samples.images.fill_(torch.nan)
            case "nan_weights":
                with torch.no_grad():
                    next(run.task.parameters()).fill_(torch.nan)
    return _train_step(run, samples, *rest)


loop.train_step = _faulty_step
