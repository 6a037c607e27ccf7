"""Triton kernels of the contrastive force: panels of distances, and what all kernels share. Sums
over keys are in sum_kernels.py, weighted sums of differences in weight_kernels.py.

A panel [G, P, stride] has the pairs of some rows of every group and all keys of a block. Distances
are infinite where two points are one and the same, where their labels differ, and beyond the last
key: nothing acts there. Points that coincide have 0, exactly.

Shapes: X [G, R, D] and Y [G, N, D] rows and keys, contiguous, of which a program takes rows
``first + row`` with row below M. Numbers of temperatures are [T, G, R] and [T, G, N], in powers of
2. BM x BN is the tile, BK the dimensions of a step. Kernels wait for nothing and use no atomics.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
# |x|^2 + |y|^2 - 2xy keeps about eps (|x|^2 + |y|^2) of absolute error. Below this share of these
# the squared distance is computed again from differences.
_CLOSE = tl.constexpr(1e-2)

# They differ from step to step; a kernel for each would be compiled again and again.
SIZES = ["M", "P", "N", "R", "G", "first", "parts", "sides", "split", "num_negative", "out_rows"]


@triton.jit
def place_of_program(M, parts, BM: tl.constexpr):
    """Group, first row, and part of the keys, of this program."""
    program, blocks = tl.program_id(0), tl.cdiv(M, BM)
    part, block = program % parts, program // parts
    # 64-bit, and with it all addresses: 2^31 numbers are a panel of 46,341 points.
    return (block // blocks).to(tl.int64), block % blocks * BM, part


@triton.jit
def first_block(begin, end, part, parts, BN: tl.constexpr):
    """The first block of keys begin to end in a part of them; that of part + 1 ends it."""
    first = begin // BN
    in_part = tl.cdiv(tl.cdiv(end, BN) - first, parts)
    return tl.minimum(first + part * in_part, tl.cdiv(end, BN))


@triton.jit
def span_of_part(part, parts, sides, split, N, BN: tl.constexpr):
    """First key, last key and blocks of a part, where the first half of the parts are of the keys
    before `split`, and the others of those from there on; of one side all are before it."""
    in_side, side = parts // sides, part // (parts // sides)
    begin, end = tl.where(side == 0, 0, split), tl.where(side == 0, split, N)
    part = part % in_side
    first = first_block(begin, end, part, in_side, BN)
    return begin, end, first, first_block(begin, end, part + 1, in_side, BN)


@triton.jit
def panel_tile(PANEL, g, row, key, M, P, stride):
    """Numbers of a panel; infinite beyond its rows and columns."""
    at = PANEL + (g * P + row[:, None]) * stride + key[None, :]
    # Of a stride that is a multiple of 16 the compiler knows: four numbers at a time are inside.
    return tl.load(at, mask=(row < M)[:, None] & (key < stride)[None, :], other=INF)


@triton.jit
def any_of(x):
    """Whether any of [BM, BN] is true."""
    return tl.max(tl.max(x.to(tl.int32), 1), 0) > 0


@triton.jit
def log_affinity(
    RATES,
    ROW_TERMS,
    KEY_TERMS,
    LOG_WEIGHTS,
    x,
    t,
    g,
    first,
    row,
    key,
    is_row,
    is_key,
    R,
    N,
    G,
    log_floor,
    HAS_FLOOR: tl.constexpr,
):
    """log2 A of a tile at a temperature less the row terms; with a floor the whole, but not below
    it, and times the weights of keys. x are distances less half of both nearest ones."""
    at = (t * G + g) * R + first + row
    rate = tl.load(RATES + at, mask=is_row, other=1.0)
    key_term = tl.load(KEY_TERMS + (t * G + g) * N + key, mask=is_key, other=-INF)
    z = key_term[None, :] - rate[:, None] * x
    if HAS_FLOOR:
        row_term = tl.load(ROW_TERMS + at, mask=is_row, other=-INF)
        log_weight = tl.load(LOG_WEIGHTS + g * N + key, mask=is_key, other=-INF)
        z += row_term[:, None]
        z = tl.maximum(z, log_floor, propagate_nan=tl.PropagateNan.ALL) + log_weight[None, :]
    return z


@triton.jit
def tile_of_program(program, M, stride, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Group, first row and first key of a program's tile of a panel; GROUP blocks of rows share
    keys in the cache."""
    num_rows, num_keys = tl.cdiv(M, BM), tl.cdiv(stride, BN)
    g, program = program // (num_rows * num_keys), program % (num_rows * num_keys)
    group, place = program // (GROUP * num_keys), program % (GROUP * num_keys)
    size = tl.minimum(num_rows - group * GROUP, GROUP)
    return g.to(tl.int64), (group * GROUP + place % size) * BM, place // size * BN


@triton.jit
def interacting(ROW_LABELS, KEY_LABELS, OWN, row, key, is_row, is_key, HAS_LABELS: tl.constexpr):
    """Which pairs of a tile are two points of one label; pointers are those of the panel's rows and
    of all keys."""
    own = tl.load(OWN + row, mask=is_row, other=-1)
    counts = is_row[:, None] & is_key[None, :] & (own[:, None] != key[None, :])
    if HAS_LABELS:
        row_label = tl.load(ROW_LABELS + row, mask=is_row, other=-1)
        key_label = tl.load(KEY_LABELS + key, mask=is_key, other=-2)
        counts = counts & (row_label[:, None] == key_label[None, :])
    return counts


@triton.jit
def may_interact(ROW_LABELS, KEY_LABELS, is_row, is_key):
    """Whether labels of rows and of keys overlap: where they are sorted, most tiles' do not."""
    most = 2147483647
    first_row = tl.min(tl.load(ROW_LABELS, mask=is_row, other=most), 0)
    last_row = tl.max(tl.load(ROW_LABELS, mask=is_row, other=-1), 0)
    first_key = tl.min(tl.load(KEY_LABELS, mask=is_key, other=most), 0)
    last_key = tl.max(tl.load(KEY_LABELS, mask=is_key, other=-1), 0)
    return (first_row <= last_key) & (first_key <= last_row)


@triton.jit(do_not_specialize=SIZES)
def distance_kernel(
    X,
    Y,
    ROW_SQUARES,
    KEY_SQUARES,
    ROW_LABELS,
    KEY_LABELS,
    OWN,
    PANEL,
    CLOSE,
    M,
    P,
    N,
    R,
    first,
    stride,
    D: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Distances of rows and keys, of a product.

    *_SQUARES: squared norms [G, R], [G, N]. *_LABELS: int32 [R], [N]. OWN: int32 [R], the key that
    is the row itself; -1: none. CLOSE: int32 of a program, whether its tile has close pairs, whose
    distances are noise until `difference_kernel` has repaired them.
    """
    g, first_row, first_key = tile_of_program(tl.program_id(0), M, stride, GROUP, BM, BN)
    row, key, dim = first_row + tl.arange(0, BM), first_key + tl.arange(0, BN), tl.arange(0, BK)
    is_row, is_key = row < M, key < N
    at_row, at_key = g * R + first + row, g * N + key
    x_at, y_at = X + at_row[:, None] * D + dim[None, :], Y + at_key[:, None] * D + dim[None, :]
    product = tl.zeros([BM, BN], tl.float32)
    num_dims = D
    if HAS_LABELS:
        num_dims = tl.where(
            may_interact(ROW_LABELS + first + row, KEY_LABELS + key, is_row, is_key), D, 0
        )
    for start in range(0, num_dims, BK):
        if D % BK == 0:
            x = tl.load(x_at + start, mask=is_row[:, None], other=0.0)
            y = tl.load(y_at + start, mask=is_key[:, None], other=0.0)
        else:
            is_dim = (dim < D - start)[None, :]
            x = tl.load(x_at + start, mask=is_row[:, None] & is_dim, other=0.0)
            y = tl.load(y_at + start, mask=is_key[:, None] & is_dim, other=0.0)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
    row_square = tl.load(ROW_SQUARES + at_row, mask=is_row, other=0.0)
    key_square = tl.load(KEY_SQUARES + at_key, mask=is_key, other=0.0)
    magnitude = row_square[:, None] + key_square[None, :]
    square = magnitude - 2.0 * product
    labels = ROW_LABELS + first, KEY_LABELS, OWN + first
    counts = interacting(labels[0], labels[1], labels[2], row, key, is_row, is_key, HAS_LABELS)
    is_close = counts & (square < magnitude * _CLOSE)
    tl.store(CLOSE + tl.program_id(0), any_of(is_close).to(tl.int32))
    square = tl.where(square < 0, 0.0, square)  # NaN stays
    d = tl.where(counts, tl.sqrt_rn(square), INF)
    at = PANEL + (g * P + row[:, None]) * stride + key[None, :]
    tl.store(at, d, mask=is_row[:, None] & (key < stride)[None, :])


@triton.jit(do_not_specialize=SIZES)
def difference_kernel(
    X,
    Y,
    ROW_SQUARES,
    KEY_SQUARES,
    ROW_LABELS,
    KEY_LABELS,
    OWN,
    PANEL,
    CLOSE,
    M,
    P,
    N,
    R,
    first,
    stride,
    D: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Distances by differences: of ALL pairs, or of close ones in the place of what
    `distance_kernel` found; programs whose tile has none of these end at once. Two programs share
    a tile, which is too large for one's registers."""
    if not ALL:  # noqa: SIM102  # a condition of the compiler, and one of the device
        if tl.load(CLOSE + tl.program_id(0) // 2) == 0:
            return
    g, first_row, first_key = tile_of_program(tl.program_id(0) // 2, M, stride, GROUP, BM, BN)
    HALF: tl.constexpr = BM // 2
    row = first_row + tl.program_id(0) % 2 * HALF + tl.arange(0, HALF)
    key = first_key + tl.arange(0, BN)
    is_row, is_key = row < M, key < N
    at_row, at_key = g * R + first + row, g * N + key
    square = tl.zeros([HALF, BN], tl.float32)
    for i in tl.range(D, loop_unroll_factor=1):
        x = tl.load(X + at_row * D + i, mask=is_row, other=0.0)
        y = tl.load(Y + at_key * D + i, mask=is_key, other=0.0)
        difference = x[:, None] - y[None, :]
        square += difference * difference
    d = tl.sqrt_rn(square)
    at = PANEL + (g * P + row[:, None]) * stride + key[None, :]
    inside = is_row[:, None] & (key < stride)[None, :]
    if ALL:
        labels = ROW_LABELS + first, KEY_LABELS, OWN + first
        counts = interacting(labels[0], labels[1], labels[2], row, key, is_row, is_key, HAS_LABELS)
        d = tl.where(counts, d, INF)
    else:
        row_square = tl.load(ROW_SQUARES + at_row, mask=is_row, other=0.0)
        key_square = tl.load(KEY_SQUARES + at_key, mask=is_key, other=0.0)
        magnitude = row_square[:, None] + key_square[None, :]
        before = tl.load(at, mask=inside, other=INF)
        # With a margin, since what was squared has been rounded twice more.
        inside = inside & (before * before < magnitude * _CLOSE * 1.01)
    tl.store(at, d, mask=inside)
