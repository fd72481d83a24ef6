"""Triton kernels: ``factor * P x + rest * x`` by CholeskyQR2, with all d x d matrices on the chip.

Each program works on the matrix of one (batch, head), or on a part of its tokens. It has three
steps:

1. Compute G = Q^T Q over its tokens, and from it T with T T^T (G + shift I) = I.
2. Compute A = Q T, M = A^T A + rho T^T T and U = A^T x over its tokens.
3. Compute X = M^{-1} U, and A X over its tokens. A is the same as in step 2, bit for bit.

:func:`fused` does all three steps. If there are too few matrices for the device, the tokens of each
matrix are split. Then :func:`gram`, :func:`inner` and :func:`outer` do one step each.

d is padded to a power of two. Columns of zeros get coefficients of zero and change nothing else.
PRECISION says how many products on tensor cores compute one product of float32 numbers.
"""

# Triton reads the annotations of a kernel, so they must not be strings.
import torch
import triton
import triton.language as tl

from spanopt.mathematics.gram import least_trace

__all__ = ["fused", "gram", "inner", "outer"]

_LEAST_TRACE = tl.constexpr(least_trace(torch.float32))


@triton.jit
def fused(
    out, x, q, mask, factor, rest, x_b, x_h, x_n, x_d, q_b, q_h, q_n, q_d, mask_b, mask_h, mask_n,
    out_b, out_h, out_n, out_d, factor_h, rest_h, heads, length, d, ridge, shift,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, GRAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do all three steps for one matrix."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q += _offset(batch, head, q_b, q_h)
    x += _offset(batch, head, x_b, x_h)
    if mask is not None:
        mask += _offset(batch, head, mask_b, mask_h)
    g, scale = _products(q, q_n, q_d, mask, mask_n, 0, length, d, WIDTH, ROWS, GRAM, PRECISION)
    t, trace = _whitening(g, shift, WIDTH)
    m, u = _inner(
        t, scale, q, q_n, q_d, x, x_n, x_d, mask, mask_n, 0, length, d, WIDTH, ROWS, PRECISION
    )
    c = _solved(m, u, t, ridge * trace, ridge / shift, WIDTH, PRECISION)
    _outer(
        c, t, scale, out + _offset(batch, head, out_b, out_h), out_n, out_d, q, q_n, q_d,
        x, x_n, x_d, mask, mask_n, factor, factor_h, rest, rest_h, head, 0, length, d,
        WIDTH, ROWS, PRECISION,
    )  # fmt: skip


@triton.jit
def gram(
    grams, scales, q, mask, q_b, q_h, q_n, q_d, mask_b, mask_h, mask_n, heads, length, d, splits,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, GRAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do step 1 for a part of the tokens.

    This writes ``grams`` (matrices, splits, WIDTH, WIDTH) and ``scales`` (matrices, splits).
    """
    matrix, first, last = _part(length, splits, ROWS)
    batch, head = matrix // heads, matrix % heads
    q += _offset(batch, head, q_b, q_h)
    if mask is not None:
        mask += _offset(batch, head, mask_b, mask_h)
    g, scale = _products(q, q_n, q_d, mask, mask_n, first, last, d, WIDTH, ROWS, GRAM, PRECISION)
    tl.store(grams + _square(tl.program_id(0), WIDTH), g)
    tl.store(scales + tl.program_id(0), scale)


@triton.jit
def inner(
    ms, us, ts, kept, grams, scales, x, q, mask, x_b, x_h, x_n, x_d, q_b, q_h, q_n, q_d,
    mask_b, mask_h, mask_n, heads, length, d, splits, shift,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do step 2 for a part of the tokens. This writes ``ms`` and ``us``, shaped like ``grams``.

    The first part of each matrix also stores what all its parts share: ``ts`` (matrices, WIDTH,
    WIDTH), and in ``kept`` (matrices, 2) the scale and the trace of G.
    """
    matrix, first, last = _part(length, splits, ROWS)
    batch, head = matrix // heads, matrix % heads
    q += _offset(batch, head, q_b, q_h)
    x += _offset(batch, head, x_b, x_h)
    if mask is not None:
        mask += _offset(batch, head, mask_b, mask_h)
    scale = tl.load(scales + matrix * splits)
    for part in range(1, splits):
        scale = tl.minimum(scale, tl.load(scales + matrix * splits + part))
    g = tl.zeros([WIDTH, WIDTH], tl.float32)
    for part in range(splits):
        ratio = scale / tl.load(scales + matrix * splits + part)  # a power of two, at most 1
        g += tl.load(grams + _square(matrix * splits + part, WIDTH)) * ratio * ratio
    t, trace = _whitening(g, shift, WIDTH)
    if first == 0:
        tl.store(ts + _square(matrix, WIDTH), t)
        tl.store(kept + 2 * matrix, scale)
        tl.store(kept + 2 * matrix + 1, trace)
    m, u = _inner(
        t, scale, q, q_n, q_d, x, x_n, x_d, mask, mask_n, first, last, d, WIDTH, ROWS, PRECISION
    )
    tl.store(ms + _square(tl.program_id(0), WIDTH), m)
    tl.store(us + _square(tl.program_id(0), WIDTH), u)


@triton.jit
def outer(
    out, ms, us, ts, kept, x, q, mask, factor, rest, x_b, x_h, x_n, x_d, q_b, q_h, q_n, q_d,
    mask_b, mask_h, mask_n, out_b, out_h, out_n, out_d, factor_h, rest_h,
    heads, length, d, splits, ridge, shift,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do step 3 for a part of the tokens."""
    matrix, first, last = _part(length, splits, ROWS)
    batch, head = matrix // heads, matrix % heads
    q += _offset(batch, head, q_b, q_h)
    x += _offset(batch, head, x_b, x_h)
    if mask is not None:
        mask += _offset(batch, head, mask_b, mask_h)
    m = tl.zeros([WIDTH, WIDTH], tl.float32)
    u = tl.zeros([WIDTH, WIDTH], tl.float32)
    for part in range(splits):
        m += tl.load(ms + _square(matrix * splits + part, WIDTH))
        u += tl.load(us + _square(matrix * splits + part, WIDTH))
    t = tl.load(ts + _square(matrix, WIDTH))
    scale = tl.load(kept + 2 * matrix)
    trace = tl.load(kept + 2 * matrix + 1)
    c = _solved(m, u, t, ridge * trace, ridge / shift, WIDTH, PRECISION)
    _outer(
        c, t, scale, out + _offset(batch, head, out_b, out_h), out_n, out_d, q, q_n, q_d,
        x, x_n, x_d, mask, mask_n, factor, factor_h, rest, rest_h, head, first, last, d,
        WIDTH, ROWS, PRECISION,
    )  # fmt: skip


@triton.jit
def _part(length, splits, ROWS: tl.constexpr):
    """Return the matrix of this program, its first token and the end of its tokens."""
    each = tl.cdiv(tl.cdiv(length, splits), ROWS) * ROWS
    first = tl.program_id(0) % splits * each
    return tl.program_id(0) // splits, first, tl.minimum(first + each, length)


@triton.jit
def _offset(batch, head, batch_stride, head_stride):
    return batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _square(index, WIDTH: tl.constexpr):
    """Return the offsets of one matrix in a contiguous tensor of matrices."""
    at = tl.arange(0, WIDTH)
    return index.to(tl.int64) * (WIDTH * WIDTH) + at[:, None] * WIDTH + at[None, :]


@triton.jit
def _real(mask, mask_n, rows, last):
    """Return which rows are tokens of this program and are not masked."""
    inside = rows < last
    if mask is not None:
        real = tl.load(mask + rows.to(tl.int64) * mask_n, mask=inside, other=0)
        inside = inside & (real != 0)
    return inside


@triton.jit
def _block(start, row_stride, column_stride, rows, inside, d, WIDTH: tl.constexpr):
    """Return rows of a matrix in float32. A row that is not inside becomes zeros."""
    columns = tl.arange(0, WIDTH)
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(start + at, mask=inside[:, None] & (columns < d)[None, :], other=0).to(
        tl.float32
    )


@triton.jit
def _products(
    q, q_n, q_d, mask, mask_n, first, last, d,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, GRAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the Gram matrix of some rows after multiplying them by a scale, and that scale.

    The scale is 1 if float32 can add up the squares of the entries. Otherwise it is a power of two
    that brings the largest entry near 1.
    """
    scale = tl.full([], 1.0, tl.float32)
    g = _sum_of_products(
        scale, q, q_n, q_d, mask, mask_n, first, last, d, WIDTH, ROWS, GRAM, PRECISION
    )
    trace = _trace(g, WIDTH)
    if not ((trace > 1e-20) & (trace < 1e20)):  # also true for NaN
        largest = tl.full([], 0.0, tl.float32)
        for start in range(first, last, ROWS):
            rows = start + tl.arange(0, ROWS)
            block = _block(q, q_n, q_d, rows, _real(mask, mask_n, rows, last), d, WIDTH)
            largest = tl.maximum(largest, tl.max(tl.abs(block)))
        scale = _inverse_power(largest)
        g = _sum_of_products(
            scale, q, q_n, q_d, mask, mask_n, first, last, d, WIDTH, ROWS, GRAM, PRECISION
        )
    return g, scale


@triton.jit
def _sum_of_products(
    scale, q, q_n, q_d, mask, mask_n, first, last, d,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, GRAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.zeros([WIDTH, WIDTH], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        block = _block(q, q_n, q_d, rows, _real(mask, mask_n, rows, last), d, WIDTH)
        block = (block * scale).to(GRAM)  # float32 holds products of half precision exactly
        g = tl.dot(tl.trans(block), block, g, input_precision=PRECISION)
    return g


@triton.jit
def _inverse_power(x):
    """Return a power of two near 1 / x, as :mod:`spanopt.mathematics.magnitudes` does."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _trace(square, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    return tl.sum(tl.where(at[:, None] == at[None, :], square, 0.0))


@triton.jit
def _whitening(g, shift, WIDTH: tl.constexpr):
    """Return T with T T^T (G + shift trace(G) I) = I, upper triangular, and the trace."""
    trace = tl.maximum(_trace(g, WIDTH), _LEAST_TRACE, propagate_nan=tl.PropagateNan.ALL)
    trace = tl.where(trace < float("inf"), trace, float("nan"))
    at = tl.arange(0, WIDTH)
    g += tl.where(at[:, None] == at[None, :], shift * trace, 0.0)
    return tl.trans(_inverse_factor(g, shift * trace, WIDTH)), trace


@triton.jit
def _inverse_factor(s, least, WIDTH: tl.constexpr):
    """Return L^{-1} for S = L L^T, by elimination in place.

    In exact arithmetic no pivot is below ``least``. Smaller pivots, due to rounding, are raised to
    it.
    """
    at = tl.arange(0, WIDTH)
    row, column = at[:, None], at[None, :]
    pivots = tl.full([WIDTH], 1.0, tl.float32)
    for j in range(WIDTH):
        # Left of column j, S holds the computed columns of the inverse of the unit lower factor.
        at_row = tl.sum(tl.where(row == j, s, 0.0), axis=0)
        at_column = tl.sum(tl.where(column == j, s, 0.0), axis=1)
        pivot = tl.sum(tl.where(at == j, at_row, 0.0))
        pivot = tl.maximum(pivot, least, propagate_nan=tl.PropagateNan.ALL)
        left = tl.where(column == j, 0.0, s)
        taken = (at_column / pivot)[:, None] * tl.where(at == j, 1.0, at_row)[None, :]
        s = tl.where(row > j, left - taken, s)
        pivots = tl.where(at == j, pivot, pivots)
    unit = tl.where(column < row, s, tl.where(column == row, 1.0, 0.0))
    return unit / tl.sqrt(pivots)[:, None]


@triton.jit
def _inner(
    t, scale, q, q_n, q_d, x, x_n, x_d, mask, mask_n, first, last, d,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return A^T A and A^T x, summed over some rows."""
    m = tl.zeros([WIDTH, WIDTH], tl.float32)
    u = tl.zeros([WIDTH, WIDTH], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = _real(mask, mask_n, rows, last)
        block = _block(q, q_n, q_d, rows, inside, d, WIDTH) * scale
        a = tl.dot(block, t, input_precision=PRECISION)
        m = tl.dot(tl.trans(a), a, m, input_precision=PRECISION)
        block = _block(x, x_n, x_d, rows, inside, d, WIDTH)
        u = tl.dot(tl.trans(a), block, u, input_precision=PRECISION)
    return m, u


@triton.jit
def _solved(m, u, t, rho, least, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Return the coefficients (M + rho T^T T)^{-1} U."""
    m = tl.dot(tl.trans(t), t * rho, m, input_precision=PRECISION)
    inverse = _inverse_factor(m, least, WIDTH)
    return tl.dot(
        tl.trans(inverse), tl.dot(inverse, u, input_precision=PRECISION), input_precision=PRECISION
    )


@triton.jit
def _outer(
    c, t, scale, out, out_n, out_d, q, q_n, q_d, x, x_n, x_d, mask, mask_n,
    factor, factor_h, rest, rest_h, head, first, last, d,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write factor A C + rest x for some rows."""
    if factor is not None:
        c *= tl.load(factor + head * factor_h).to(tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        block = _block(q, q_n, q_d, rows, _real(mask, mask_n, rows, last), d, WIDTH) * scale
        a = tl.dot(block, t, input_precision=PRECISION)
        result = tl.dot(a, c, input_precision=PRECISION)
        if rest is not None:
            block = _block(x, x_n, x_d, rows, rows < last, d, WIDTH)
            result += block * tl.load(rest + head * rest_h).to(tl.float32)
        columns = tl.arange(0, WIDTH)
        at = rows.to(tl.int64)[:, None] * out_n + columns[None, :] * out_d
        inside = (rows < last)[:, None] & (columns < d)[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
