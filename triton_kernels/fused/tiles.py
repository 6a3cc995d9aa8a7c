"""What the fused products share: where a program works, and tiles of a normalised x that is made as it is loaded."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 8  # tiles of rows that share the weights' columns in the L2 cache


@triton.jit
def place(tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row of tiles, column of tiles) of a program: GROUP rows of tiles are gone through together."""
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    local = pid % (GROUP * tiles_n)
    return first + local % height, local // height


@triton.jit
def load(p, o_r, o_c, stride, mr, mc, RAGGED: tl.constexpr):
    """[R, C] of a matrix of unit last stride. Rows are always masked, columns only if RAGGED."""
    pointers = p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
    m = mr[:, None] & mc[None, :] if RAGGED else mr[:, None]
    return tl.load(pointers, mask=m, other=0.0)


@triton.jit
def load_transposed(p, o_r, o_c, stride, mr, mc, RAGGED: tl.constexpr):
    """[C, R] of a matrix of unit last stride, its rows along the second dim. Rows are masked, columns if RAGGED."""
    pointers = p + o_r.to(tl.int64)[None, :] * stride + o_c[:, None]
    m = mr[None, :] & mc[:, None] if RAGGED else mr[None, :]
    return tl.load(pointers, mask=m, other=0.0)


@triton.jit
def load_statistics(p_mean, p_rstd, o_r, mr, CENTERED: tl.constexpr):
    """(mean, rstd) of rows o_r, 0 where not mr; not CENTERED, there is no mean, and rstd stands for it."""
    rstd = tl.load(p_rstd + o_r, mask=mr, other=0.0)
    mean = rstd
    if CENTERED:
        mean = tl.load(p_mean + o_r, mask=mr, other=0.0)
    return mean, rstd


@triton.jit
def normalised(x, p_w, p_b, mean, rstd, o_c, mc, CENTERED: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr):
    """The norm of a loaded tile x [R, C], rounded to DTYPE. Columns beyond the last are 0."""
    h = x.to(tl.float32)
    if CENTERED:
        h -= mean[:, None]
    w = tl.load(p_w + o_c, mask=mc, other=0.0) if RAGGED else tl.load(p_w + o_c)
    h = h * rstd[:, None] * w.to(tl.float32)[None, :]
    if p_b is not None:
        b = tl.load(p_b + o_c, mask=mc, other=0.0) if RAGGED else tl.load(p_b + o_c)
        h += b.to(tl.float32)[None, :]
    return h.to(DTYPE)


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """The sum over the columns of x [ROWS, COLUMNS], neighbours first, COLUMNS = 2 ** LEVELS.

    Every addition is written out, so the same bits come from a product's accumulator and from a loaded tile,
    whose layouts differ: `tl.sum` goes by layout.
    """
    for level in tl.static_range(LEVELS):
        a, b = tl.split(tl.reshape(x, (ROWS, COLUMNS >> (level + 1), 2)))
        x = a + b
    return tl.reshape(x, (ROWS,))


@triton.jit
def block_statistics(
    x, m, count, CENTERED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr
):
    """(mean, sum of squared distances from it) of `count` values a row of x [ROWS, COLUMNS], 0 where not m.

    Not CENTERED: (0, sum of squares).
    """
    mean = tl.zeros([ROWS], tl.float32)
    d = x
    if CENTERED:
        mean = tree_sum(x, ROWS, COLUMNS, LEVELS) / count
        d = tl.where(m, x - mean[:, None], 0.0)
    return mean, tree_sum(d * d, ROWS, COLUMNS, LEVELS)


@triton.jit
def merge_statistics(mean, squares, seen, block_mean, block_squares, count, CENTERED: tl.constexpr):
    """Those of `seen` values and of `count` more (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    if CENTERED:
        distance = block_mean - mean
        total = seen + count
        mean += distance * (count / total)
        squares += block_squares + distance * distance * (seen * count / total)
    else:
        squares += block_squares
    return mean, squares
