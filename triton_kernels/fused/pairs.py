"""A head's values as the pairs that RoPE turns: two blocks of one layout, between which the rotation is arithmetic.

What RoPE leaves alone is paired too, first half with second half.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair_columns(o_n, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """(head, first column, second column) of pair o_n, HALF (padded) a head; columns are counted within the head."""
    pair = o_n % HALF
    if ROTATED == HEAD_DIM:  # without a choice the compiler sees that columns are neighbours
        a = 2 * pair if INTERLEAVED else pair
        b = a + (1 if INTERLEAVED else HEAD_DIM // 2)
    else:
        rest = ROTATED + pair - ROTATED // 2  # where the pairs of what RoPE leaves alone begin
        turned = pair < ROTATED // 2
        a = tl.where(turned, 2 * pair if INTERLEAVED else pair, rest)
        b = tl.where(turned, a + (1 if INTERLEAVED else ROTATED // 2), rest + (HEAD_DIM - ROTATED) // 2)
    return o_n // HALF, a, b


@triton.jit
def load_pairs(
    p,
    o_m,
    first,
    heads,
    col_a,
    col_b,
    mm,
    mn,
    stride,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """(a, b) [BLOCK_M, HEADS * HALF] of heads `first` and up, 0 outside. Pairs (2i, 2i + 1) are read together."""
    BLOCK_N: tl.constexpr = HEADS * HALF
    p_row = p + o_m.to(tl.int64)[:, None] * stride
    if INTERLEAVED and ROTATED == HEAD_DIM:
        column, inside = _whole_heads(first, heads, HEAD_DIM, HEADS, HALF)
        both = tl.load(p_row + column[None, :], mask=mm[:, None] & inside[None, :], other=0.0)
        a, b = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_N, 2)))
    else:
        head = first + tl.arange(0, BLOCK_N) // HALF
        m = mm[:, None] & mn[None, :]
        a = tl.load(p_row + (head * HEAD_DIM + col_a)[None, :], mask=m, other=0.0)
        b = tl.load(p_row + (head * HEAD_DIM + col_b)[None, :], mask=m, other=0.0)
    return a, b


@triton.jit
def store_pairs(
    p,
    a,
    b,
    o_m,
    first,
    heads,
    col_a,
    col_b,
    mm,
    mn,
    stride,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Write the same places. Pairs (2i, 2i + 1) are written together, or no access would be wide."""
    BLOCK_N: tl.constexpr = HEADS * HALF
    p_row = p + o_m.to(tl.int64)[:, None] * stride
    if INTERLEAVED and ROTATED == HEAD_DIM:
        column, inside = _whole_heads(first, heads, HEAD_DIM, HEADS, HALF)
        both = tl.reshape(tl.join(a, b), (BLOCK_M, 2 * BLOCK_N)).to(p.dtype.element_ty)
        tl.store(p_row + column[None, :], both, mask=mm[:, None] & inside[None, :])
    else:
        head = first + tl.arange(0, BLOCK_N) // HALF
        m = mm[:, None] & mn[None, :]
        tl.store(p_row + (head * HEAD_DIM + col_a)[None, :], a.to(p.dtype.element_ty), mask=m)
        tl.store(p_row + (head * HEAD_DIM + col_b)[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _whole_heads(first, heads, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """(column, whether it is one) of all values of HEADS heads, each padded to 2 HALF."""
    o_c = tl.arange(0, 2 * HEADS * HALF)
    head = first + o_c // (2 * HALF)
    return head * HEAD_DIM + o_c % (2 * HALF), (head < heads) & (o_c % (2 * HALF) < HEAD_DIM)
