"""Rotary position embedding (Su et al. 2021, eq. 34), also in place; the inverse rotation is its backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rows import check_device, on
from .sizes import cdiv, next_power_of_2

HEADS = 8  # of a program: they share the angles
_TILE = 1024
WARPS = 4


@triton.jit
def _turn(
    p_x,
    p_out,
    cos,
    sin,
    o_t,
    mt,
    first,
    heads,
    half,
    tail,
    stride_xt,
    stride_xh,
    stride_ot,
    stride_oh,
    INTERLEAVED: tl.constexpr,
    COPY_TAIL: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Rotate HEADS heads from `first` on of the tokens o_t [TOKENS] by cos and sin [TOKENS, COLUMNS]."""
    o_c = tl.arange(0, COLUMNS)
    m = mt[:, None] & (o_c < half)[None, :]
    o_pair = tl.arange(0, 2 * COLUMNS)
    m_pair = mt[:, None] & (o_pair < 2 * half)[None, :]
    p_a = p_x + o_t.to(tl.int64)[:, None] * stride_xt + first.to(tl.int64) * stride_xh
    p_o = p_out + o_t.to(tl.int64)[:, None] * stride_ot + first.to(tl.int64) * stride_oh
    for _ in range(first, tl.minimum(first + HEADS, heads)):
        if INTERLEAVED:  # read and written whole: with a stride of two no access would be wide
            pair = tl.load(p_a + o_pair[None, :], mask=m_pair, other=0.0)
            a, b = tl.split(tl.reshape(pair, (TOKENS, COLUMNS, 2)))
        else:
            a = tl.load(p_a + o_c[None, :], mask=m, other=0.0)
            b = tl.load(p_a + o_c[None, :] + half, mask=m, other=0.0)
        a, b = a.to(ACC), b.to(ACC)
        a, b = (a * cos - b * sin).to(p_out.dtype.element_ty), (b * cos + a * sin).to(p_out.dtype.element_ty)
        if INTERLEAVED:
            tl.store(p_o + o_pair[None, :], tl.reshape(tl.join(a, b), (TOKENS, 2 * COLUMNS)), mask=m_pair)
        else:
            tl.store(p_o + o_c[None, :], a, mask=m)
            tl.store(p_o + o_c[None, :] + half, b, mask=m)
        if COPY_TAIL:
            o_d = 2 * half + tl.arange(0, TAIL)
            m_d = mt[:, None] & (o_d < 2 * half + tail)[None, :]
            tl.store(p_o + o_d[None, :], tl.load(p_a + o_d[None, :], mask=m_d), mask=m_d)
        p_a += stride_xh
        p_o += stride_oh


@triton.jit(do_not_specialize=["tokens", "heads", "k_heads", "angles"])
def rope_kernel(
    p_x,
    p_k,
    p_cos,
    p_sin,
    p_out,
    tokens,
    heads,
    k_heads,
    angles,
    half,
    tail,
    stride_xt,
    stride_xh,
    stride_kt,
    stride_kh,
    stride_ot,
    stride_oh,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COPY_TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Rotate TOKENS tokens of HEADS heads: pairs (i, i + half), or (2i, 2i + 1). Token t has the angles t % angles.

    With p_k, the programs behind those of x rotate its heads in place: one launch for what attention reads.
    """
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    o_t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o_c = tl.arange(0, COLUMNS)
    mt = o_t < tokens
    m = mt[:, None] & (o_c < half)[None, :]
    p_angle = (o_t % angles).to(tl.int64)[:, None] * half + o_c[None, :]
    cos = tl.load(p_cos + p_angle, mask=m, other=0.0).to(ACC)  # [TOKENS, COLUMNS]
    sin = tl.load(p_sin + p_angle, mask=m, other=0.0).to(ACC)
    if INVERSE:
        sin = -sin
    first = tl.program_id(1) * HEADS
    if p_k is None:
        _turn(
            p_x, p_out, cos, sin, o_t, mt, first, heads, half, tail, stride_xt, stride_xh, stride_ot, stride_oh,
            INTERLEAVED, COPY_TAIL, ACC, TOKENS, HEADS, COLUMNS, TAIL,
        )  # fmt: skip
    else:
        before = tl.cdiv(heads, HEADS) * HEADS
        if first < before:
            _turn(
                p_x, p_out, cos, sin, o_t, mt, first, heads, half, tail, stride_xt, stride_xh, stride_ot, stride_oh,
                INTERLEAVED, COPY_TAIL, ACC, TOKENS, HEADS, COLUMNS, TAIL,
            )  # fmt: skip
        else:
            _turn(
                p_k, p_k, cos, sin, o_t, mt, first - before, k_heads, half, tail, stride_kt, stride_kh, stride_kt,
                stride_kh, INTERLEAVED, False, ACC, TOKENS, HEADS, COLUMNS, TAIL,
            )  # fmt: skip


def tile(half: int) -> tuple[int, int]:
    """(TOKENS, COLUMNS) of a program."""
    columns = next_power_of_2(half)
    return max(1, _TILE // columns), columns


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool, out: Tensor, k: Tensor | None = None
) -> None:
    """Write x (T, H, D), rotated, to out, which may be x. cos, sin (n, r/2) with T a multiple of n, and r <= D.

    k (T, Hk, D), with a unit last stride, is rotated in place by the same launch.
    """
    check_device(x)
    tokens, heads, dim = x.shape
    half = cos.shape[-1]
    if dim != 1 and not (out.stride(-1) == 1 and (k is None or k.stride(-1) == 1)):
        raise ValueError("out and k are written in place; expected tensors with a unit last stride")
    k_heads = 0 if k is None else k.shape[1]
    if x.numel() == 0 or half == 0:
        if x.data_ptr() != out.data_ptr():
            out.copy_(x)
        return
    if x.stride(-1) != 1:
        x = x.contiguous()
    tail = dim - 2 * half
    count, columns = tile(half)
    with on(x.device):
        rope_kernel[(cdiv(tokens, count), cdiv(heads, HEADS) + cdiv(k_heads, HEADS))](
            x,
            k,
            cos.contiguous(),
            sin.contiguous(),
            out,
            tokens,
            heads,
            k_heads,
            cos.shape[0],
            half,
            tail,
            *x.stride()[:2],
            *(k if k is not None else x).stride()[:2],
            *out.stride()[:2],
            INVERSE=inverse,
            INTERLEAVED=interleaved,
            COPY_TAIL=tail > 0 and x.data_ptr() != out.data_ptr(),
            TOKENS=count,
            HEADS=HEADS,
            COLUMNS=columns,
            TAIL=next_power_of_2(max(1, tail)),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
