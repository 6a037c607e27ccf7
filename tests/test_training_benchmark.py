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
    """Hardly a page is mapped in a step, for little memory."""
    argv = [sys.executable, BENCHMARK, "--tables", "freed", "--turns", "1"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600).stdout
    lines = [[cell.strip() for cell in line.split("|")] for line in told.splitlines()]
    found = {(x[1], x[2]): [float(cell) for cell in x[3:-1]] for x in lines[3:] if len(x) == 8}
    for network in ("vit", "residual"):
        pages = (found[network, how][2] for how in ("kept", "given back"))
        assert next(pages) < 0.1 * next(pages)
        assert found[network, "ratio"][3] < 1.5


@pytest.mark.slow
def test_memory_of_steps():
    argv = [sys.executable, BENCHMARK, "--tables", "memory", "--rows", "1024"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600).stdout
    rows = [line.split() for line in told.splitlines() if re.match(r" +\d", line)]
    few, plain, cached, more = (float(row[2]) for row in rows)
    assert plain > 4 * few
    assert cached < 1.5 * few
    assert more < 1.5 * few
