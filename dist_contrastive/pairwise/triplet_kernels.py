"""Triton kernels of triplets whose weights depend on all distances of a row.

all_kernel        sums and gradients over all triplets of a row
semihard_kernel   the same over the semihard ones

Shapes and names as in panel_kernels.py; own key of row i is key own + i. A program loops over the
positives that its row has, 2^LOG at a time, which it sorts; each negative then takes its place
among them. Counts are whole numbers and sums fp64, made by one program in one order.
"""

import triton
import triton.language as tl

from dist_contrastive.pairwise.distance_kernels import INF

_MOST, _MOST_LONG = tl.constexpr(2147483647), tl.constexpr(9223372036854775807)
NUMBERS = ["N", "own", "margin"]


@triton.jit
def _rank(SORTED, value, num, RIGHT: tl.constexpr, LOG: tl.constexpr):
    """How many of the first `num` of 2^LOG ascending numbers are below each value, with RIGHT also
    those equal to it; those from `num` on are larger than any value."""
    rank = tl.zeros([value.shape[0]], tl.int32)
    for i in tl.static_range(LOG):
        half = 1 << (LOG - 1 - i)
        if half < num:
            probe = tl.load(SORTED + rank + (half - 1))
            rank += tl.where((probe <= value) if RIGHT else (probe < value), half, 0)
    probe = tl.load(SORTED + rank)
    return rank + tl.where((probe <= value) if RIGHT else (probe < value), 1, 0)


@triton.jit
def _store_shared(AT, value):
    """Numbers that all threads of the program read next."""
    tl.debug_barrier()
    tl.store(AT + tl.arange(0, value.shape[0]), value)
    tl.debug_barrier()


@triton.jit
def _weight(weight, d, row_factor, KEY_FACTORS, key, is_key, METRIC: tl.constexpr):
    """What the difference, or of cosine the key's product with both factors, counts in the
    gradient, where the distance counts `weight`."""
    if METRIC == "cosine":
        return -weight * row_factor * tl.load(KEY_FACTORS + key, mask=is_key, other=0.0)
    if METRIC == "squared_euclidean":
        return 2.0 * weight
    return tl.where(d > 0, weight / d, 0.0)


@triton.jit
def _load_positives(ORDER, LINE, begin, end, own, chunk, LOG: tl.constexpr):
    """Columns of a chunk of a row's positives, which of them are real, which are positives and not
    the row's own key, and their distances, inf where there is none."""
    place = begin + chunk * (1 << LOG) + tl.arange(0, 1 << LOG)
    key = tl.load(ORDER + place, mask=place < end, other=-1)
    is_positive = (place < end) & (key != own)
    return key, place < end, is_positive, tl.load(LINE + key, mask=is_positive, other=INF)


@triton.jit
def _load_negatives(PLACES, LINE, begin, end, start, N, BN: tl.constexpr):
    """Some columns, which of them are negatives, and their distances, inf where they are not."""
    key = start + tl.arange(0, BN)
    place = tl.load(PLACES + key, mask=key < N, other=0)
    is_negative = (key < N) & ((place < begin) | (place >= end))
    return key, is_negative, tl.load(LINE + key, mask=is_negative, other=INF)


@triton.jit
def _store_positives(
    LINE, G_LINE, key, is_key, weight, d, row_factor, KEY_FACTORS, METRIC: tl.constexpr
):
    """What positives count: into G of cosine, else in the place of their distances, from where
    `positive_kernel` takes it."""
    found = _weight(weight, d, row_factor, KEY_FACTORS, key, is_key, METRIC)
    found = tl.where(weight > 0, found, 0.0)  # there is no distance from own keys
    if METRIC == "cosine":
        tl.store(G_LINE + key, found.to(G_LINE.dtype.element_ty), mask=is_key)
    else:
        tl.store(LINE + key, found, mask=is_key)


@triton.jit
def _reached_by(
    PLACES,
    ORDER,
    LINE,
    SORTED,
    begin,
    end,
    own,
    start,
    N,
    margin,
    LOG: tl.constexpr,
    BN: tl.constexpr,
):
    """Of some negatives by how many positives of all chunks, sorted again, they are reached."""
    _, is_negative, d = _load_negatives(PLACES, LINE, begin, end, start, N, BN)
    weight = tl.zeros([BN], tl.int32)
    for chunk in range(tl.cdiv(end - begin, 1 << LOG)):
        loaded = _load_positives(ORDER, LINE, begin, end, own, chunk, LOG)
        num = tl.sum(loaded[2].to(tl.int32), 0)
        _store_shared(SORTED, tl.sort(loaded[3] + margin))
        weight += num - _rank(SORTED, d, num, True, LOG)
    return tl.where(is_negative, weight, 0)


@triton.jit(do_not_specialize=NUMBERS)
def all_kernel(
    KEY_FACTORS,
    ROW_FACTORS,
    PLACES,
    ORDER,
    BEGINS,
    ENDS,
    PANEL,
    SORTED,
    COUNTS,
    G,
    SUMS,
    TOTALS,
    N,
    own,
    stride,
    margin,
    METRIC: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LOG: tl.constexpr,
    BN: tl.constexpr,
):
    """``sum over positives p and negatives n of relu(d_p + margin - d_n)``: SUMS [M] in fp64, and
    TOTALS [M, 2] int64, how many are above 0, and how many there are.

    The sum is that of weights times distances, and margins: of a positive the number of negatives
    nearer than d_p + margin, of a negative minus the number of positives for which it is. SORTED
    fp32 and COUNTS int32 [M, 2^LOG] are for the program alone. Program i takes row i.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(BEGINS + row), tl.load(ENDS + row)
    own = own + tl.program_id(0)
    LINE, G_LINE = PANEL + row * stride, G + row * stride
    SORTED, COUNTS = SORTED + row * (1 << LOG), COUNTS + row * (1 << LOG)
    row_factor = tl.load(ROW_FACTORS + row) if METRIC == "cosine" else 1.0
    total, active = tl.zeros([BN], tl.float64), tl.zeros([1 << LOG], tl.int64)
    by_positives = tl.zeros([1 << LOG], tl.float64)
    chunks = tl.cdiv(end - begin, 1 << LOG)
    if chunks > 1:
        for start in range(0, N, BN):
            key, is_negative, d = _load_negatives(PLACES, LINE, begin, end, start, N, BN)
            where = begin, end, own, start, N, margin
            weight = _reached_by(PLACES, ORDER, LINE, SORTED, *where, LOG, BN)
            total -= tl.where(weight > 0, weight.to(tl.float64) * d.to(tl.float64), 0.0)
            if WITH_GRADIENT:
                grad = -_weight(
                    weight.to(tl.float32), d, row_factor, KEY_FACTORS, key, key < N, METRIC
                )
                grad = tl.where(weight > 0, grad, 0.0)
                tl.store(G_LINE + key, grad.to(G.dtype.element_ty), mask=key < N)
    for chunk in range(chunks):
        column, is_key, is_positive, d_p = _load_positives(ORDER, LINE, begin, end, own, chunk, LOG)
        reach, num = d_p + margin, tl.sum(is_positive.to(tl.int32), 0)
        _store_shared(SORTED, tl.sort(reach))
        reached = tl.zeros([1 << LOG], tl.int32)
        for start in range(0, N, BN):
            key, is_negative, d = _load_negatives(PLACES, LINE, begin, end, start, N, BN)
            rank = _rank(SORTED, d, num, True, LOG)
            is_reached = is_negative & (rank < num)
            reached += tl.histogram(tl.where(is_reached, rank, 0), 1 << LOG, is_reached)
            if chunks == 1:
                weight = tl.where(is_reached, num - rank, 0)
                total -= tl.where(weight > 0, weight.to(tl.float64) * d.to(tl.float64), 0.0)
                if WITH_GRADIENT:
                    grad = -_weight(
                        weight.to(tl.float32), d, row_factor, KEY_FACTORS, key, key < N, METRIC
                    )
                    grad = tl.where(weight > 0, grad, 0.0)
                    tl.store(G_LINE + key, grad.to(G.dtype.element_ty), mask=key < N)
        # Positive number q reaches the negatives that at most q positives do not reach.
        _store_shared(COUNTS, tl.cumsum(reached, 0))
        place = _rank(SORTED, reach, num, False, LOG)
        count = tl.load(COUNTS + place, mask=is_positive, other=0)
        active += count
        by_positives += tl.where(is_positive, count.to(tl.float64) * d_p.to(tl.float64), 0.0)
        if WITH_GRADIENT:
            weight = count.to(tl.float32)
            _store_positives(
                LINE, G_LINE, column, is_key, weight, d_p, row_factor, KEY_FACTORS, METRIC
            )
    num_active = tl.sum(active, 0)
    margins = num_active.to(tl.float64) * margin
    tl.store(SUMS + row, tl.sum(total, 0) + tl.sum(by_positives, 0) + margins)
    tl.store(TOTALS + 2 * row, num_active)
    tl.store(TOTALS + 2 * row + 1, (end - begin - 1).to(tl.int64) * (N - end + begin))


@triton.jit
def _packed(d, key):
    """Numbers in the order of distances, of equal ones in that of keys: int64."""
    bits = d.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 2147483647, bits)  # as of a cosine distance below 0
    return (bits.to(tl.int64) << 32) | key.to(tl.int64)


@triton.jit
def _lower_of(x, y):
    return tl.minimum(x, y)


@triton.jit
def _place_negatives(
    PLACES,
    LINE,
    G_LINE,
    SORTED,
    BEST,
    farthest,
    begin,
    end,
    chunk,
    N,
    num,
    WITH_GRADIENT: tl.constexpr,
    LOG: tl.constexpr,
    BN: tl.constexpr,
):
    """The nearest negative beyond so many positives and not one more, into BEST [2^LOG + 1], and
    the farthest of all, found with the first chunk, with which G is filled with zeros."""
    for start in range(0, N, BN):
        key, is_negative, d = _load_negatives(PLACES, LINE, begin, end, start, N, BN)
        if WITH_GRADIENT and chunk == 0:
            tl.store(G_LINE + key, tl.zeros([BN], G_LINE.dtype.element_ty), mask=key < N)
        bucket = _rank(SORTED, d, num, False, LOG)
        packed = _packed(d, key)
        # Of what is no lower than before nothing is stored: soon that is nearly all.
        known = tl.load(BEST + bucket, mask=is_negative, other=0, volatile=True)
        tl.atomic_min(BEST + bucket, packed, mask=is_negative & (packed < known), sem="relaxed")
        # Of the farthest the first: the lowest of keys, too, hence from the other end.
        from_end = tl.where(is_negative, _packed(d, N - 1 - key), -_MOST_LONG)
        farthest = tl.maximum(farthest, tl.max(from_end, 0))
    return farthest


@triton.jit(do_not_specialize=NUMBERS)
def semihard_kernel(
    KEY_FACTORS,
    ROW_FACTORS,
    PLACES,
    ORDER,
    BEGINS,
    ENDS,
    PANEL,
    SORTED,
    COUNTS,
    BEST,
    G,
    SUMS,
    TOTALS,
    N,
    own,
    stride,
    margin,
    METRIC: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LOG: tl.constexpr,
    BN: tl.constexpr,
):
    """`all_kernel` of one negative for each positive: the nearest of those farther than it, or if
    there is none the farthest; of equally distant ones the first. BEST: int64 [M, 2^(LOG + 1)]."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(BEGINS + row), tl.load(ENDS + row)
    own = own + tl.program_id(0)
    LINE, G_LINE = PANEL + row * stride, G + row * stride
    SORTED, COUNTS = SORTED + row * (1 << LOG), COUNTS + row * (1 << LOG)
    BEST = BEST + row * (2 << LOG)
    row_factor = tl.load(ROW_FACTORS + row) if METRIC == "cosine" else 1.0
    total = tl.zeros([1 << LOG], tl.float64)
    num_active = tl.zeros([1 << LOG], tl.int64)
    farthest = row * 0 - _MOST_LONG
    for chunk in range(tl.cdiv(end - begin, 1 << LOG)):
        column, is_key, is_positive, d_p = _load_positives(ORDER, LINE, begin, end, own, chunk, LOG)
        num = tl.sum(is_positive.to(tl.int32), 0)
        _store_shared(BEST, tl.full([2 << LOG], _MOST_LONG, tl.int64))
        _store_shared(SORTED, tl.sort(d_p))
        where = PLACES, LINE, G_LINE, SORTED, BEST, farthest, begin, end, chunk, N, num
        farthest = _place_negatives(*where, WITH_GRADIENT, LOG, BN)
        tl.debug_barrier()
        best = tl.load(BEST + tl.arange(0, 2 << LOG))
        _store_shared(BEST, tl.associative_scan(best, 0, _lower_of, reverse=True))
        place = _rank(SORTED, d_p, num, True, LOG)
        chosen = tl.load(BEST + place, mask=is_positive, other=_MOST_LONG)
        is_beyond = chosen == _MOST_LONG
        n = tl.where(
            is_beyond, N - 1 - (farthest & _MOST).to(tl.int32), (chosen & _MOST).to(tl.int32)
        )
        is_positive = is_positive & (farthest != -_MOST_LONG)
        d_n = tl.load(LINE + n, mask=is_positive, other=0.0)
        is_active = is_positive & (d_p + margin > d_n)
        d_p = tl.where(is_active, d_p, 0.0)
        apart = d_p.to(tl.float64) + margin - d_n.to(tl.float64)
        total += tl.where(is_active, apart, 0.0)
        num_active += is_active.to(tl.int64)
        if WITH_GRADIENT:
            n = tl.where(is_active, n, _MOST)
            _store_shared(COUNTS, tl.sort(n))
            num = tl.sum(is_active.to(tl.int32), 0)
            count = _rank(COUNTS, n, num, True, LOG) - _rank(COUNTS, n, num, False, LOG)
            # Those that chose the same negative find and store the same number.
            before = tl.load(G_LINE + n, mask=is_active, other=0.0).to(tl.float32)
            grad = -_weight(
                count.to(tl.float32), d_n, row_factor, KEY_FACTORS, n, is_active, METRIC
            )
            tl.debug_barrier()
            tl.store(G_LINE + n, (before + grad).to(G.dtype.element_ty), mask=is_active)
            weight = is_active.to(tl.float32)
            _store_positives(
                LINE, G_LINE, column, is_key, weight, d_p, row_factor, KEY_FACTORS, METRIC
            )
    tl.store(SUMS + row, tl.sum(total, 0))
    tl.store(TOTALS + 2 * row, tl.sum(num_active, 0))
    num_valid = tl.where(end - begin < N, end - begin - 1, 0)
    tl.store(TOTALS + 2 * row + 1, num_valid.to(tl.int64))
