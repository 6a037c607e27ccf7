"""Triton kernels of sums of differences of points, each times the weight of its pair.

    force_weight_kernel   a panel of the weights that the force has in it, of all temperatures
    length_weight_kernel  a panel of those that the gradient of a sum of distances has
    near_kernel           sums of weighted differences of near pairs, which a product would spoil
    product_kernel        products of the other weights and the keys

Weights push away from negatives, the first `num_negative` keys, and pull to data, the others. Their
sign tells something else in WEIGHTS [G, M, stride]: those below 0 are of near pairs. FLAGS of tiles
tell what there is: int32 [G, blocks of rows, blocks of keys], 1 for weights other than 0, 2 for
such of near pairs. Shapes and names as in kernels.py.
"""

import triton
import triton.language as tl

from dist_contrastive.losses.force.kernels import (
    INF,
    SIZES,
    any_of,
    first_block,
    log_affinity,
    panel_tile,
    place_of_program,
)

# Sums of rows less sums of keys have lost the digits of their difference where these are nearer to
# each other than this share of the row's distance from the origin.
_NEAR = tl.constexpr(0.1)


@triton.jit
def store_weights(
    WEIGHTS,
    FLAGS,
    weight,
    d,
    norm,
    g,
    first_row,
    block,
    M,
    N,
    stride,
    num_negative,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store a tile of weights, 0 where nothing acts, and its flag. Returns the sums over keys that
    are not near [BM], less those over data."""
    row, key = first_row + tl.arange(0, BM), block * BN + tl.arange(0, BN)
    weight = tl.where((d == 0) | (d == INF), 0.0, weight)
    is_near, acts = d < norm[:, None] * _NEAR, weight != 0
    flag = any_of(~is_near & acts).to(tl.int32) + 2 * any_of(is_near & acts).to(tl.int32)
    tl.store(FLAGS + (g * tl.cdiv(M, BM) + first_row // BM) * tl.cdiv(N, BN) + block, flag)
    at = (g * M + row[:, None]) * stride + key[None, :]
    inside = (row < M)[:, None] & (key < stride)[None, :]
    tl.store(WEIGHTS + at, tl.where(is_near, -weight, weight), mask=inside)
    signed = tl.where((key < num_negative)[None, :], weight, -weight)
    return tl.sum(tl.where(is_near, 0.0, signed), 1)


@triton.jit
def far_weights(weight, key, num_negative):
    """Weights as they are stored [BM, BN], as what pairs that are not near push with."""
    weight = tl.where(weight < 0, 0.0, weight)  # NaN stays
    return tl.where((key < num_negative)[None, :], weight, -weight)


@triton.jit(do_not_specialize=SIZES)
def force_weight_kernel(
    PANEL,
    NORMS,
    RATES,
    HALF_ROWS,
    HALF_KEYS,
    ROW_TERMS,
    KEY_TERMS,
    LOG_WEIGHTS,
    BY_NEGATIVE,
    BY_POSITIVE,
    WEIGHTS,
    FLAGS,
    SUMS,
    M,
    P,
    N,
    R,
    G,
    first,
    stride,
    parts,
    num_negative,
    log_floor,
    T: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum over temperatures of A times a factor of the row; sums over keys are added to SUMS
    [parts, G, R].

    BY_NEGATIVE, BY_POSITIVE: [T, G, R], the factors of keys that are negatives and of data; without
    a floor with ROW_TERMS in them.
    """
    g, first_row, part = place_of_program(M, parts, BM)
    row = first_row + tl.arange(0, BM)
    is_row, at_row = row < M, g * R + first + row
    norm = tl.load(NORMS + at_row, mask=is_row, other=0.0)
    half_row = tl.load(HALF_ROWS + at_row, mask=is_row, other=0.0)
    pointers = RATES, ROW_TERMS, KEY_TERMS, LOG_WEIGHTS
    sums = SUMS + (part * G + g) * R + first + row
    total = tl.load(sums, mask=is_row, other=0.0)
    end = first_block(0, N, part + 1, parts, BN)
    for block in range(first_block(0, N, part, parts, BN), end):
        key = block * BN + tl.arange(0, BN)
        is_key, is_positive = key < N, (key >= num_negative)[None, :]
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        half_key = tl.load(HALF_KEYS + g * N + key, mask=is_key, other=0.0)
        x = d - half_row[:, None] - half_key[None, :]
        weight = tl.zeros([BM, BN], tl.float32)
        place = g, first, row, key, is_row, is_key, R, N, G
        for t in range(T):
            z = log_affinity(*pointers, x, t, *place, log_floor, HAS_FLOOR)
            at = (t * G + g) * R + first + row
            by_negative = tl.load(BY_NEGATIVE + at, mask=is_row, other=-INF)
            by_positive = tl.load(BY_POSITIVE + at, mask=is_row, other=-INF)
            z += tl.where(is_positive, by_positive[:, None], by_negative[:, None])
            weight += tl.exp2(z)
        tile = g, first_row, block, M, N, stride, num_negative
        total += store_weights(WEIGHTS, FLAGS, weight, d, norm, *tile, BM, BN)
    tl.store(sums, total, mask=is_row)


@triton.jit(do_not_specialize=SIZES)
def length_weight_kernel(
    PANEL,
    NORMS,
    ROW_WEIGHTS,
    KEY_WEIGHTS,
    WEIGHTS,
    FLAGS,
    SUMS,
    M,
    P,
    N,
    R,
    G,
    first,
    stride,
    parts,
    HAS_WEIGHTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``2 / d``, or the weights of row [G, R] and key [G, N] over d: a point is a row of the matrix
    of distances, and a key of other rows. Results as those of `force_weight_kernel`, of negatives
    alone."""
    g, first_row, part = place_of_program(M, parts, BM)
    row = first_row + tl.arange(0, BM)
    is_row, at_row = row < M, g * R + first + row
    norm = tl.load(NORMS + at_row, mask=is_row, other=0.0)
    sums = SUMS + (part * G + g) * R + first + row
    total = tl.load(sums, mask=is_row, other=0.0)
    end = first_block(0, N, part + 1, parts, BN)
    for block in range(first_block(0, N, part, parts, BN), end):
        key = block * BN + tl.arange(0, BN)
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        weight = 2.0 / d
        if HAS_WEIGHTS:
            row_weight = tl.load(ROW_WEIGHTS + at_row, mask=is_row, other=0.0)
            key_weight = tl.load(KEY_WEIGHTS + g * N + key, mask=key < N, other=0.0)
            weight *= 0.5 * (row_weight[:, None] + key_weight[None, :])
        tile = g, first_row, block, M, N, stride, N
        total += store_weights(WEIGHTS, FLAGS, weight, d, norm, *tile, BM, BN)
    tl.store(sums, total, mask=is_row)


@triton.jit(do_not_specialize=SIZES)
def near_kernel(
    WEIGHTS,
    FLAGS,
    X,
    Y,
    OUT,
    M,
    N,
    R,
    first,
    stride,
    out_rows,
    num_negative,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Adds ``sum_k weight (x - y_k)`` over the near keys of each row to OUT [G, out_rows, D].

    Programs of tiles that have none end at once.
    """
    g, first_row, part = place_of_program(M, tl.cdiv(D, BK), BM)
    row, dim = first_row + tl.arange(0, BM), part * BK + tl.arange(0, BK)
    is_row, is_dim = row < M, dim < D
    inside = is_row[:, None] & is_dim[None, :]
    at_row = g * R + first + row
    x = tl.load(X + at_row[:, None] * D + dim[None, :], mask=inside, other=0.0)
    total = tl.zeros([BM, BK], tl.float32)
    num_blocks, found = tl.cdiv(N, BN), 0
    flags = FLAGS + (g * tl.cdiv(M, BM) + first_row // BM) * num_blocks
    for block in range(num_blocks):
        if tl.load(flags + block) > 1:
            found = 1
            for k in range(block * BN, tl.minimum(block * BN + BN, N)):
                weight = tl.load(WEIGHTS + (g * M + row) * stride + k, mask=is_row, other=0.0)
                weight = tl.where(weight < 0, tl.where(k < num_negative, -weight, weight), 0.0)
                y = tl.load(Y + (g * N + k) * D + dim, mask=is_dim, other=0.0)
                total += weight[:, None] * (x - y[None, :])
    if found != 0:
        at = OUT + (g * out_rows + first + row[:, None]) * D + dim[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    WEIGHTS,
    FLAGS,
    Y,
    OUT,
    M,
    N,
    first,
    stride,
    out_rows,
    num_negative,
    D: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
    FLAG_KEYS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Takes the product of weights that are not near and keys off OUT [G, out_rows, D]. Keys are Y
    [G, D, stride], filled up by 0.

    HAS_LABELS: steps without weights, as pairs of different labels have, are left out.
    """
    g, first_row, part = place_of_program(M, tl.cdiv(D, BN), BM)
    row, dim, key = first_row + tl.arange(0, BM), part * BN + tl.arange(0, BN), tl.arange(0, BK)
    is_row, is_dim = row < M, dim < D
    weight_at = WEIGHTS + (g * M + row[:, None]) * stride + key[None, :]
    y_at = Y + (g * D + dim[:, None]) * stride + key[None, :]
    num_blocks = tl.cdiv(N, FLAG_KEYS)
    flag_row = first_row // FLAG_ROWS + tl.arange(0, BM // FLAG_ROWS)
    is_flag = flag_row < tl.cdiv(M, FLAG_ROWS)
    flags = FLAGS + (g * tl.cdiv(M, FLAG_ROWS) + flag_row) * num_blocks
    total = tl.zeros([BM, BN], tl.float32)
    if HAS_LABELS:
        for block in range(num_blocks):
            if tl.max(tl.load(flags + block, mask=is_flag, other=0) % 2, 0) != 0:
                for start in range(block * FLAG_KEYS, block * FLAG_KEYS + FLAG_KEYS, BK):
                    inside = (start + key < stride)[None, :]
                    weight = tl.load(weight_at + start, mask=is_row[:, None] & inside, other=0.0)
                    weight = far_weights(weight, start + key, num_negative)
                    y = tl.load(y_at + start, mask=is_dim[:, None] & inside, other=0.0)
                    total = tl.dot(weight, tl.trans(y), total, input_precision=PRECISION)
    else:
        for start in range(0, stride, BK):
            weight = tl.load(weight_at + start, mask=is_row[:, None], other=0.0)
            weight = far_weights(weight, start + key, num_negative)
            y = tl.load(y_at + start, mask=is_dim[:, None], other=0.0)
            total = tl.dot(weight, tl.trans(y), total, input_precision=PRECISION)
    at = OUT + (g * out_rows + first + row[:, None]) * D + dim[None, :]
    inside = is_row[:, None] & is_dim[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) - total, mask=inside)
