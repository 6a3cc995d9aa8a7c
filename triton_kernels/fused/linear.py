"""Products with something in the epilogue: a residual and the sum's row statistics; the attention backward's delta."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import on
from ..sizes import cdiv, next_power_of_2
from . import choice, statistics
from .matrices import check_matrix, check_vector, options
from .tiles import GROUP, block_statistics, load, load_transposed, place


@triton.jit(do_not_specialize=["tokens"])
def residual_kernel_tile(
    p_x,
    p_w,
    p_bias,
    p_residual,
    p_out,
    p_shares,
    tokens,
    width,
    d_out,
    stride_x,
    stride_w,
    stride_residual,
    stride_out,
    CENTERED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = residual + x Wᵀ + bias; with p_shares, this tile's share of the row statistics of out as it is stored."""
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    i, j = place(tl.cdiv(tokens, BLOCK_M), tiles_n, GROUP)
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mm, mn = o_m < tokens, o_n < d_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mk = o_k < width
        x = load(p_x, o_m, o_k, stride_x, mm, mk, RAGGED)  # [BLOCK_M, BLOCK_K]
        w = load_transposed(p_w, o_n, o_k, stride_w, mn, mk, RAGGED)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=mn, other=0.0).to(tl.float32)[None, :]
    m = mm[:, None] & mn[None, :]
    acc += load(p_residual, o_m, o_n, stride_residual, mm, mn, True).to(tl.float32)
    out = acc.to(p_out.dtype.element_ty)
    tl.store(p_out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :], out, mask=m)
    if p_shares is not None:
        PARTS: tl.constexpr = BLOCK_N // COLUMNS
        stored = tl.reshape(tl.where(m, out.to(tl.float32), 0.0), (BLOCK_M * PARTS, COLUMNS))
        block = j * PARTS + tl.arange(0, PARTS)
        count = tl.minimum(d_out - block * COLUMNS, COLUMNS).to(tl.float32)  # negative behind the last column
        count = tl.reshape(tl.broadcast_to(count[None, :], (BLOCK_M, PARTS)), (BLOCK_M * PARTS,))
        inside = tl.arange(0, COLUMNS)[None, :] < count[:, None]
        mean, squares = block_statistics(stored, inside, count, CENTERED, BLOCK_M * PARTS, COLUMNS, LEVELS)
        blocks = tl.cdiv(d_out, COLUMNS)
        p_share = p_shares + block.to(tl.int64)[None, :] * tokens + o_m[:, None]
        ms = mm[:, None] & (block < blocks)[None, :]
        tl.store(p_share, tl.reshape(squares, (BLOCK_M, PARTS)), mask=ms)
        if CENTERED:
            tl.store(p_share + blocks.to(tl.int64) * tokens, tl.reshape(mean, (BLOCK_M, PARTS)), mask=ms)


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel_heads(
    p_d,
    p_w,
    p_o,
    p_do,
    p_delta,
    tokens,
    width,
    heads,
    stride_d,
    stride_w,
    stride_o,
    stride_do,
    stride_delta,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """do = d W for HEADS heads of BLOCK_M tokens, and delta = Σ do o of every head, of do as it is stored."""
    i, j = place(tl.cdiv(tokens, BLOCK_M), tl.cdiv(heads, HEADS), GROUP)
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, HEADS * DIM)
    head = j * HEADS + o_n // DIM
    mm, mn = o_m < tokens, (head < heads) & (o_n % DIM < HEAD_DIM)
    column = head * HEAD_DIM + o_n % DIM
    acc = tl.zeros([BLOCK_M, HEADS * DIM], tl.float32)
    for start in range(0, width, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mk = o_k < width
        d = load(p_d, o_m, o_k, stride_d, mm, mk, RAGGED)  # [BLOCK_M, BLOCK_K]
        w = load(p_w, o_k, column, stride_w, mk, mn, True)  # [BLOCK_K, HEADS * DIM]
        acc = tl.dot(d, w, acc, input_precision=PRECISION)
    m = mm[:, None] & mn[None, :]
    do = acc.to(p_do.dtype.element_ty)
    tl.store(p_do + o_m.to(tl.int64)[:, None] * stride_do + column[None, :], do, mask=m)
    o = load(p_o, o_m, column, stride_o, mm, mn, True)
    products = tl.reshape(do.to(tl.float32) * o.to(tl.float32), (BLOCK_M, HEADS, DIM))
    delta = tl.sum(products, 2)  # [BLOCK_M, HEADS]
    o_h = j * HEADS + tl.arange(0, HEADS)
    p_to = p_delta + o_h.to(tl.int64)[None, :] * stride_delta + o_m[:, None]
    tl.store(p_to, delta, mask=mm[:, None] & (o_h < heads)[None, :])


def add_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out: Tensor,
    *,
    statistics_of: tuple[bool, float] | None = None,
) -> tuple[Tensor | None, Tensor] | None:
    """Write residual + x Wᵀ + bias to out (t, n), which may be residual; x (t, width), weight (n, width).

    residual and out may have another dtype than x and weight. `statistics_of` (centered, eps) asks for (mean, rstd) of
    out's rows, as `statistics.row_statistics` gives them, bit for bit.
    """
    (tokens, width), d_out = x.shape, weight.shape[0]
    check_matrix("x", x, (tokens, width))
    check_matrix("weight", weight, (d_out, width), x)
    check_matrix("out", out, (tokens, d_out))
    check_matrix("residual", residual, (tokens, d_out), out)
    check_vector("bias", bias, d_out)
    centered, eps = statistics_of or (False, 0.0)
    blocks = cdiv(d_out, statistics.COLUMNS) * (2 if centered else 1)
    shares = out.new_empty(blocks, tokens, dtype=torch.float32) if statistics_of else None
    config = choice.config(choice.key("residual", width, x.dtype, x.device))
    if tokens:
        grid = cdiv(tokens, config.block_m) * cdiv(d_out, config.block_n)
        with on(x.device):
            residual_kernel_tile[(grid,)](
                x,
                weight,
                bias,
                residual,
                out,
                shares,
                tokens,
                width,
                d_out,
                x.stride(0),
                weight.stride(0),
                residual.stride(0),
                out.stride(0),
                CENTERED=centered,
                RAGGED=width % config.block_k != 0,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                COLUMNS=statistics.COLUMNS,
                LEVELS=statistics.LEVELS,
                GROUP=GROUP,
                **options(config, x.dtype),
            )
    return None if shares is None else statistics.merged(shares, out, eps, centered=centered)


def product_with_delta(d: Tensor, weight: Tensor, o: Tensor, do: Tensor, delta: Tensor) -> None:
    """Write do = d W (t, heads * dim), and delta (heads, t) = Σ do o of every head, for the attention backward.

    d (t, width), weight (width, heads * dim), o (t, heads * dim); delta float32 of unit last stride.
    """
    (tokens, width), heads = d.shape, delta.shape[0]
    check_matrix("d", d, (tokens, width))
    check_matrix("weight", weight, (width, o.shape[1]), d)
    check_matrix("o", o, (tokens, o.shape[1]), d)
    check_matrix("do", do, (tokens, o.shape[1]), d)
    if o.shape[1] % heads or delta.shape[1] != tokens or delta.dtype != torch.float32 or delta.stride(1) != 1:
        raise ValueError(
            f"delta must be float32 (heads, {tokens}) of unit last stride, heads dividing {o.shape[1]}; got "
            f"{delta.dtype} {tuple(delta.shape)} with strides {delta.stride()}"
        )
    if tokens == 0:
        return
    config = choice.config(choice.key("delta", width, d.dtype, d.device))
    dim = o.shape[1] // heads
    padded = max(16, next_power_of_2(dim))
    together = max(1, config.block_n // padded)
    block_m = config.rows(padded)
    with on(d.device):
        delta_kernel_heads[(cdiv(tokens, block_m) * cdiv(heads, together),)](
            d,
            weight,
            o,
            do,
            delta,
            tokens,
            width,
            heads,
            d.stride(0),
            weight.stride(0),
            o.stride(0),
            do.stride(0),
            delta.stride(0),
            RAGGED=width % config.block_k != 0,
            BLOCK_M=block_m,
            BLOCK_K=config.block_k,
            HEADS=together,
            HEAD_DIM=dim,
            DIM=padded,
            GROUP=GROUP,
            **options(config, d.dtype),
        )
