"""Generators of random numbers."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Start the generators of Python, NumPy and torch: called with a function of seed, step, rank
    and micro-batch before every micro-batch, so that a checkpoint needs to store none of their
    states, and a micro-batch that is embedded twice is embedded alike."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
