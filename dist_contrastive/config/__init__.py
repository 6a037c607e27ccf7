"""The config of a run: composed from the settings of its parts; nothing below imports it.

    run.py        the whole, and what a resumed run may change
    files.py      YAML files and key=value overrides
    reference.py  every setting with its type, default, limits and help

Precedence: defaults < YAML file < ``key=value`` overrides. Unknown names are refused.
"""

from dist_contrastive.config.files import (
    absolute,
    load,
    load_recorded,
    load_run,
    place,
    public,
    resolve,
    save,
)
from dist_contrastive.config.run import (
    CHANGEABLE,
    KeepBestSettings,
    RunConfig,
    TrainSettings,
    changed,
    differences,
)
from dist_contrastive.errors import retired

__all__ = [
    "CHANGEABLE",
    "KeepBestSettings",
    "RunConfig",
    "TrainSettings",
    "absolute",
    "changed",
    "differences",
    "load",
    "load_recorded",
    "load_run",
    "place",
    "public",
    "resolve",
    "save",
]

__getattr__ = retired(
    __name__,
    {
        "BalanceSettings": "dist_contrastive.data.Balance.Config",
        "DataSettings": "dist_contrastive.data.DataConfig",
        "DriftSettings": "dist_contrastive.tasks.Drift.Config",
        "HybridSettings": "dist_contrastive.tasks.Hybrid.Config",
        "LabelledSettings": "dist_contrastive.tasks.Labelled.Config",
        "MocoSettings": "dist_contrastive.tasks.Moco.Config",
        "PairedSettings": "dist_contrastive.tasks.Paired.Config",
        "TaskSettings": "dist_contrastive.tasks.AnyTask",
        "TwoViewSettings": "dist_contrastive.tasks.TwoView.Config",
    },
)
