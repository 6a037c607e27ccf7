"""Where and how a run computes: the only part that knows Accelerate and DeepSpeed.

settings.py           device, precision, engine
accelerate_launch.py  flags of accelerate launch that the config has already
process.py            Backend: this process, alone or one of the ranks
engine.py             Engine: what the trainer asks of any engine
replicated.py         every rank holds all of the model: one process, or DDP
zero.py               DeepSpeed ZeRO 1, 2, 3: ranks share optimiser, gradients, weights
zero_setup.py         an Accelerator that makes such engines
recompute.py          activation checkpointing
optimizer_state.py    what an optimiser remembers, by the names of parameters
trackers.py           TensorBoard, Weights & Biases, Trackio
seeds.py              generators of random numbers, started before every part of a step
"""

from dist_contrastive.backend.engine import Engine, Step
from dist_contrastive.backend.process import Backend
from dist_contrastive.backend.seeds import seed_everything
from dist_contrastive.backend.settings import BackendSettings
from dist_contrastive.backend.trackers import TrackerName, Trackers

__all__ = [
    "Backend",
    "BackendSettings",
    "Engine",
    "Step",
    "TrackerName",
    "Trackers",
    "seed_everything",
]
