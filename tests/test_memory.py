"""Chunked losses take memory linear in the batch, backward included; dense ones do not."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory


@pytest.mark.parametrize("name", memory.LOSSES)
def test_memory_is_linear(name):
    sizes = (2048, 4096)
    peaks = [memory.in_own_process(name, "chunked", size, 32) for size in sizes]
    assert np.log2(peaks[1] / peaks[0]) <= 1.15


def test_the_measurement_sees_quadratic_memory():
    peaks = [memory.in_own_process("ntxent", "dense", size, 32) for size in (2048, 4096)]
    assert np.log2(peaks[1] / peaks[0]) > 1.7
