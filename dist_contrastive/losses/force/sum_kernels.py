"""Triton kernels that reduce a panel of distances over its keys, at all temperatures in one visit.

    distance_sum_kernel     sums of distances
    exponential_sum_kernel  nearest keys, and sums of exponentials around these
    affinity_sum_kernel     sums of A, and of (d A)^2
    segment_sum_kernel      sums over the points of each label

Shapes and names as in kernels.py. Program (g, i, s) takes rows i BM ... of a group and the s-th
part of the keys; results are [parts, ...] in the order of parts, to be joined by the caller.
Numbers of T temperatures are columns of a tile of TP, the next power of 2.
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
    span_of_part,
)


@triton.jit(do_not_specialize=SIZES)
def distance_sum_kernel(
    PANEL,
    WEIGHTS,
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
    """Sums of distances, times WEIGHTS [G, N] of the keys: SUMS [parts, G, R]."""
    g, first_row, part = place_of_program(M, parts, BM)
    row = first_row + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    last = first_block(0, N, part + 1, parts, BN)
    for block in range(first_block(0, N, part, parts, BN), last):
        key = block * BN + tl.arange(0, BN)
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        d = tl.where(d == INF, 0.0, d)
        if HAS_WEIGHTS:
            d *= tl.load(WEIGHTS + g * N + key, mask=key < N, other=0.0)[None, :]
        total += tl.sum(d, 1)
    tl.store(SUMS + (part * G + g) * R + first + row, total, mask=row < M)


@triton.jit(do_not_specialize=SIZES)
def exponential_sum_kernel(
    PANEL,
    RATES,
    NEAREST,
    COUNTS,
    SUMS,
    M,
    P,
    N,
    R,
    G,
    first,
    stride,
    parts,
    sides,
    split,
    T: tl.constexpr,
    TP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of ``2^(-rate (d - nearest))`` over keys, of both sides of the key `split` or of one:
    SUMS [parts, T, G, R]. NEAREST [parts, G, R] is the distance of the nearest key that does not
    coincide; COUNTS are of those that do, and are left out.

    RATES: [T, G, R], log2(e) over the temperature.
    """
    g, first_row, part = place_of_program(M, parts, BM)
    row, number = first_row + tl.arange(0, BM), tl.arange(0, TP)[None, :]
    is_row = row < M
    inside = is_row[:, None] & (number < T)
    rates = tl.load(RATES + (number * G + g) * R + first + row[:, None], mask=inside, other=0.0)
    nearest = tl.full([BM], INF, tl.float32)
    count = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, TP], tl.float32)
    begin, end, start, last = span_of_part(part, parts, sides, split, N, BN)
    for block in range(start, last):
        key = block * BN + tl.arange(0, BN)
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        d = tl.where(((key >= begin) & (key < end))[None, :], d, INF)
        count += tl.sum((d == 0).to(tl.float32), 1)
        d = tl.where(d == 0, INF, d)
        nearer = tl.minimum(nearest, tl.min(d, 1))
        # Sums so far are seen from the nearest key so far.
        nearer_by = tl.where(nearest == INF, 0.0, nearer - nearest)
        total *= tl.exp2(rates * nearer_by[:, None])
        d -= tl.where(nearer == INF, 0.0, nearer)[:, None]
        for t in range(T):
            at = (t * G + g) * R + first + row
            rate = tl.load(RATES + at, mask=is_row, other=1.0)
            e = tl.exp2(-rate[:, None] * d)
            total += tl.where(number == t, tl.sum(e, 1)[:, None], 0.0)
        nearest = nearer
    at = (part * G + g) * R + first + row
    tl.store(NEAREST + at, nearest, mask=is_row)
    tl.store(COUNTS + at, count, mask=is_row)
    tl.store(SUMS + ((part * T + number) * G + g) * R + first + row[:, None], total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def affinity_sum_kernel(
    PANEL,
    RATES,
    HALF_ROWS,
    HALF_KEYS,
    ROW_TERMS,
    KEY_TERMS,
    LOG_WEIGHTS,
    TOPS,
    SUMS,
    SQUARES,
    COINCIDING,
    M,
    P,
    N,
    R,
    G,
    first,
    stride,
    parts,
    sides,
    split,
    log_floor,
    T: tl.constexpr,
    TP: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums over keys, of each side of `split`, of A and of (d A)^2, seen from the row's largest A.

    ``log2 A = key term - rate (d - half of the row's - half of the key's nearest)``, less the row
    term, which the caller adds; with a floor ``max(that with the row term, floor) + log weight``.

    TOPS: the largest log2 A. SUMS, of A, and SQUARES, of d A in units of the first temperature, are
    over 2^top. Keys that coincide with the row are in none of these but in COINCIDING, their sums
    of A with the row term. All are [parts, T, G, R].
    """
    g, first_row, part = place_of_program(M, parts, BM)
    row, number = first_row + tl.arange(0, BM), tl.arange(0, TP)[None, :]
    is_row, at_row = row < M, g * R + first + row
    half_row = tl.load(HALF_ROWS + at_row, mask=is_row, other=0.0)
    unit = tl.load(RATES + at_row, mask=is_row, other=0.0)
    tops = tl.full([BM, TP], -INF, tl.float32)
    sums = tl.zeros([BM, TP], tl.float32)
    squares = tl.zeros([BM, TP], tl.float32)
    coinciding = tl.zeros([BM, TP], tl.float32)
    begin, end, start, last = span_of_part(part, parts, sides, split, N, BN)
    for block in range(start, last):
        key = block * BN + tl.arange(0, BN)
        is_key = (key >= begin) & (key < end)
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        d = tl.where(is_key[None, :], d, INF)
        half_key = tl.load(HALF_KEYS + g * N + key, mask=is_key, other=0.0)
        x = d - half_row[:, None] - half_key[None, :]
        length = tl.where(d == INF, 0.0, d) * unit[:, None]
        if any_of(d == 0):
            for t in range(T):
                at = (t * G + g) * R + first + row
                rate, term, weight_at = RATES + at, ROW_TERMS + at, LOG_WEIGHTS + g * N + key
                keys = KEY_TERMS + (t * G + g) * N + key
                z = log_affinity(
                    rate, term, keys, weight_at, x, is_row, is_key, log_floor, HAS_FLOOR
                )
                if not HAS_FLOOR:
                    z += tl.load(ROW_TERMS + at, mask=is_row, other=-INF)[:, None]
                e = tl.where(d == 0, tl.exp2(z), 0.0)
                coinciding += tl.where(number == t, tl.sum(e, 1)[:, None], 0.0)
        for t in range(T):
            at = (t * G + g) * R + first + row
            rate, term, weight_at = RATES + at, ROW_TERMS + at, LOG_WEIGHTS + g * N + key
            keys = KEY_TERMS + (t * G + g) * N + key
            z = log_affinity(rate, term, keys, weight_at, x, is_row, is_key, log_floor, HAS_FLOOR)
            is_t = number == t
            z = tl.where((d == 0) | (d == INF), -INF, z)
            top = tl.max(tl.where(is_t, tops, -INF), 1)
            higher = tl.maximum(top, tl.max(z, 1))
            shift = tl.where(higher == -INF, 0.0, higher)
            e = tl.exp2(z - shift[:, None])
            shrinks_by = tl.exp2(top - shift)
            sums = tl.where(is_t, sums * shrinks_by[:, None] + tl.sum(e, 1)[:, None], sums)
            e *= length
            square = tl.sum(e * e, 1)
            shrinks_by *= shrinks_by
            squares = tl.where(is_t, squares * shrinks_by[:, None] + square[:, None], squares)
            tops = tl.where(is_t, higher[:, None], tops)
    inside = is_row[:, None] & (number < T)
    at = ((part * T + number) * G + g) * R + first + row[:, None]
    tl.store(TOPS + at, tops, mask=inside)
    tl.store(SUMS + at, sums, mask=inside)
    tl.store(SQUARES + at, squares, mask=inside)
    tl.store(COINCIDING + at, coinciding, mask=inside)


@triton.jit(do_not_specialize=["n", "num_labels"])
def segment_sum_kernel(X, BEGINS, ENDS, SUMS, n, num_labels, BN: tl.constexpr):
    """Sums of X [Q, n] fp64 from BEGINS to ENDS, int64 [L]: SUMS [Q, L].

    Program (q, l) makes one, always in the same order.
    """
    q, label = (tl.program_id(0) // num_labels).to(tl.int64), tl.program_id(0) % num_labels
    begin, end = tl.load(BEGINS + label), tl.load(ENDS + label)
    total = tl.zeros([BN], tl.float64)
    for start in range(begin, end, BN):
        at = start + tl.arange(0, BN)
        total += tl.load(X + q * n + at, mask=at < end, other=0.0)
    tl.store(SUMS + q * num_labels + label, tl.sum(total, 0))
