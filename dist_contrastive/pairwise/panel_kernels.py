"""Triton kernels of panels: distances of some rows to all keys; gradients by pairs of positives.

spans_kernel      which keys are similar to each row, by continuous labels
panel_kernel      distances of some rows and the keys of a block, those of positives exact
positive_kernel   gradients by pairs of positives, from differences

PANEL [M, stride] has the distances of rows to all keys. ORDER: int32 [keys], keys sorted by tag; of
row i those from BEGINS to ENDS are its positives, and its own key: the host knows no numbers of
positives. PLACES: int32 [N], of each key its place in ORDER. Other shapes and names as in
kernels.py.
"""

import triton
import triton.language as tl

from dist_contrastive.pairwise.distance_kernels import CLOSE, any_of, load_rows, pair_values
from dist_contrastive.pairwise.kernels import part_of, row_factors, tile_product

_NUMBERS = ["M", "N", "first", "first_row", "count"]


@triton.jit
def _place_of(KEY_IDS, ORDER, label, sample, most, N, steps, AFTER: tl.constexpr, BM: tl.constexpr):
    """The first place in ORDER that is not before what is similar to rows, or the one AFTER it."""
    low = tl.zeros([BM], tl.int32)
    high = low + N
    for _ in range(steps):
        place, is_open = (low + high) // 2, low < high
        at = KEY_IDS + 3 * tl.load(ORDER + place, mask=is_open, other=0).to(tl.int64)
        key_label = tl.load(at, mask=is_open, other=0.0)
        key_sample = tl.load(at + 1, mask=is_open, other=0.0)
        is_missing, apart = key_label != key_label, key_label - label
        if AFTER:
            by_sample, by_label = key_sample > sample, is_missing | (apart > most)
            is_right = tl.where(label != label, is_missing & by_sample, by_label)
        else:
            by_sample, by_label = key_sample < sample, ~is_missing & (apart < -most)
            is_right = ~tl.where(label != label, ~is_missing | by_sample, by_label)
        low = tl.where(is_open & ~is_right, place + 1, low)
        high = tl.where(is_open & is_right, place, high)
    return low


@triton.jit(do_not_specialize=["M", "N", "steps"])
def spans_kernel(ROW_IDS, KEY_IDS, ORDER, BEGINS, ENDS, M, N, steps, BM: tl.constexpr):
    """BEGINS, ENDS: int32 [M], from where to where in ORDER keys are similar to rows, by ids in
    fp64 as `similar_pairs` has them: its differences, which round, but never change their order.

    ORDER has keys by ascending label; those without one, NaN, are last, by sample. All keys of a
    sample have the same label. 2^steps is above N. Program i takes rows i BM ...
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    at, is_row = ROW_IDS + row.to(tl.int64) * 3, row < M
    label = tl.load(at, mask=is_row, other=0.0)
    sample = tl.load(at + 1, mask=is_row, other=0.0)
    most = tl.load(at + 2, mask=is_row, other=0.0)
    wanted = KEY_IDS, ORDER, label, sample, most, N, steps
    tl.store(BEGINS + row, _place_of(*wanted, False, BM), mask=is_row)
    tl.store(ENDS + row, _place_of(*wanted, True, BM), mask=is_row)


@triton.jit
def _distance(value, METRIC: tl.constexpr):
    """Distances from squares of differences, or cosine distances."""
    return tl.sqrt_rn(tl.maximum(value, 0.0)) if METRIC == "euclidean" else value


@triton.jit
def _exact_close(
    square, magnitude, counts, X, Y, row, first_key, D: tl.constexpr, BK: tl.constexpr
):
    """Squares of a tile, those of close pairs that count computed again, one of a row at a time."""
    square = tl.where(counts & (square < magnitude * CLOSE), -1.0, square)
    one = tl.full([square.shape[0]], 1.0, tl.float32)
    is_wanted = tl.min(square, 1) < 0
    while any_of(is_wanted):
        at = tl.argmin(square, 1)
        exact = pair_values(X, Y, row, first_key + at, is_wanted, one, one, 0.0, D, False, BK)
        is_at = tl.arange(0, square.shape[1])[None, :] == at[:, None]
        square = tl.where(is_at & is_wanted[:, None], exact[:, None], square)
        is_wanted = tl.min(square, 1) < 0
    return square


@triton.jit
def _panel_tile(
    tile,
    EXACT_X,
    EXACT_Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_SQUARES,
    KEY_SQUARES,
    PLACES,
    BEGINS,
    ENDS,
    PANEL,
    M,
    N,
    stride,
    row,
    first_key,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    BK: tl.constexpr,
):
    """Distances of a part of a tile, but for those of similar rows that are not cosine."""
    key = first_key + tl.arange(0, tile.shape[1])
    inside = (row < M)[:, None] & (key < N)[None, :]
    if METRIC == "cosine":
        row_factor = row_factors(ROW_FACTORS, row, M, True)
        key_factor = row_factors(KEY_FACTORS, key, N, True)
        value = 1.0 - tile * row_factor[:, None] * key_factor[None, :]
    else:
        row_square = tl.load(ROW_SQUARES + row, mask=row < M, other=0.0)
        key_square = tl.load(KEY_SQUARES + key, mask=key < N, other=0.0)
        magnitude = row_square[:, None] + key_square[None, :]
        begin = tl.load(BEGINS + row, mask=row < M, other=0)[:, None]
        end = tl.load(ENDS + row, mask=row < M, other=0)[:, None]
        place = tl.load(PLACES + key, mask=key < N, other=0)[None, :]
        inside = inside & ((place < begin) | (place >= end))
        square = magnitude - 2.0 * tile
        value = _exact_close(square, magnitude, inside, EXACT_X, EXACT_Y, row, first_key, D, BK)
    at = PANEL + row[:, None].to(tl.int64) * stride + key[None, :]
    tl.store(at, _distance(value, METRIC), mask=inside)


@triton.jit
def _panel_positives(
    EXACT_X,
    EXACT_Y,
    ORDER,
    BEGINS,
    ENDS,
    PANEL,
    row,
    N,
    first,
    stride,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Distances of a row to its positives in the block, whose first key is column `first`."""
    one = tl.full([BP], 1.0, tl.float32)
    rows = tl.zeros([BP], tl.int32) + row
    for start in range(tl.load(BEGINS + row), tl.load(ENDS + row), BP):
        place = start + tl.arange(0, BP)
        key = tl.load(ORDER + place, mask=place < tl.load(ENDS + row), other=-1) - first
        is_key = (key >= 0) & (key < N)
        value = pair_values(EXACT_X, EXACT_Y, rows, key, is_key, one, one, 0.0, D, False, BK)
        at = PANEL + row.to(tl.int64) * stride + key
        tl.store(at, _distance(value, METRIC), mask=is_key)


@triton.jit(do_not_specialize=_NUMBERS)
def panel_kernel(
    X,
    Y,
    EXACT_X,
    EXACT_Y,
    ROW_FACTORS,
    KEY_FACTORS,
    ROW_SQUARES,
    KEY_SQUARES,
    PLACES,
    ORDER,
    BEGINS,
    ENDS,
    PANEL,
    M,
    N,
    first,
    stride,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Distances of rows to the keys of a block, PANEL [M, stride] from the block's column `first`
    on. X, Y may be moved to where rounding is least, EXACT_* are as they were given.

    The first programs take tiles, of which those next to each other share keys; M more one row and
    its positives, unless METRIC is cosine, whose products lose nothing.
    """
    blocks = tl.cdiv(M, BM)
    tiles = blocks * tl.cdiv(N, BN)
    program = tl.program_id(0)
    if program < tiles:
        tile_row = program % blocks * BM + tl.arange(0, BM)
        first_key = program // blocks * BN
        tile = tile_product(X, Y, tile_row, first_key + tl.arange(0, BN), M, N, D, PRECISION, BK)
        for i in tl.static_range(PARTS):
            _panel_tile(
                part_of(tile, i, PARTS),
                EXACT_X,
                EXACT_Y,
                ROW_FACTORS,
                KEY_FACTORS,
                ROW_SQUARES,
                KEY_SQUARES,
                PLACES,
                BEGINS,
                ENDS,
                PANEL + first,
                M,
                N,
                stride,
                tile_row,
                first_key + i * (BN // PARTS),
                D,
                METRIC,
                BK,
            )
    else:
        lists = ORDER, BEGINS, ENDS, PANEL + first
        row = program - tiles
        _panel_positives(EXACT_X, EXACT_Y, *lists, row, N, first, stride, D, METRIC, BP, BK)


@triton.jit
def _add_differences(
    X,
    Y,
    SUMS,
    COEFFICIENTS,
    ORDER,
    begin,
    end,
    number,
    first,
    count,
    stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Subtract from SUMS [.., WIDTH], at `number`, ``sum_j c_j (x - y_j)`` with x = X[number] over
    those j from ORDER for which Y[j - first] is one of `count`; c_j is COEFFICIENTS[j stride]."""
    start_dim = tl.program_id(1) * BK
    dim = start_dim + tl.arange(0, BK)
    x = tl.load(X + number.to(tl.int64) * D + dim, mask=dim < D, other=0.0).to(tl.float32)
    total = tl.zeros([BP, BK], tl.float32)
    for start in range(begin, end, BP):
        place = start + tl.arange(0, BP)
        other = tl.load(ORDER + place, mask=place < end, other=-1) - first
        is_other = (other >= 0) & (other < count)
        c = tl.load(COEFFICIENTS + other.to(tl.int64) * stride, mask=is_other, other=0.0)
        y = load_rows(Y, other, is_other, start_dim, D, BK)
        total += tl.where(c != 0, c, 0.0)[:, None] * (x[None, :] - y)
    at = SUMS + number.to(tl.int64) * WIDTH + dim
    before = tl.load(at, mask=dim < D, other=0.0)
    tl.store(at, before - tl.sum(total, 0), mask=dim < D)


@triton.jit(do_not_specialize=_NUMBERS)
def positive_kernel(
    X,
    Y,
    PANEL,
    ORDER,
    BEGINS,
    ENDS,
    ROW_ORDER,
    KEY_BEGINS,
    KEY_ENDS,
    ROW_SUMS,
    KEY_SUMS,
    M,
    N,
    first,
    first_row,
    stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Subtract from ROW_SUMS [M, WIDTH] ``sum_j c_ij (x_i - y_j)`` over positives j in the block,
    and from KEY_SUMS [N, WIDTH] ``sum_i c_ij (y_j - x_i)``; PANEL has the c_ij.

    Rows are `first_row` on of those in ROW_ORDER, which are sorted by id and of which key j's are
    those from KEY_BEGINS to KEY_ENDS; keys are column `first` on. Program (i, s) takes row i or key
    i - M, and dimensions s BK ...
    """
    program = tl.program_id(0)
    if program < M:
        begin, end = tl.load(BEGINS + program), tl.load(ENDS + program)
        line = PANEL + program.to(tl.int64) * stride + first
        lists = line, ORDER, begin, end, program, first, N, 1
        _add_differences(X, Y, ROW_SUMS, *lists, D, WIDTH, BP, BK)
    else:
        key = program - M
        begin, end = tl.load(KEY_BEGINS + key), tl.load(KEY_ENDS + key)
        lists = PANEL + first + key, ROW_ORDER, begin, end, key, first_row, M, stride
        _add_differences(Y, X, KEY_SUMS, *lists, D, WIDTH, BP, BK)
