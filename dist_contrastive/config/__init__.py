"""The config of a run: composed from the settings of its parts; nothing below imports it.

    task.py       what the settings of all tasks share
    tasks.py      what is trained by which objective
    drift.py      the task of one-step generators
    run.py        the whole, and what a resumed run may change
    files.py      YAML files and key=value overrides

Precedence: defaults < YAML file < ``key=value`` overrides. Unknown names are refused.
"""

from dist_contrastive.config.files import load, load_run, resolve, save
from dist_contrastive.config.run import KeepBestSettings, RunConfig, TrainSettings, differences
from dist_contrastive.config.tasks import (
    DriftSettings,
    HybridSettings,
    LabelledSettings,
    MocoSettings,
    PairedSettings,
    TaskSettings,
    TwoViewSettings,
)
from dist_contrastive.errors import retired

__all__ = [
    "DriftSettings",
    "HybridSettings",
    "KeepBestSettings",
    "LabelledSettings",
    "MocoSettings",
    "PairedSettings",
    "RunConfig",
    "TaskSettings",
    "TrainSettings",
    "TwoViewSettings",
    "differences",
    "load",
    "load_run",
    "resolve",
    "save",
]

__getattr__ = retired(
    __name__,
    {
        "BalanceSettings": "dist_contrastive.data.Balance.Config",
        "DataSettings": "dist_contrastive.data.DataConfig",
    },
)
