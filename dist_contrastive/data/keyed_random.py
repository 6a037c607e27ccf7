"""Random numbers as a pure function of integer keys.

A generator object gives numbers that depend on how many were drawn before, so on ranks, workers
and batch sizes. Here each row has a key, and its numbers depend on nothing else: the same key
gives the same bits in any batch, in any process, before or after a resume.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators"), used as a counter-based generator. Not for cryptography.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as a signed integer
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def combine(*parts: int | Tensor) -> Tensor:
    """One key from an ordered list of integers, as (seed, epoch, index, stream).

    Args:
        parts: Python integers (64 bits count) or int64 tensors that broadcast together. Order
            matters: combine(1, 2) and combine(2, 1) are unrelated.
    Returns:
        int64 keys of the broadcast shape, on the device of the tensors (CPU without any).
    """
    devices = {part.device for part in parts if isinstance(part, Tensor)}
    device = devices.pop() if devices else torch.device("cpu")
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        if not isinstance(part, Tensor):
            part = torch.full((), _signed(part), dtype=torch.int64, device=device)
        key = _finalise((key ^ _finalise(part.to(torch.int64) + _GOLDEN)) + _GOLDEN)
    return key


def uniform(keys: Tensor, count: int) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        keys: int64 [b].
        count: how many for each key.
    Returns:
        float32 [b, count]; multiples of 2^-24, so that neither 0 nor 1 occurs.
    """
    return ((_bits(keys, count) >> 41) & (2**23 - 1)).float().add(0.5).mul(2.0**-23)


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers by the Box-Muller transform.

    Args:
        keys: int64 [b].
        count: how many for each key.
    Returns:
        float32 [b, count].
    """
    bits = _bits(keys, 2 * ((count + 1) // 2))
    unit = ((bits >> 12) & (2**52 - 1)).double().add(0.5).mul(2.0**-52)  # (0, 1), far tails too
    radius_from, angle_from = unit.chunk(2, dim=1)
    radius, angle = (-2 * radius_from.log()).sqrt(), 2 * math.pi * angle_from
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :count].float()


def keyed_permutation(length: int, seed: int, *key: int) -> NDArray[np.int64]:
    """Permutation of range(length) that depends on `seed` and `key` alone.

    It sorts raw Philox words instead of calling `Generator.permutation`: NumPy keeps the raw
    stream fixed over versions, but not the algorithms above it, and a run may be resumed with
    another version.
    """
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=key)
    words = np.random.Philox(sequence).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int64)


def keyed_number(below: int, seed: int, *key: int) -> int:
    """A whole number in [0, below) that depends on `seed` and `key` alone, nearly uniform."""
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=key)
    return int(np.random.Philox(sequence).random_raw(1)[0]) % below


def _bits(keys: Tensor, count: int) -> Tensor:
    """64 random bits [b, count]: the hash of each key's own counter."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    return _finalise(_finalise(keys)[:, None] + _GOLDEN * counter)


def _finalise(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 to int64, one to one; products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The unsigned shift, which torch has not: shift with sign, then clear the copies of it."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    """The 64-bit two's complement reading of an integer of any size."""
    return (value + 2**63) % 2**64 - 2**63
