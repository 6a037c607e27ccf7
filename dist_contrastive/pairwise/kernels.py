"""Triton kernels: tiles of scores that are reduced where they are computed, and their gradients.

`pair_kernel` sums a function of the pair over keys, and writes the gradient of the scores. Kernels
of log-sum-exps are in lse_kernels.py, of rows in row_kernels.py.

Scores are fp32 and never reach memory; gradients of the scores of some rows do, in the dtype of the
operands, for the two products that follow. A pair is known by integers alone: `ids` are equal where
row and key are similar, and row i's own key is key ``own + i`` of the block. No sum is made by
atomics, so results do not depend on which program ends first.

Shapes: X [M, D] and Y [N, D] rows and keys, contiguous; *_FACTORS multiply them (HAS_FACTORS), so
that rows in half precision need not be rounded again to have unit length. KEY_* but ids can be read
up to the end of the last tile. BM x BN is the tile, BK the dimensions of one step of its product.
Tensors of a single number stay on the device.
"""

import os

import triton
import triton.language as tl

IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Ids beyond the last row and key: never equal.
_NO_ROW, _NO_KEY = tl.constexpr(-3), tl.constexpr(-2)

# Batches differ in these from step to step; a kernel for each would be compiled again and again.
SIZES = ["M", "N", "own"]


@triton.jit
def blocks_of(part, N, BN: tl.constexpr):
    """The first block of keys of a part, one of as many as programs share a block of rows, and the
    one after its last."""
    num_blocks = tl.cdiv(N, BN)
    in_part = tl.cdiv(num_blocks, tl.num_programs(1))
    return part * in_part, tl.minimum((part + 1) * in_part, num_blocks)


@triton.jit
def tile_product(X, Y, row, key, M, N, D: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr):
    """Products of rows and keys by their numbers: fp32; 0 beyond the last.

    What is needed of rows and keys afterwards is better loaded after it: its sums fill half of the
    registers.
    """
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
        if IS_INTERPRETED:  # it has no products of bf16; those in fp32 are the same, being exact
            x, y = x.to(tl.float32), y.to(tl.float32)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _halves(tile):
    in_two = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(in_two, (0, 2, 1)))


@triton.jit
def part_of(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """One of 1, 2 or 4 parts of a tile's keys. What follows a product needs several registers for
    each of its numbers, and has them for some of these at a time."""
    found = tile
    if PARTS > 1:
        first, last = _halves(tile)
        found = first if part < PARTS // 2 else last
        if PARTS > 2:
            first, last = _halves(found)
            found = first if part % 2 == 0 else last
    return found


@triton.jit
def row_factors(FACTORS, row, M, HAS_FACTORS: tl.constexpr):
    """Factors of rows or keys by their numbers; ones, which cost nothing, where there are none."""
    if HAS_FACTORS:
        return tl.load(FACTORS + row, mask=row < M, other=0.0)
    return tl.full([row.shape[0]], 1.0, tl.float32)


@triton.jit
def key_factors(FACTORS, key, HAS_FACTORS: tl.constexpr):
    """`row_factors` of keys: of a whole tile, since a mask would cost an instruction a key."""
    if HAS_FACTORS:
        return tl.load(FACTORS + key)
    return tl.full([key.shape[0]], 1.0, tl.float32)


@triton.jit
def load_ids(IDS, number, count, BEYOND: tl.constexpr):
    """Ids of rows or keys by their numbers."""
    return tl.load(IDS + number, mask=number < count, other=BEYOND)


@triton.jit
def load_limits(LIMITS, number, count):
    """Scores above which pairs do not count, of rows or keys by their numbers; beyond the last, any
    one."""
    return tl.load(LIMITS + tl.minimum(number, count - 1))


@triton.jit
def similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N):
    """Which pairs are similar, own pairs among them; none beyond the last row or key.

    Ids in fp64 are a label, a sample and the largest difference of similar labels: [M, 3], [N, 3].
    """
    if ROW_IDS.dtype.element_ty == tl.float64:
        row_at, key_at = ROW_IDS + row.to(tl.int64) * 3, KEY_IDS + key.to(tl.int64) * 3
        row_label = tl.load(row_at, mask=row < M, other=float("nan"))
        key_label = tl.load(key_at, mask=key < N, other=float("nan"))
        row_sample = tl.load(row_at + 1, mask=row < M, other=_NO_ROW)
        key_sample = tl.load(key_at + 1, mask=key < N, other=_NO_KEY)
        most = tl.load(row_at + 2, mask=row < M, other=0.0)
        similar = tl.abs(row_label[:, None] - key_label[None, :]) <= most[:, None]
        similar = similar | (row_sample[:, None] == key_sample[None, :])
    else:
        row_id, key_id = load_ids(ROW_IDS, row, M, _NO_ROW), load_ids(KEY_IDS, key, N, _NO_KEY)
        similar = row_id[:, None] == key_id[None, :]
    return similar


@triton.jit
def pairs_inside(row, key, M, N):
    """Which pairs are of one of the first M rows and one of the first N keys."""
    return (row < M)[:, None] & (key < N)[None, :]


@triton.jit
def own_pairs(row, key, own):
    """Which pairs are of a row and its own key."""
    return (row + own)[:, None] == key[None, :]


@triton.jit
def holds_own(first_row, first_key, own, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has pairs of a row and its own key; most have none, and skip their masks."""
    return (first_row + own < first_key + BN) & (first_key < first_row + own + BM)


@triton.jit
def store_gradient(G, grad, row, key, M, stride):
    """Gradient of a tile of scores into the first keys of G [M, stride], in its dtype.

    What lies beyond them is written too: of a stride that is a multiple of 16 the compiler knows
    that eight numbers at a time are inside.
    """
    at = G + row[:, None].to(tl.int64) * stride + key[None, :]
    tl.store(at, grad.to(G.dtype.element_ty), mask=pairs_inside(row, key, M, stride))


@triton.jit
def store_zeros(G, row, key, first_key, M, N, stride, BN: tl.constexpr):
    """Zeros into G at the given key of each row, where it is in the tile that was just stored."""
    tl.debug_barrier()
    is_inside = (row < M) & (key >= first_key) & (key < tl.minimum(first_key + BN, N))
    zero = tl.zeros([row.shape[0]], G.dtype.element_ty)
    tl.store(G + row.to(tl.int64) * stride + key, zero, mask=is_inside)


@triton.jit
def store_zeros_beyond(G, row, key, M, N, stride):
    """Zeros into what fills up lines of G beyond the last key, in a tile that was just stored:
    exponentials of no key may be inf, which a product would not forget."""
    tl.debug_barrier()
    at = G + row[:, None].to(tl.int64) * stride + key[None, :]
    zeros = tl.zeros([row.shape[0], key.shape[0]], G.dtype.element_ty)
    tl.store(at, zeros, mask=pairs_inside(row, key, M, stride) & (key >= N)[None, :])


@triton.jit
def exp2(x):
    """``2^x`` of a relative error of two units of the last digit; 0 below the smallest normal
    number, for which the language's own adds three instructions."""
    if IS_INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x):
    """``1 / x``, with an error of one unit of the last digit."""
    if IS_INTERPRETED:
        return 1.0 / x
    # One instruction; the division of the language takes eight, and registers that spill.
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _log2(x):
    """Logarithm of a normal number, with an absolute error of 2^-22 near 1."""
    if IS_INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _eights(x):
    return tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8])


@triton.jit
def _sums_of_eights(x):
    """Sums over every eighth key [rows, 8]: those of a thread, which asks no other."""
    return tl.sum(_eights(x), 1)


@triton.jit
def _times(x, y):
    return x * y


@triton.jit
def softplus(scores, similar, parameter):
    """``log(1 + e^score)`` and its derivative: pairs that do not belong together. Sums are of every
    eighth key; scores are in powers of 2, and negative.

    Of p, the sigmoid, it is -log(1 - p): a short series where p is small, else score - log(p). The
    logarithm of the product of up to sixteen p takes the place of as many.
    """
    p = _reciprocal(1.0 + exp2(scores))
    is_small = p < 0.03125
    # Of -log2(1 - p), up to 1/32 with a relative error of 4e-7.
    series = p * (1.4426954 + p * (0.7211494 + p * 0.49780494))
    large = tl.where(is_small, 1.0, p)  # 2^-80 at the least is a product of sixteen
    logarithms = _log2(tl.reduce(_eights(large), 1, _times))
    return LN2 * (_sums_of_eights(tl.where(is_small, series, -scores)) - logarithms), p


@triton.jit
def cosine_embedding(scores, similar, parameter):
    """``1 - score`` of similar pairs, ``max(0, score - margin)`` of others, and their derivatives;
    sums are of every eighth key."""
    apart = scores - parameter
    value = tl.where(similar, 1.0 - scores, tl.maximum(apart, 0.0))
    return _sums_of_eights(value), tl.where(similar, -1.0, tl.where(apart > 0, 1.0, 0.0))


@triton.jit
def _pair_part(
    scores,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    BIAS,
    WEIGHTS,
    G,
    M,
    N,
    own,
    stride,
    parameter,
    row,
    first_row,
    first_key,
    EXPRESSION: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """Sums of values and of derivatives of a part of a tile, from its products; its part of G."""
    BM: tl.constexpr = scores.shape[0]
    BN: tl.constexpr = scores.shape[1]
    key = first_key + tl.arange(0, BN)
    row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS)
    key_factor = key_factors(KEY_FACTORS, key, HAS_FACTORS)
    scores = scores * (row_factor * UNIT)[:, None] * key_factor[None, :]
    if HAS_BIAS:
        scores += tl.load(BIAS) * UNIT
    similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N) if HAS_IDS else scores
    if LEAVE_OUT == "similar":
        scores = tl.where(similar, -float("inf") * UNIT, scores)
    if holds_own(first_row, first_key, own, BM, BN) | (first_key + BN > N):
        tl.debug_barrier()  # without it the masks would be computed in every tile
        counts = (key < N)[None, :] & ~own_pairs(row, key, own)
        scores = tl.where(counts, scores, -float("inf") * UNIT)
        if HAS_IDS and LEAVE_OUT == "own":
            similar = similar & counts
    value, grad = EXPRESSION(scores, similar, parameter)
    if not WITH_GRADIENT:
        return value, value
    weight = tl.load(WEIGHTS + row, mask=row < M, other=0.0)
    total = _sums_of_eights(grad) if HAS_BIAS else value
    grad = grad * (weight * row_factor)[:, None] * key_factor[None, :]
    store_gradient(G, grad, row, key, M, stride)
    return value, total


@triton.jit(do_not_specialize=[*SIZES, "parameter"])
def pair_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    BIAS,
    WEIGHTS,
    G,
    SUMS,
    M,
    N,
    own,
    stride,
    parameter,
    D: tl.constexpr,
    EXPRESSION: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums over keys of EXPRESSION's value (WITH_VALUES), and the gradient of the scores
    (WITH_GRADIENT): its derivative times WEIGHTS [M] and the factors of the pair. Both are 0 for
    pairs of LEAVE_OUT: own or similar ones.

    SUMS [2, parts, M]: of values, and of gradients before factors, which is that of a bias.
    EXPRESSION takes scores in units of 1 / UNIT, and is 0 with a derivative of 0 where the score is
    -inf and the pair not similar.

    Program (i, s) takes rows i BM ... and the s-th part of the keys.
    """
    first_row, part = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    values, grads = tl.zeros([BM, 8], tl.float32), tl.zeros([BM, 8], tl.float32)
    begin, end = blocks_of(part, N, BN)
    for block in range(begin, end):
        first_key = block * BN
        key = first_key + tl.arange(0, BN)
        tile = tile_product(X, Y, row, key, M, N, D, PRECISION, BK)
        for i in tl.static_range(PARTS):
            value, grad = _pair_part(
                part_of(tile, i, PARTS),
                ROW_FACTORS,
                KEY_FACTORS,
                ROW_IDS,
                KEY_IDS,
                BIAS,
                WEIGHTS,
                G,
                M,
                N,
                own,
                stride,
                parameter,
                row,
                first_row,
                first_key + i * (BN // PARTS),
                EXPRESSION,
                LEAVE_OUT,
                UNIT,
                HAS_IDS,
                HAS_BIAS,
                HAS_FACTORS,
                WITH_GRADIENT,
            )
            values += value
            grads += grad
    at = SUMS + part.to(tl.int64) * M + row
    if WITH_VALUES:
        tl.store(at, tl.sum(values, 1), mask=row < M)
    if WITH_GRADIENT:
        weight = tl.load(WEIGHTS + row, mask=row < M, other=0.0)
        beyond = tl.num_programs(1).to(tl.int64) * M
        tl.store(at + beyond, tl.sum(grads, 1) * weight, mask=row < M)
