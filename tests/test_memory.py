"""Chunked losses take memory linear in the batch, backward included; dense ones do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
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


STEPS = """
import resource, sys, torch
from dist_contrastive.malloc import keep_freed_memory
is_kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for step in range(6):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**20 * (number + 1)) for number in range(12)]
    del blocks
print(is_kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


@pytest.mark.parametrize(
    ("how", "variable", "is_kept"),
    [
        ("keep", "GLIBC_TUNABLES=glibc.pthread.rseq=1", True),  # of something else
        pytest.param("leave", None, False, marks=pytest.mark.slow),
        # The user has said what shall be.
        pytest.param("keep", "MALLOC_MMAP_MAX_=65536", False, marks=pytest.mark.slow),
        ("keep", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=131072", False),
    ],
)
def test_freed_blocks_are_used_again(how, variable, is_kept):
    """312 MiB a step are 80,000 pages, which the kernel has to map where they were given back."""
    env = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    if variable is not None:
        name, _, value = variable.partition("=")
        env[name] = value
    argv = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=240, env=env)
    kept, pages = done.stdout.split()
    assert kept == str(is_kept)
    assert (int(pages) < 20_000) == is_kept
