"""The force's Triton kernels compiled for cards that are not there, and their machine code read."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import static_force

QUICK_KERNELS = {"distances", "sums of A", "weights"}
COMPILED = [
    pytest.param(
        *(name, card),
        id=f"{name}, sm_{card}",
        marks=[] if name in QUICK_KERNELS and card == 90 else pytest.mark.slow,
    )
    for name in static_force.VARIANTS
    for card in static_force.CARDS
]


@pytest.mark.parametrize(("name", "card"), COMPILED)
def test_compiled_for_cards(name, card):
    """No register is spilled, products are three of TF32 by tensor cores, sums are made by no
    atomics."""
    report = static_force.compiled(static_force.VARIANTS[name], card)
    assert report.spilled == 0
    assert report.blocks >= 1
    assert not re.search(r"\b(atom|red)\.\S*add\S*\.(f|bf)\d+", report.ptx)
    if name.startswith(("distances", "product")):
        assert report.tensor > 0
        assert "inputPrecision = tf32x3" in report.ttir
