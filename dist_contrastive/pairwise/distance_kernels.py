"""Triton kernels of distances: the nearest and the farthest key of each row, and the distances and
gradients of single pairs; shapes and names as in kernels.py.

extreme_kernel         the nearest negative of each row, and its farthest positive
chosen_kernel          distances of rows and one key each, from differences
chosen_rows_kernel     gradient of these distances by rows
chosen_keys_kernel     the same by keys, of which one may have been chosen by many rows

A distance is Euclidean, ``|f x - g y + eps|`` with the factors of both, or COSINE, ``1 - f g <x,
y>``. Of a product ``|x|^2 + |y|^2 - 2 <x, y>`` has an absolute error of some eps (|x|^2 + |y|^2),
so the squares of close pairs are computed again from differences, where they may matter.
"""

import triton
import triton.language as tl

from dist_contrastive.pairwise.kernels import (
    SIZES,
    part_of,
    row_factors,
    similar_pairs,
    tile_product,
)

INF = tl.constexpr(float("inf"))
# Below this share of |x|^2 + |y|^2 a square is computed again; what its product may be off by.
CLOSE, _SLACK = tl.constexpr(1e-2), tl.constexpr(2.0**-16)


@triton.jit
def load_rows(X, number, is_wanted, first, D: tl.constexpr, BK: tl.constexpr):
    """Some dimensions of rows by their numbers: [rows, BK] fp32, 0 beyond the last."""
    dim = first + tl.arange(0, BK)
    at = X + number[:, None].to(tl.int64) * D + dim[None, :]
    inside = is_wanted[:, None] & (dim < D)[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def pair_values(
    X,
    Y,
    row,
    key,
    is_wanted,
    row_factor,
    key_factor,
    eps,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    BK: tl.constexpr,
):
    """Of each row with its key: squares of differences, or cosine distances."""
    total = tl.zeros([row.shape[0]], tl.float32)
    for first in range(0, D, BK):
        x = load_rows(X, row, is_wanted, first, D, BK) * row_factor[:, None]
        y = load_rows(Y, key, is_wanted, first, D, BK) * key_factor[:, None]
        if COSINE:
            total += tl.sum(x * y, 1)
        else:
            is_dim = (first + tl.arange(0, BK) < D)[None, :]
            difference = tl.where(is_dim, x - y + eps, 0.0)
            total += tl.sum(difference * difference, 1)
    return 1.0 - total if COSINE else total


@triton.jit
def any_of(x):
    """Whether any of a vector is true."""
    return tl.max(x.to(tl.int32), 0) > 0


@triton.jit
def _lower(best, best_key, value, key):
    """The lower of two values of each row, and its key: of equal ones the first."""
    better = (value < best) | ((value == best) & (value < INF) & (key < best_key))
    return tl.where(better, value, best), tl.where(better, key, best_key)


@triton.jit
def _update(
    best,
    best_key,
    square,
    magnitude,
    counts,
    X,
    Y,
    KEY_FACTORS,
    row,
    row_factor,
    first_key,
    N,
    SIGN: tl.constexpr,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BK: tl.constexpr,
):
    """Lowest values of rows, SIGN times squares, with those of a tile.

    Close pairs are taken from the one that may be lowest on, as long as one may be lower than what
    is known: one of a row at a time, most often none.
    """
    value = tl.where(counts, square * SIGN, INF)
    if COSINE:
        return _lower(best, best_key, tl.min(value, 1), first_key + tl.argmin(value, 1))
    is_close = square < magnitude * CLOSE
    plain = tl.where(is_close, INF, value)
    best, best_key = _lower(best, best_key, tl.min(plain, 1), first_key + tl.argmin(plain, 1))
    bound = tl.where(is_close, value - magnitude * _SLACK, INF)
    is_wanted = tl.min(bound, 1) < best
    while any_of(is_wanted):
        at = tl.argmin(bound, 1)
        key = first_key + at
        key_factor = row_factors(KEY_FACTORS, key, N, HAS_FACTORS)
        exact = pair_values(X, Y, row, key, is_wanted, row_factor, key_factor, 0.0, D, False, BK)
        exact = tl.where(is_wanted, exact * SIGN, INF)
        best, best_key = _lower(best, best_key, exact, key)
        bound = tl.where(tl.arange(0, square.shape[1])[None, :] == at[:, None], INF, bound)
        is_wanted = tl.min(bound, 1) < best
    return best, best_key


@triton.jit(do_not_specialize=SIZES)
def extreme_kernel(
    X,
    Y,
    EXACT_X,
    EXACT_Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_SQUARES,
    KEY_SQUARES,
    ROW_IDS,
    KEY_IDS,
    VALUES,
    NUMBERS,
    M,
    N,
    own,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    FARTHEST: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The nearest key of each row that is not similar, and with FARTHEST the farthest one that is,
    but for its own; of equal ones the first.

    X, Y may be moved to where rounding is least, EXACT_* are as they were given. *_SQUARES: squared
    norms with factors. VALUES, NUMBERS [1 or 2, parts, M]: the square, or the cosine distance, that
    of the farthest times -1, and the key; inf and -1 where there is none.

    Program (i, s) takes rows i BM ... and the s-th part of the keys.
    """
    first_row, part = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    num_blocks = tl.cdiv(N, BN)
    in_part = tl.cdiv(num_blocks, tl.num_programs(1))
    nearest, nearest_key = tl.full([BM], INF, tl.float32), tl.full([BM], -1, tl.int32)
    farthest, farthest_key = tl.full([BM], INF, tl.float32), tl.full([BM], -1, tl.int32)
    for block in range(part * in_part, tl.minimum((part + 1) * in_part, num_blocks)):
        key = block * BN + tl.arange(0, BN)
        tile = tile_product(X, Y, row, key, M, N, D, PRECISION, BK)
        row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS)
        row_square = tl.load(ROW_SQUARES + row, mask=row < M, other=0.0)
        for i in tl.static_range(PARTS):
            product = part_of(tile, i, PARTS)
            first_key = block * BN + i * (BN // PARTS)
            key = first_key + tl.arange(0, BN // PARTS)
            key_factor = row_factors(KEY_FACTORS, key, N, HAS_FACTORS)
            product = product * row_factor[:, None] * key_factor[None, :]
            key_square = tl.load(KEY_SQUARES + key, mask=key < N, other=0.0)
            magnitude = row_square[:, None] + key_square[None, :]
            square = 1.0 - product if COSINE else magnitude - 2.0 * product
            similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N)
            counts = (row < M)[:, None] & (key < N)[None, :] & ~similar
            exact = EXACT_X, EXACT_Y, KEY_FACTORS, row, row_factor, first_key, N
            known = nearest, nearest_key
            nearest, nearest_key = _update(
                *known, square, magnitude, counts, *exact, 1, D, COSINE, HAS_FACTORS, BK
            )
            if FARTHEST:
                counts = similar & ((row + own)[:, None] != key[None, :])
                known = farthest, farthest_key
                farthest, farthest_key = _update(
                    *known, square, magnitude, counts, *exact, -1, D, COSINE, HAS_FACTORS, BK
                )
    at, is_row = part.to(tl.int64) * M + row, row < M
    tl.store(VALUES + at, nearest, mask=is_row)
    tl.store(NUMBERS + at, nearest_key, mask=is_row)
    if FARTHEST:
        at += tl.num_programs(1).to(tl.int64) * M
        tl.store(VALUES + at, farthest, mask=is_row)
        tl.store(NUMBERS + at, farthest_key, mask=is_row)


@triton.jit(do_not_specialize=["M", "N", "K", "eps"])
def chosen_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    NUMBERS,
    VALUES,
    M,
    N,
    K,
    eps,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """VALUES [K, M]: squares or cosine distances of row i and key NUMBERS [K, M]; inf where that is
    no key of Y [N, D]."""
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    row, is_row = place % M, place < K * M
    key = tl.load(NUMBERS + place, mask=is_row, other=-1)
    is_key = (key >= 0) & (key < N)
    row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS)
    key_factor = row_factor
    if HAS_FACTORS:
        key_factor = tl.load(KEY_FACTORS + key, mask=is_key, other=0.0)
    value = pair_values(X, Y, row, key, is_key, row_factor, key_factor, eps, D, COSINE, BK)
    tl.store(VALUES + place, tl.where(is_key, value, INF), mask=is_row)


@triton.jit(do_not_specialize=["M", "N", "K", "eps"])
def chosen_rows_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    NUMBERS,
    COEFFICIENTS,
    SUMS,
    M,
    N,
    K,
    eps,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Add to SUMS [M, D] ``f_i sum_k c_ki (f_i x_i - g_j y_j + eps)`` with j = NUMBERS [K, M], c =
    COEFFICIENTS [K, M]; of COSINE ``-f_i sum_k c_ki g_j y_j``. What is no key of Y adds nothing."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    is_row = row < M
    row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS)
    for first in range(0, D, BK):
        x = load_rows(X, row, is_row, first, D, BK) * row_factor[:, None]
        total = tl.zeros([BM, BK], tl.float32)
        for k in range(K):
            key = tl.load(NUMBERS + k * M + row, mask=is_row, other=-1)
            is_key = (key >= 0) & (key < N)
            weight = tl.load(COEFFICIENTS + k * M + row, mask=is_key, other=0.0)
            y = load_rows(Y, key, is_key, first, D, BK)
            if HAS_FACTORS:
                y *= tl.load(KEY_FACTORS + key, mask=is_key, other=0.0)[:, None]
            total += weight[:, None] * (-y if COSINE else x - y + eps)
        dim = first + tl.arange(0, BK)
        at = SUMS + row[:, None].to(tl.int64) * D + dim[None, :]
        inside = is_row[:, None] & (dim < D)[None, :]
        before = tl.load(at, mask=inside, other=0.0)
        tl.store(at, before + total * row_factor[:, None], mask=inside)


@triton.jit(do_not_specialize=["M", "eps"])
def chosen_keys_kernel(
    Y,
    X,
    KEY_FACTORS,
    ROW_FACTORS,
    ENTRIES,
    BEGINS,
    ENDS,
    COEFFICIENTS,
    SUMS,
    M,
    eps,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """`chosen_rows_kernel` by keys: SUMS [N, D] of those rows ENTRIES % M whose choice a key is.

    ENTRIES: int64, places in COEFFICIENTS [K, M], sorted by their key; BEGINS, ENDS: of each key
    the first of its own and the one after its last. Program (j, s) takes key j and dimensions s BK
    ..., so that no sum depends on which program ends first.
    """
    key, first = tl.program_id(0), tl.program_id(1) * BK
    begin, end = tl.load(BEGINS + key), tl.load(ENDS + key)
    dim = first + tl.arange(0, BK)
    key_factor = tl.load(KEY_FACTORS + key) if HAS_FACTORS else 1.0
    at = key.to(tl.int64) * D + dim
    y = tl.load(Y + at, mask=dim < D, other=0.0).to(tl.float32) * key_factor
    total = tl.zeros([BM, BK], tl.float32)
    for start in range(begin, end, BM):
        place = start + tl.arange(0, BM)
        entry = tl.load(ENTRIES + place, mask=place < end, other=0)
        weight = tl.load(COEFFICIENTS + entry, mask=place < end, other=0.0)
        row = entry % M
        x = load_rows(X, row, place < end, first, D, BK)
        if HAS_FACTORS:
            x *= tl.load(ROW_FACTORS + row)[:, None]
        total += weight[:, None] * (-x if COSINE else y[None, :] - x - eps)
    tl.store(SUMS + at, tl.sum(total, 0) * key_factor, mask=dim < D)
