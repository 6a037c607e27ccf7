"""Triton kernels: tiles of scores that are reduced where they are computed, and their gradients.

    pair_sum_kernel       sums over keys of a function of the pair
    pair_gradient_kernel  gradient of the scores, from the function's derivative

and what all kernels share; those of log-sum-exps are in lse_kernels.py.

Scores are fp32 and never reach memory; gradients of the scores of some rows do, in the dtype of the
operands, for the two products that follow. A pair is known by integers alone: `ids` are equal where
row and key are similar, and row i's own key is key ``own + i`` of the block. No sum is made by
atomics, so results do not depend on which program ends first.

Shapes: X [M, D] and Y [N, D] rows and keys, contiguous; *_FACTORS multiply them (HAS_FACTORS), so
that rows in half precision need not be rounded again to have unit length. BM x BN is the tile, BK
the dimensions of one step of its product. Tensors of a single number stay on the device.
"""

import os

import triton
import triton.language as tl

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Ids beyond the last row and key: never equal.
_NO_ROW, _NO_KEY = tl.constexpr(-3), tl.constexpr(-2)

# Batches differ in these from step to step; a kernel for each would be compiled again and again.
SIZES = ["M", "N", "own"]


@triton.jit
def tile_scores(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    row,
    key,
    M,
    N,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Scores of rows and keys by their numbers, times UNIT: fp32; 0 beyond the last of them."""
    dim = tl.arange(0, BK)
    # 64-bit before the product: 2^31 elements are 2,097,152 rows of 1,024 dimensions.
    x_at = X + row[:, None].to(tl.int64) * D + dim[None, :]
    y_at = Y + key[:, None].to(tl.int64) * D + dim[None, :]
    is_row, is_key = (row < M)[:, None], (key < N)[:, None]
    scores = tl.zeros([row.shape[0], key.shape[0]], tl.float32)
    for first in range(0, D, BK):
        if D % BK == 0:
            x = tl.load(x_at + first, mask=is_row, other=0.0)
            y = tl.load(y_at + first, mask=is_key, other=0.0)
        else:
            is_dim = (dim < D - first)[None, :]
            x = tl.load(x_at + first, mask=is_row & is_dim, other=0.0)
            y = tl.load(y_at + first, mask=is_key & is_dim, other=0.0)
        if _IS_INTERPRETED:  # it has no products of bf16; those in fp32 are the same, being exact
            x, y = x.to(tl.float32), y.to(tl.float32)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
    if not HAS_FACTORS:
        return scores * UNIT
    row_factor = tl.load(ROW_FACTORS + row, mask=row < M, other=0.0) * UNIT
    key_factor = tl.load(KEY_FACTORS + key, mask=key < N, other=0.0)
    return scores * row_factor[:, None] * key_factor[None, :]


@triton.jit
def similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N):
    """Which pairs are similar, own pairs among them; none beyond the last row or key."""
    row_id = tl.load(ROW_IDS + row, mask=row < M, other=_NO_ROW)
    key_id = tl.load(KEY_IDS + key, mask=key < N, other=_NO_KEY)
    return row_id[:, None] == key_id[None, :]


@triton.jit
def holds_own(first_row, first_key, own, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has pairs of a row and its own key; most have none, and skip their masks."""
    return (first_row + own < first_key + BN) & (first_key < first_row + own + BM)


@triton.jit
def tile_of_program(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and key of the program's tile; GROUP blocks of rows share keys in the cache."""
    program, num_rows, num_keys = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = program // (GROUP * num_keys)
    size = tl.minimum(num_rows - group * GROUP, GROUP)
    place = program % (GROUP * num_keys)
    return (group * GROUP + place % size) * BM, place // size * BN


@triton.jit
def store_gradient(G, grad, row, key, M, stride):
    """Gradient of a tile of scores into the first keys of G [M, stride], in its dtype.

    What lies beyond them is written too: of a stride that is a multiple of 16 the compiler knows
    that eight numbers at a time are inside.
    """
    at = G + row[:, None].to(tl.int64) * stride + key[None, :]
    is_inside = (row < M)[:, None] & (key < stride)[None, :]
    tl.store(at, grad.to(G.dtype.element_ty), mask=is_inside)


@triton.jit
def _reciprocal(x):
    """``1 / x``, with an error of one unit of the last digit."""
    if _IS_INTERPRETED:
        return 1.0 / x
    # One instruction; the division of the language takes eight, and registers that spill.
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _log1p(x):
    """``log(1 + x)`` of x from 0 to 1; a short series where the sum would lose the digits of x."""
    if _IS_INTERPRETED:
        log2 = tl.log2(1.0 + x)
    else:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + x], dtype=tl.float32, is_pure=True, pack=1
        )
    series = x * (1.0 - x * (0.5 - x * (0.33333334 - x * 0.25)))
    return tl.where(x < 0.03125, series, log2 * LN2)


@triton.jit
def softplus(scores, similar, parameter):
    """``log(1 + e^score)`` and its derivative: a pair that should not belong together."""
    e = tl.exp2(-tl.abs(scores) * LOG2E)
    sigmoid = tl.where(scores > 0, 1.0, e) * _reciprocal(1.0 + e)
    return tl.maximum(scores, 0.0) + _log1p(e), sigmoid


@triton.jit
def cosine_embedding(scores, similar, parameter):
    """``1 - score`` of similar pairs, ``max(0, score - margin)`` of others; their derivatives."""
    apart = scores - parameter
    value = tl.where(similar, 1.0 - scores, tl.maximum(apart, 0.0))
    return value, tl.where(similar, -1.0, tl.where(apart > 0, 1.0, 0.0))


@triton.jit(do_not_specialize=[*SIZES, "parameter"])
def pair_sum_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    BIAS,
    ROW_SUMS,
    M,
    N,
    own,
    parameter,
    D: tl.constexpr,
    EXPRESSION: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums over keys of EXPRESSION's value, own pairs left out: ROW_SUMS [parts, M].

    Program (i, s) takes rows i BM ... and the s-th part of the keys.
    """
    first_row, part = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    num_blocks = tl.cdiv(N, BN)
    in_part = tl.cdiv(num_blocks, tl.num_programs(1))
    total = tl.zeros([BM], tl.float32)
    for block in range(part * in_part, tl.minimum((part + 1) * in_part, num_blocks)):
        first_key = block * BN
        key = first_key + tl.arange(0, BN)
        scores = tile_scores(
            X, Y, ROW_FACTORS, KEY_FACTORS, row, key, M, N, 1.0, D, HAS_FACTORS, PRECISION, BK
        )
        if HAS_BIAS:
            scores += tl.load(BIAS)
        similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N) if HAS_IDS else None
        value, _ = EXPRESSION(scores, similar, parameter)
        if holds_own(first_row, first_key, own, BM, BN) | (first_key + BN > N):
            counts = (key < N)[None, :] & ((row + own)[:, None] != key[None, :])
            value = tl.where(counts, value, 0.0)
        total += tl.sum(value, 1)
    tl.store(ROW_SUMS + part.to(tl.int64) * M + row, total, mask=row < M)


@triton.jit(do_not_specialize=[*SIZES, "parameter"])
def pair_gradient_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    BIAS,
    WEIGHTS,
    G,
    BIAS_G,
    M,
    N,
    own,
    stride,
    parameter,
    D: tl.constexpr,
    EXPRESSION: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient of the scores: EXPRESSION's derivative times WEIGHTS [M]; 0 for own pairs.

    BIAS_G [cdiv(N, BN), M]: its sums over the keys of a tile, the gradient of a bias.
    """
    first_row, first_key = tile_of_program(M, N, BM, BN, GROUP)
    row, key = first_row + tl.arange(0, BM), first_key + tl.arange(0, BN)
    scores = tile_scores(
        X, Y, ROW_FACTORS, KEY_FACTORS, row, key, M, N, 1.0, D, HAS_FACTORS, PRECISION, BK
    )
    if HAS_BIAS:
        scores += tl.load(BIAS)
    similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N) if HAS_IDS else None
    _, grad = EXPRESSION(scores, similar, parameter)
    grad *= tl.load(WEIGHTS + row, mask=row < M, other=0.0)[:, None]
    if holds_own(first_row, first_key, own, BM, BN):
        grad = tl.where((row + own)[:, None] == key[None, :], 0.0, grad)
    if HAS_BIAS:
        if first_key + BN > N:
            grad = tl.where((key < N)[None, :], grad, 0.0)
        tl.store(BIAS_G + (first_key // BN).to(tl.int64) * M + row, tl.sum(grad, 1), mask=row < M)
    if HAS_FACTORS:
        grad *= tl.load(ROW_FACTORS + row, mask=row < M, other=0.0)[:, None]
        grad *= tl.load(KEY_FACTORS + key, mask=key < N, other=0.0)[None, :]
    store_gradient(G, grad, row, key, M, stride)
