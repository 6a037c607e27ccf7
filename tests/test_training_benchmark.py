"""The benchmark of steps runs, and finds what it should of caching and of the trainer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "training.py"


@pytest.mark.slow
def test_cost_of_caching_and_of_the_trainer():
    argv = [sys.executable, BENCHMARK, "--tables", "cached", "overhead", "--turns", "1"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600).stdout
    cached, overhead = (float(found) for found in re.findall(r"s: ([\d.]+) times", told))
    assert 0.7 < cached < 2  # one turn, whose plain step is cold; the machine may have other work
    assert 0.7 < overhead < 1.5


@pytest.mark.slow
def test_freed_memory_that_is_kept():
    """Less time in the kernel, for little memory."""
    argv = [sys.executable, BENCHMARK, "--tables", "freed", "--turns", "1"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600).stdout
    for network in ("vit", "residual"):
        rows = [
            [x.strip() for x in row.split("|")[2:-1]] for row in told.splitlines() if network in row
        ]
        found = {row[0]: row[1:] for row in rows}
        assert float(found["kept"][1]) <= float(found["given back"][1])
        assert float(found["ratio"][2]) < 1.5


@pytest.mark.slow
def test_memory_of_steps():
    argv = [sys.executable, BENCHMARK, "--tables", "memory", "--rows", "1024"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600).stdout
    rows = [line.split() for line in told.splitlines() if re.match(r" +\d", line)]
    few, plain, cached, more = (float(row[2]) for row in rows)
    assert plain > 4 * few
    assert cached < 1.5 * few
    assert more < 1.5 * few
