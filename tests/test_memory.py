"""Chunked losses take memory linear in the batch, backward included; dense ones do not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory

SIZES = [2048, 4096]
# One of each kind of reduction; the others differ from one of these in the formula of a pair.
QUICK = ("infonce symmetric", "supcon", "triplet semihard", "koleo", "vicreg", "force drift")
LOSSES = [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in memory.LOSSES]


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_linear(name):
    assert memory.slope(SIZES, memory.in_own_process(name, "chunked", SIZES, 32)) <= 1.15


def test_the_measurement_sees_quadratic_memory():
    assert memory.slope(SIZES, memory.in_own_process("ntxent", "dense", SIZES, 32)) > 1.7


@pytest.mark.slow
def test_memory_of_a_ring_does_not_depend_on_the_world_size():
    two, four = (memory.of_ranks_in_own_process("ring", ranks) for ranks in (2, 4))
    assert four <= 1.15 * two
    assert memory.of_ranks_in_own_process("gather", 4) > 1.25 * four
