"""Backend: where and how a run computes; the only part that knows Accelerate and DeepSpeed.

process.py     Backend: this process, alone or one of the ranks
engine.py      Engine: interface of any engine; optimizer state, activation checkpointing
replicated.py  engine that holds the whole model on every rank: one process, or DDP
zero.py        engine of DeepSpeed ZeRO 1, 2, 3: ranks share optimizer state, gradients, weights
trackers.py    TensorBoard, Weights & Biases, Trackio
"""

from dist_contrastive.backend.engine import Engine, Step
from dist_contrastive.backend.process import Backend, compute_device
from dist_contrastive.backend.trackers import TrackerName, Trackers
from dist_contrastive.errors import retired
from dist_contrastive.random_states import seed_everything

__all__ = [
    "Backend",
    "Engine",
    "Step",
    "TrackerName",
    "Trackers",
    "compute_device",
    "seed_everything",
]

__getattr__ = retired(__name__, {"BackendSettings": "dist_contrastive.backend.Backend.Config"})
