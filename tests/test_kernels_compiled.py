"""Triton kernels compiled for cards that are not there, and their machine code read."""

import re
import sys
from pathlib import Path

import pytest
import triton

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import static

from dist_contrastive.pairwise import kernels
from dist_contrastive.pairwise.kernel_calls import kernel_of

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
    if dtype in static.VARIANTS[name].dtypes
]


# What follows the product, in parts of its cycles on sm_90 in bf16 at 768 dimensions, at the most:
# All have two blocks on an SM, of which one computes while the other multiplies.
LIMITS = {
    "InfoNCE, symmetric": 0.22,
    "InfoNCE, symmetric, gradient": 0.2,
    "InfoNCE, gradient": 0.2,
    "NT-Xent, gradient": 0.2,
    "SupCon": 0.35,
    "any range, gradient": 0.35,
    "DCL, gradient": 0.35,
    "SupCon, gradient": 0.35,
    "any range, masks": 0.4,
    "any range, masks, gradient": 0.6,  # exponentials of both, where one does not serve
    "InfoNCE, masks": 0.3,
    "InfoNCE, symmetric, ids": 0.28,
    "InfoNCE, symmetric, masks": 0.45,
    "InfoNCE, masks, gradient": 0.37,
    "InfoNCE, symmetric, ids, gradient": 0.35,
    "InfoNCE, symmetric, masks, gradient": 0.48,
    "SigLIP, ids": 0.45,
    "SigLIP, ids, value and gradient": 0.55,  # ids take three instructions a pair
    "SigLIP": 0.42,
    "SigLIP, value and gradient": 0.5,
    "SigLIP, gradient": 0.35,
    "cosine embedding": 0.42,
    "cosine embedding, value and gradient": 0.5,
    "SupCon, continuous": 0.4,
    "SupCon, gradient, continuous": 0.5,
    "cosine embedding, value and gradient, continuous": 0.55,  # labels are fp64
}


@pytest.mark.parametrize(("name", "card", "dtype"), COMPILED)
def test_compiled_for_cards(name, card, dtype):
    """No register is spilled, products are those of tensor cores, sums are made by no atomics, and
    offsets are of 64 bits before they are multiplied by anything."""
    variant = static.VARIANTS[name]
    report = static.compiled(variant, card, dtype=dtype)
    assert report.spilled == 0
    assert report.tensor > 0
    assert report.blocks >= 1
    assert not re.search(r"\b(atom|red)\.\S*add\S*\.(f|bf)\d+", report.ptx)
    assert re.search(r"arith\.muli .*tensor<\S*xi64>", report.ttir)
    assert not re.search(r"arith\.muli .*tensor<\S*xi32>", report.ttir)
    if dtype == "fp32":
        assert "inputPrecision = tf32x3" in report.ttir
    if (card, dtype) == (90, "bf16"):
        tile = variant.tile(dtype, card)
        product = 2 * tile.rows * tile.keys * 768 / static.CARDS[card].bf16
        assert report.epilogue() <= LIMITS.get(name, 0.25) * product
        assert report.blocks >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(QUICK))
def test_compiled_for_fp16(name):
    report = static.compiled(static.VARIANTS[name], 90, dtype="fp16")
    assert report.spilled == 0
    assert ".f32.f16.f16" in report.ptx  # with fp32 sums


KERNELS = ["lse", "running_lse", "lse_gradient", "pair", "cosine", "unit_gradient", "add_product"]


@pytest.mark.parametrize("name", KERNELS)
def test_ragged_sizes_are_one_kernel(name):
    """Numbers that change with the batch are not compiled in, and nothing is chosen by timing."""
    kernel = kernel_of(name)
    assert type(kernel) is triton.JITFunction
    pointers = {arg for arg in kernel.arg_names if arg.isupper() and len(arg) > 1} | set("XYG")
    for parameter in kernel.params:
        if parameter.is_constexpr or parameter.name in pointers:
            continue
        # Lines are filled up to multiples of 16, which the compiler is to know.
        assert parameter.do_not_specialize == (parameter.name != "stride"), parameter.name


def test_products_name_their_precision():
    """The default is a single product in TF32."""
    for path in Path(kernels.__file__).parent.glob("*kernels.py"):
        for call in re.findall(r"tl\.dot\(.*", path.read_text()):
            assert "input_precision=" in call
