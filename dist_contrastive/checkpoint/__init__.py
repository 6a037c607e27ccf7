"""Checkpoints: written aside, with checksums, published by one rename, checked when they are read.

    content.py     what one holds
    writing.py     one more on disk
    choosing.py    which is gone on with, and which are kept

    checkpoints/step-00000200/model.safetensors    weights of the task
                              training.pt          state of the optimiser (loaded weights-only)
                              state.json           how far the run was, checksums; written last

A folder named step-* is complete. A crash leaves one with another name, which the next save sweeps.
"""

from dist_contrastive.checkpoint.choosing import Keep, best, folders, newest
from dist_contrastive.checkpoint.content import WEIGHTS, Checkpoint, Progress
from dist_contrastive.checkpoint.writing import flush, save, write_weights

__all__ = [
    "WEIGHTS",
    "Checkpoint",
    "Keep",
    "Progress",
    "best",
    "flush",
    "folders",
    "newest",
    "save",
    "write_weights",
]
