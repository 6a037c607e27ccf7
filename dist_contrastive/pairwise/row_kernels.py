"""Triton kernels of rows: what unit length, and the gradient of being brought to it, cost one pass
over the rows each, and products of gradients of scores; shapes and names as in kernels.py.

cosine_kernel          inverse lengths, and cosines of rows with their partners
unit_gradient_kernel   gradient of rows, from that of their multiples of unit length
add_product_kernel     products of gradients of scores and rows in fp32
"""

import triton
import triton.language as tl

# What distances.py has: a length below which rows are not brought to 1, and one below which their
# gradient shrinks, squared.
_NO_LENGTH = tl.constexpr(1e-12)
_SHORT_SQUARE = tl.constexpr(1e-6)


@triton.jit
def _load(X, row, dim, count, D: tl.constexpr):
    """Numbers of rows, in fp32; 0 beyond the last row and dimension."""
    at = X + row[:, None].to(tl.int64) * D + dim[None, :]
    inside = (row < count)[:, None] & (dim < D)[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M", "shift"])
def cosine_kernel(
    X,
    PARTNERS,
    INVERSES,
    COSINES,
    M,
    shift,
    D: tl.constexpr,
    HAS_PARTNERS: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """INVERSES [M] of the lengths of rows, and COSINES [M] of row i with row (i + shift) % M of
    PARTNERS (HAS_PARTNERS). Without UNIT all are taken to have length 1."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    partner = tl.where(row + shift < M, row + shift, row + shift - M)
    square = tl.zeros([BM], tl.float32)
    partner_square = tl.zeros([BM], tl.float32)
    product = tl.zeros([BM], tl.float32)
    for first in range(0, D, BK):
        dim = first + tl.arange(0, BK)
        x = _load(X, row, dim, M, D)
        square += tl.sum(x * x, 1)
        if HAS_PARTNERS:
            y = _load(PARTNERS, partner, dim, M, D)
            partner_square += tl.sum(y * y, 1)
            product += tl.sum(x * y, 1)
    if UNIT:
        inverse = 1.0 / tl.maximum(tl.sqrt_rn(square), _NO_LENGTH)
        product *= inverse
        product *= 1.0 / tl.maximum(tl.sqrt_rn(partner_square), _NO_LENGTH)
        tl.store(INVERSES + row, inverse, mask=row < M)
    if HAS_PARTNERS:
        tl.store(COSINES + row, product, mask=row < M)


@triton.jit
def _gradients(
    ROW_SUMS,
    KEY_SUMS,
    WEIGHT,
    PARTNERS,
    COEFFICIENTS,
    row,
    dim,
    M,
    P,
    shift,
    D: tl.constexpr,
    IS_ROW: tl.constexpr,
    IS_KEY: tl.constexpr,
    HAS_PARTNERS: tl.constexpr,
):
    """Gradients as rows and as keys of `unit_gradient_kernel`; 0 where X is none."""
    weight = tl.load(WEIGHT)
    as_row = tl.zeros([row.shape[0], dim.shape[0]], tl.float32)
    as_key = tl.zeros([row.shape[0], dim.shape[0]], tl.float32)
    # Of rows from P on there is no partner, whatever its number.
    to = tl.where(row + shift < P, row + shift, row + shift - P)
    back = tl.where(row < P, tl.where(row < shift, row - shift + P, row - shift), P)
    if IS_ROW:
        as_row += weight * _load(ROW_SUMS, row, dim, M, D)
        if HAS_PARTNERS:
            coefficient = tl.load(COEFFICIENTS + row, mask=row < P, other=0.0)
            as_row += coefficient[:, None] * _load(PARTNERS, to, dim, P, D)
    if IS_KEY:
        as_key += weight * _load(KEY_SUMS, row, dim, M, D)
        if HAS_PARTNERS:
            coefficient = tl.load(COEFFICIENTS + back, mask=back < P, other=0.0)
            as_key += coefficient[:, None] * _load(PARTNERS, back, dim, P, D)
    return as_row, as_key


@triton.jit(do_not_specialize=["M", "P", "shift"])
def unit_gradient_kernel(
    X,
    ROW_SUMS,
    KEY_SUMS,
    WEIGHT,
    PARTNERS,
    COEFFICIENTS,
    GRAD,
    PRODUCTS,
    M,
    P,
    shift,
    D: tl.constexpr,
    IS_ROW: tl.constexpr,
    IS_KEY: tl.constexpr,
    HAS_PARTNERS: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """GRAD [M, D] of X [M, D], whose multiples have these gradients, each times its factor::

        as rows (IS_ROW)   WEIGHT ROW_SUMS[i] + COEFFICIENTS[i] PARTNERS[(i + shift) % P]
        as keys (IS_KEY)   WEIGHT KEY_SUMS[i] + COEFFICIENTS[j] PARTNERS[j], j = (i - shift) % P

    With UNIT the factor is 1 / length: what points along X is taken off, and what is left is made
    to shrink where X is short.

    PRODUCTS [M]: those of X with its gradient as rows, of which that of a common scale is made.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    square = tl.zeros([BM], tl.float32)
    row_product = tl.zeros([BM], tl.float32)
    key_product = tl.zeros([BM], tl.float32)
    along = tl.zeros([BM], tl.float32)
    share = tl.zeros([BM], tl.float32)
    for is_last in tl.static_range(2):  # what points along X is known when all of it has been read
        for first in range(0, D, BK):
            dim = first + tl.arange(0, BK)
            as_row, as_key = _gradients(
                ROW_SUMS,
                KEY_SUMS,
                WEIGHT,
                PARTNERS,
                COEFFICIENTS,
                row,
                dim,
                M,
                P,
                shift,
                D,
                IS_ROW,
                IS_KEY,
                HAS_PARTNERS,
            )
            x = _load(X, row, dim, M, D)
            if is_last:
                total = as_row + as_key
                if UNIT:
                    total = (total - along[:, None] * x) * share[:, None]
                at = GRAD + row[:, None].to(tl.int64) * D + dim[None, :]
                inside = (row < M)[:, None] & (dim < D)[None, :]
                tl.store(at, total.to(GRAD.dtype.element_ty), mask=inside)
            else:
                square += tl.sum(x * x, 1)
                row_product += tl.sum(x * as_row, 1)
                key_product += tl.sum(x * as_key, 1)
        has_length = square > _NO_LENGTH * _NO_LENGTH
        along = tl.where(has_length, (row_product + key_product) / square, 0.0)
        share = tl.minimum(square / _SHORT_SQUARE, 1.0)
    if IS_ROW:
        tl.store(PRODUCTS + row, row_product, mask=row < M)


@triton.jit(do_not_specialize=["R", "K"])
def add_product_kernel(
    G,
    Y,
    OUT,
    R,
    K,
    stride,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Adds ``G @ Y`` to OUT [R, D], or ``G.T @ Y`` (TRANSPOSED), of Y [K, D].

    Lines of G have `stride` numbers, a multiple of 16: what fills them up is read, and finite.

    Program (i, j) makes rows i BM ... and dimensions j BN ...; BK terms are added in a step.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    dim, term = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Of these the compiler knows that four numbers at a time are inside.
    filled_rows, filled_terms = tl.cdiv(R, 16) * 16, tl.cdiv(K, 16) * 16
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        k = first + term
        k_at = k[:, None].to(tl.int64)
        y_at = Y + k_at * D + dim[None, :]
        y = tl.load(y_at, mask=(k < K)[:, None] & (dim < D)[None, :], other=0.0)
        if TRANSPOSED:
            inside = (k < K)[:, None] & (row < filled_rows)[None, :]
            g = tl.trans(tl.load(G + k_at * stride + row[None, :], mask=inside, other=0.0))
        else:
            inside = (row < R)[:, None] & (k < filled_terms)[None, :]
            g_at = G + row[:, None].to(tl.int64) * stride + k[None, :]
            g = tl.load(g_at, mask=inside, other=0.0)
        total = tl.dot(g, y, total, input_precision=PRECISION)
    at = OUT + row[:, None].to(tl.int64) * D + dim[None, :]
    inside = (row < R)[:, None] & (dim < D)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
