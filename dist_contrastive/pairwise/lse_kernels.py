"""Triton kernels of log-sum-exps over pairs; shapes and names as in kernels.py.

lse_kernel            sums of exponentials of rows and of keys; positives summed
running_lse_kernel    the same of rows alone, at any range of scores
lse_gradient_kernel   gradient of the scores, from final log-sum-exps
count_similar_kernel  numbers of positives
"""

import triton
import triton.language as tl

from dist_contrastive.pairwise.kernels import (
    LOG2E,
    SIZES,
    blocks_of,
    exp2,
    holds_own,
    key_factors,
    load_limits,
    own_pairs,
    pairs_inside,
    part_of,
    row_factors,
    similar_pairs,
    store_gradient,
    store_zeros,
    store_zeros_beyond,
    tile_product,
)


@triton.jit(do_not_specialize=SIZES)
def lse_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    ROW_LIMITS,
    KEY_LIMITS,
    SHIFT,
    ROW_SUMS,
    KEY_SUMS,
    POSITIVE_SUMS,
    M,
    N,
    own,
    D: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    BOTH: tl.constexpr,
    WITH_POSITIVES: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums of ``2^z``, z = score log2(e) - shift, but of LEAVE_OUT: nothing, own or similar pairs,
    and of rows, or keys, whose limit a score is above (HAS_LIMITS; in powers of 2).

    One exponential a pair serves rows and keys (BOTH), which is right while their sums stay in
    range.

    Program (i, s) takes rows i BM ... and the s-th part of the keys. ROW_SUMS and POSITIVE_SUMS, of
    z, are [parts, M], KEY_SUMS is [cdiv(M, BM), N].
    """
    first_row, part = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    positive_sum = tl.zeros([BM], tl.float32)
    shift = tl.load(SHIFT)
    begin, end = blocks_of(part, N, BN)
    for block in range(begin, end):
        first_key = block * BN
        key = first_key + tl.arange(0, BN)
        z = tile_product(X, Y, row, key, M, N, D, PRECISION, BK)
        row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS) * LOG2E
        key_factor = key_factors(KEY_FACTORS, key, HAS_FACTORS)
        z = z * row_factor[:, None] * key_factor[None, :]
        if HAS_LIMITS:  # before the shift: what is compared is the same number in all kernels
            above = z > load_limits(ROW_LIMITS, row, M)[:, None]
            if BOTH:
                above_key = z > load_limits(KEY_LIMITS, key, N)[None, :]
        z -= shift
        if WITH_POSITIVES or LEAVE_OUT == "similar":
            similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N)
            if WITH_POSITIVES:
                positive_sum += tl.sum(tl.where(similar, z, 0.0), 1)
            if LEAVE_OUT == "similar":
                z = tl.where(similar, -float("inf"), z)
        is_masked = (first_key + BN > N) | (first_row + BM > M)
        if WITH_POSITIVES or LEAVE_OUT == "own":
            is_masked |= holds_own(first_row, first_key, own, BM, BN)
        if is_masked:
            counts, is_own = pairs_inside(row, key, M, N), own_pairs(row, key, own)
            if WITH_POSITIVES:
                positive_sum -= tl.sum(tl.where(counts & is_own, z, 0.0), 1)
            if LEAVE_OUT == "own":
                counts = counts & ~is_own
            z = tl.where(counts, z, -float("inf"))
        e = exp2(z)
        of_keys = e
        if HAS_LIMITS:
            if BOTH:
                of_keys = tl.where(above_key, 0.0, e)
            e = tl.where(above, 0.0, e)
        total += tl.sum(e, 1)
        if BOTH:
            key_at = KEY_SUMS + tl.program_id(0).to(tl.int64) * N + key
            tl.store(key_at, tl.sum(of_keys, 0), mask=key < N)
    at, is_row = part.to(tl.int64) * M + row, row < M
    tl.store(ROW_SUMS + at, total, mask=is_row)
    if WITH_POSITIVES:
        tl.store(POSITIVE_SUMS + at, positive_sum, mask=is_row)


@triton.jit(do_not_specialize=SIZES)
def running_lse_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    ROW_LIMITS,
    KEY_LIMITS,
    REPEAT,
    ROW_SUMS,
    ROW_TOPS,
    M,
    N,
    own,
    D: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`lse_kernel` of rows, whose shift is each row's own running maximum: ROW_TOPS [parts, M].

    It ends at once unless REPEAT, so that no one waits to know whether it is needed.
    """
    if tl.load(REPEAT) == 0:
        return
    first_row, part = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    begin, end = blocks_of(part, N, BN)
    for block in range(begin, end):
        key = block * BN + tl.arange(0, BN)
        z = tile_product(X, Y, row, key, M, N, D, PRECISION, BK)
        row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS) * LOG2E
        key_factor = key_factors(KEY_FACTORS, key, HAS_FACTORS)
        z = z * row_factor[:, None] * key_factor[None, :]
        counts = pairs_inside(row, key, M, N)
        if LEAVE_OUT == "similar":
            counts = counts & ~similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N)
        if LEAVE_OUT == "own":
            counts = counts & ~own_pairs(row, key, own)
        if HAS_LIMITS:
            counts = counts & (z <= load_limits(ROW_LIMITS, row, M)[:, None])
        z = tl.where(counts, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * exp2(top - finite) + tl.sum(exp2(z - finite[:, None]), 1)
        top = higher
    at, is_row = part.to(tl.int64) * M + row, row < M
    tl.store(ROW_SUMS + at, total, mask=is_row)
    tl.store(ROW_TOPS + at, top, mask=is_row)


@triton.jit
def _gradient_part(
    z,
    row_factor,
    row_lse,
    row_weight,
    positive_weight,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    row_limit,
    KEY_LIMITS,
    KEY_LSE,
    KEY_WEIGHTS,
    G,
    M,
    N,
    stride,
    row,
    first_key,
    LEAVE_OUT: tl.constexpr,
    BOTH: tl.constexpr,
    WITH_POSITIVES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):
    """Gradient of the scores of a part of a tile, from its products, into its part of G."""
    key = first_key + tl.arange(0, z.shape[1])
    key_factor = key_factors(KEY_FACTORS, key, HAS_FACTORS)[None, :]
    z = z * (row_factor * LOG2E)[:, None] * key_factor
    # The pair's factors are in its weights and exponents, where they cost less than one by one.
    if BOTH:
        of_keys = exp2(z - tl.load(KEY_LSE + key)[None, :])
        by_keys = row_factor[:, None] * tl.load(KEY_WEIGHTS + key)[None, :]
        by_rows = row_weight[:, None]
        if not SHARED:
            by_keys = of_keys * by_keys
            by_rows = exp2(z - row_lse[:, None]) * by_rows * key_factor
        if HAS_LIMITS:  # of products, since a score above may have an infinite exponential
            by_rows = tl.where(z > row_limit[:, None], 0.0, by_rows)
            by_keys = tl.where(z > load_limits(KEY_LIMITS, key, N)[None, :], 0.0, by_keys)
        grad = by_rows + by_keys
        if SHARED:
            grad = of_keys * grad
    else:
        grad = exp2(z - row_lse[:, None]) * row_weight[:, None]
        if HAS_LIMITS:
            grad = tl.where(z > row_limit[:, None], 0.0, grad)
        if WITH_POSITIVES:
            similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N)
            grad += tl.where(similar, positive_weight[:, None], 0.0)
        grad *= key_factor
    if LEAVE_OUT == "similar":
        grad = tl.where(similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N), 0.0, grad)
    store_gradient(G, grad, row, key, M, stride)


@triton.jit(do_not_specialize=[*SIZES, "shift", "count", "first"])
def lse_gradient_kernel(
    X,
    Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_IDS,
    KEY_IDS,
    ROW_LIMITS,
    KEY_LIMITS,
    NEAR,
    ROW_LSE,
    ROW_WEIGHTS,
    KEY_LSE,
    KEY_WEIGHTS,
    POSITIVE_WEIGHTS,
    G,
    M,
    N,
    own,
    shift,
    count,
    first,
    stride,
    D: tl.constexpr,
    LEAVE_OUT: tl.constexpr,
    BOTH: tl.constexpr,
    WITH_POSITIVES: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_PARTNERS: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient of the scores: softmax weights of rows, and of keys (BOTH), and of positives, times
    the factors of the pair.

    It is 0 for pairs of a row and its partner (HAS_PARTNERS), row first + i of count and the own
    key of row (first + i + shift) % count: the caller adds it in fp32.

    With BOTH one exponential is SHARED by rows and keys, ``2^(z - shift) (row weight + key
    weight)``. Where log-sum-exps are not NEAR the shift that product leaves the range of fp32: then
    that kernel ends at once, and in its place does not the one in which each has its own.

    *_LSE: in powers of 2. *_WEIGHTS: gradients by log-sum-exps, times what rounding has taken from
    these, and times factors. Of SHARED KEY_LSE is the shift, less the key's factor as a power of 2,
    and weights, without that factor, are times ``2^(shift - lse)``. Program (i, s) as in
    lse_kernel.
    """
    if BOTH:  # noqa: SIM102  # a condition of the compiler, and one of the device
        if (tl.load(NEAR) != 0) != SHARED:
            return
    first_row, part = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    begin, end = blocks_of(part, N, BN)
    for block in range(begin, end):
        first_key = block * BN
        key = first_key + tl.arange(0, BN)
        tile = tile_product(X, Y, row, key, M, N, D, PRECISION, BK)
        row_factor = row_factors(ROW_FACTORS, row, M, HAS_FACTORS)
        row_weight = tl.load(ROW_WEIGHTS + row, mask=row < M, other=0.0)
        row_lse, positive_weight = row_weight, row_weight
        if not (BOTH and SHARED):
            row_lse = tl.load(ROW_LSE + row, mask=row < M, other=0.0)
        row_limit = load_limits(ROW_LIMITS, row, M) if HAS_LIMITS else row_weight
        if WITH_POSITIVES:
            positive_weight = tl.load(POSITIVE_WEIGHTS + row, mask=row < M, other=0.0)
        for i in tl.static_range(PARTS):
            _gradient_part(
                part_of(tile, i, PARTS),
                row_factor,
                row_lse,
                row_weight,
                positive_weight,
                KEY_FACTORS,
                ROW_IDS,
                KEY_IDS,
                row_limit,
                KEY_LIMITS,
                KEY_LSE,
                KEY_WEIGHTS,
                G,
                M,
                N,
                stride,
                row,
                first_key + i * (BN // PARTS),
                LEAVE_OUT,
                BOTH,
                WITH_POSITIVES,
                SHARED,
                HAS_LIMITS,
                HAS_FACTORS,
            )
        if G.dtype.element_ty == tl.float32:  # noqa: SIM102  # what others fill up is not read
            if first_key + BN > N:
                store_zeros_beyond(G, row, key, M, N, stride)
        if LEAVE_OUT == "own":  # noqa: SIM102
            if holds_own(first_row, first_key, own, BM, BN):
                store_zeros(G, row, row + own, first_key, M, N, stride, BN)
        if HAS_PARTNERS:
            before = own + shift - count
            near = holds_own(first_row, first_key, own + shift, BM, BN)
            if near | holds_own(first_row, first_key, before, BM, BN):
                partner = row + tl.where(first + row + shift < count, own + shift, before)
                store_zeros(G, row, partner, first_key, M, N, stride, BN)


@triton.jit(do_not_specialize=SIZES)
def count_similar_kernel(
    ROW_IDS,
    KEY_IDS,
    COUNTS,
    M,
    N,
    own,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """COUNTS [parts, M] of the keys that are similar to each row, but its own. Program (i, s) takes
    rows i BM ... and the s-th part of the keys."""
    row, part = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    total = tl.zeros([BM], tl.int32)
    begin, end = blocks_of(part, N, BN)
    for block in range(begin, end):
        key = block * BN + tl.arange(0, BN)
        similar = similar_pairs(ROW_IDS, KEY_IDS, row, key, M, N) & ~own_pairs(row, key, own)
        total += tl.sum(similar.to(tl.int32), 1)
    tl.store(COUNTS + part.to(tl.int64) * M + row, total, mask=row < M)
