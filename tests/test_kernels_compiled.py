"""Triton kernels compiled for cards that are not there, and their machine code read."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import static

QUICK = {
    *("InfoNCE, symmetric", "InfoNCE, symmetric, gradient"),
    *("SigLIP", "SigLIP, value and gradient"),
}
COMPILED = [
    pytest.param(
        *(name, card, dtype),
        id=f"{name}, sm_{card}, {dtype}",
        marks=[] if name in QUICK and (card, dtype) == (90, "bf16") else pytest.mark.slow,
    )
    for name in static.VARIANTS
    for card in static.CARDS
    for dtype in ("bf16", "fp32")
]


@pytest.mark.parametrize(("name", "card", "dtype"), COMPILED)
def test_compiled_for_cards(name, card, dtype):
    """No register is spilled, products are those of tensor cores, sums are made by no atomics."""
    report = static.compiled(static.VARIANTS[name], card, dtype=dtype)
    assert report.spilled == 0
    assert report.tensor > 0
    assert report.blocks >= 1
    assert not re.search(r"\b(atom|red)\.\S*add\S*\.(f|bf)\d+", report.ptx)
    if dtype == "fp32":
        assert "inputPrecision = tf32x3" in report.ttir
