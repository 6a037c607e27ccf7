"""Triton kernels that reduce a panel of distances over its keys, at all temperatures in one visit.

    distance_sum_kernel     sums of distances
    exponential_sum_kernel  nearest keys, and sums of exponentials around these
    affinity_sum_kernel     sums of A, and of (d A)^2
    segment_kernel          sums, log-sum-exps or maxima over the points of each label

Shapes and names as in kernels.py. Program (g, i, s) takes rows i BM ... of a group and the s-th
part of the keys; results are [parts, ...] in the order of parts, to be joined by the caller. They
are added to what is there: those of one block of keys after the other, and at first of none.
Numbers of T temperatures are columns of a tile of TP, the next power of 2.
"""

from typing import Any  # noqa: F401  # in comments: a kernel's variables have no annotations

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
    sums = SUMS + (part * G + g) * R + first + row
    total = tl.load(sums, mask=row < M, other=0.0)
    last = first_block(0, N, part + 1, parts, BN)
    for block in range(first_block(0, N, part, parts, BN), last):
        key = block * BN + tl.arange(0, BN)
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        d = tl.where(d == INF, 0.0, d)
        if HAS_WEIGHTS:
            d *= tl.load(WEIGHTS + g * N + key, mask=key < N, other=0.0)[None, :]
        total += tl.sum(d, 1)
    tl.store(sums, total, mask=row < M)


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
    at_row = (part * G + g) * R + first + row
    sums = SUMS + ((part * T + number) * G + g) * R + first + row[:, None]
    nearest = tl.load(NEAREST + at_row, mask=is_row, other=INF)
    count = tl.load(COUNTS + at_row, mask=is_row, other=0.0)
    total = tl.load(sums, mask=inside, other=0.0)
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
    tl.store(NEAREST + at_row, nearest, mask=is_row)
    tl.store(COUNTS + at_row, count, mask=is_row)
    tl.store(sums, total, mask=inside)


@triton.jit
def with_tile(sums, z, length, BM: tl.constexpr, BN: tl.constexpr):
    """Largest log2 A, and sums of A and of (length A)^2 over 2^that, with those of a tile. Each is
    of a row and four keys side by side, which one thread has [BM, BN / 4]: threads exchange nothing
    until the last tile."""
    top, total, square = sums
    z = tl.reshape(z, [BM, BN // 4, 4])
    higher = tl.maximum(top, tl.max(z, 2))
    shift = tl.where(higher == -INF, 0.0, higher)
    e = tl.exp2(z - shift[:, :, None])
    shrinks_by = tl.exp2(top - shift)
    total = total * shrinks_by + tl.sum(e, 2)
    e *= tl.reshape(length, [BM, BN // 4, 4])
    return higher, total, square * (shrinks_by * shrinks_by) + tl.sum(e * e, 2)


@triton.jit
def add_sums(TOPS, SUMS, SQUARES, sums, is_row):
    """Join the sums of rows [BM, BN / 4] to those that are there."""
    tops, totals, squares = sums
    before = tl.load(TOPS, mask=is_row, other=-INF)
    top = tl.maximum(tl.max(tops, 1), before)
    shift = tl.where(top == -INF, 0.0, top)
    shrinks_by, before = tl.exp2(tops - shift[:, None]), tl.exp2(before - shift)
    total = tl.load(SUMS, mask=is_row, other=0.0) * before
    square = tl.load(SQUARES, mask=is_row, other=0.0) * (before * before)
    tl.store(TOPS, top, mask=is_row)
    tl.store(SUMS, total + tl.sum(totals * shrinks_by, 1), mask=is_row)
    tl.store(SQUARES, square + tl.sum(squares * (shrinks_by * shrinks_by), 1), mask=is_row)


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
    of A with the row term. All are [parts, T, G, R], and joined to what they have.
    """
    g, first_row, part = place_of_program(M, parts, BM)
    row, number = first_row + tl.arange(0, BM), tl.arange(0, TP)[None, :]
    is_row, at_row = row < M, g * R + first + row
    half_row = tl.load(HALF_ROWS + at_row, mask=is_row, other=0.0)
    unit = tl.load(RATES + at_row, mask=is_row, other=0.0)
    pointers = RATES, ROW_TERMS, KEY_TERMS, LOG_WEIGHTS
    coinciding = tl.zeros([BM, TP], tl.float32)
    sums = ()  # type: Any
    for _ in tl.static_range(T):
        empty = tl.zeros([BM, BN // 4], tl.float32)
        sums += ((empty - INF, empty, empty),)
    begin, end, start, last = span_of_part(part, parts, sides, split, N, BN)
    for block in range(start, last):
        key = block * BN + tl.arange(0, BN)
        is_key = (key >= begin) & (key < end)
        d = panel_tile(PANEL, g, row, key, M, P, stride)
        d = tl.where(is_key[None, :], d, INF)
        half_key = tl.load(HALF_KEYS + g * N + key, mask=is_key, other=0.0)
        x = d - half_row[:, None] - half_key[None, :]
        place = g, first, row, key, is_row, is_key, R, N, G
        if any_of(d == 0):
            for t in range(T):
                z = log_affinity(*pointers, x, t, *place, log_floor, HAS_FLOOR)
                if not HAS_FLOOR:
                    at = (t * G + g) * R + first + row
                    z += tl.load(ROW_TERMS + at, mask=is_row, other=-INF)[:, None]
                e = tl.where(d == 0, tl.exp2(z), 0.0)
                coinciding += tl.where(number == t, tl.sum(e, 1)[:, None], 0.0)
        apart = (d != 0) & (d != INF)
        length = tl.where(apart, d, 0.0) * unit[:, None]
        x = tl.where(apart, x, INF)
        following = ()  # type: Any
        for t in tl.static_range(T):
            z = log_affinity(*pointers, x, t, *place, log_floor, HAS_FLOOR)
            if HAS_FLOOR:
                z = tl.where(apart, z, -INF)
            following += (with_tile(sums[t], z, length, BM, BN),)
        sums = following
    for t in tl.static_range(T):
        at = ((part * T + t) * G + g) * R + first + row
        add_sums(TOPS + at, SUMS + at, SQUARES + at, sums[t], is_row)
    at = COINCIDING + ((part * T + number) * G + g) * R + first + row[:, None]
    inside = is_row[:, None] & (number < T)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + coinciding, mask=inside)


@triton.jit(do_not_specialize=["n", "num_labels"])
def segment_kernel(
    X, BOUNDS, OUT, n, num_labels, KINDS: tl.constexpr, HOW: tl.constexpr, BN: tl.constexpr
):
    """Sums, log-sum-exps or maxima of X [Q, n] fp64 over the points of each label: OUT [Q, L].

    Points are sorted by kind and label; those of each label in the first KINDS kinds count. BOUNDS
    [kinds L + 1] int64 are their first places. HOW: "sum", "logsumexp" or "max". Program (q, l)
    makes one number, always in the same order.
    """
    q, label = (tl.program_id(0) // num_labels).to(tl.int64), tl.program_id(0) % num_labels
    shift = 0.0
    if HOW != "sum":
        tops = tl.full([BN], -INF, tl.float64)
        for kind in range(KINDS):
            bounds = BOUNDS + kind * num_labels + label
            end = tl.load(bounds + 1)
            for start in range(tl.load(bounds), end, BN):
                at = start + tl.arange(0, BN)
                x = tl.load(X + q * n + at, mask=at < end, other=-INF)
                tops = tl.maximum(tops, x, propagate_nan=tl.PropagateNan.ALL)
        top = tl.max(tops, 0)
        shift = tl.where(top == -INF, 0.0, top)
    if HOW == "max":
        tl.store(OUT + q * num_labels + label, top)
    else:
        total = tl.zeros([BN], tl.float64)
        for kind in range(KINDS):
            bounds = BOUNDS + kind * num_labels + label
            end = tl.load(bounds + 1)
            for start in range(tl.load(bounds), end, BN):
                at = start + tl.arange(0, BN)
                if HOW == "sum":
                    total += tl.load(X + q * n + at, mask=at < end, other=0.0)
                else:
                    x = tl.load(X + q * n + at, mask=at < end, other=-INF)
                    total += tl.exp(x - shift)
        result = tl.sum(total, 0)
        if HOW == "logsumexp":
            result = tl.log(result) + shift
        tl.store(OUT + q * num_labels + label, result)
