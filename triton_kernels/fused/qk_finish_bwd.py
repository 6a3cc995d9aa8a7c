"""Inverse RoPE and the backward of QK-norm in one pass over dq or dk, in place.

The norm's statistics are made again from the raw q or k, which has to be read for the gradient anyway, and what the
rotation gives stays in registers. The weight's gradient has two stages, as that of `norm`: every program sums its
share over the tiles that it walks through, and the shares are added up in order.

With (a, b) a pair of a head's values, x̂ = x rstd, D values a head:

    g = w (da cos + db sin, db cos - da sin)        d = rstd (g - x̂ Σ(g x̂)/D)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import reciprocal_root
from ..norm_bwd import added_up, programs_for
from ..rows import on
from ..sizes import cdiv
from .matrices import check_matrix
from .pairs import load_pairs, pair_columns, store_pairs
from .qkv import Finish

HEADS = 8  # of a tile: they share the angles
WARPS = 4
_TILE = 1024  # pairs that a program holds at once


@triton.jit(do_not_specialize=["tokens"])
def qk_finish_bwd_kernel_heads(
    p_d,
    p_raw,
    p_weight,
    p_cos,
    p_sin,
    p_dw,
    tokens,
    heads,
    stride_d,
    stride_raw,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """d of every n-th tile of BLOCK_M tokens and HEADS heads; this program's share of dw [HEAD_DIM]."""
    ROPE: tl.constexpr = p_cos is not None
    o_n = tl.arange(0, HALF)
    _, col_a, col_b = pair_columns(o_n, HEAD_DIM, ROTATED, INTERLEAVED, HALF)
    mn = o_n < HEAD_DIM // 2
    wa = tl.load(p_weight + col_a, mask=mn, other=0.0).to(tl.float32)[None, :]
    wb = tl.load(p_weight + col_b, mask=mn, other=0.0).to(tl.float32)[None, :]
    dwa = tl.zeros([BLOCK_M, HALF], tl.float32)
    dwb = tl.zeros([BLOCK_M, HALF], tl.float32)
    groups = tl.cdiv(heads, HEADS)
    tiles = tl.cdiv(tokens, BLOCK_M) * groups
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        o_m = tile // groups * BLOCK_M + tl.arange(0, BLOCK_M)
        mm = o_m < tokens
        if ROPE:
            turned = mm[:, None] & (o_n < ROTATED // 2)[None, :]
            p_angle = o_m.to(tl.int64)[:, None] * (ROTATED // 2) + o_n[None, :]
            cos = tl.load(p_cos + p_angle, mask=turned, other=1.0)  # [BLOCK_M, HALF]
            sin = tl.load(p_sin + p_angle, mask=turned, other=0.0)
        first = tile % groups * HEADS
        # The next two heads are on their way while one is computed. No head is read where another is written.
        for head in tl.range(first, tl.minimum(first + HEADS, heads), num_stages=3):
            a, b = load_pairs(
                p_raw, o_m, head, heads, col_a, col_b, mm, mn, stride_raw,
                HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, 1, HALF,
            )  # fmt: skip
            da, db = load_pairs(
                p_d, o_m, head, heads, col_a, col_b, mm, mn, stride_d,
                HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, 1, HALF,
            )  # fmt: skip
            a, b, da, db = a.to(tl.float32), b.to(tl.float32), da.to(tl.float32), db.to(tl.float32)
            rstd = reciprocal_root(tl.sum(a * a + b * b, 1) / HEAD_DIM + EPS, tl.float32)
            rstd = tl.where(mm, rstd, 0.0)[:, None]  # without eps it is infinite where there is no token
            a, b = a * rstd, b * rstd
            if ROPE:
                da, db = da * cos + db * sin, db * cos - da * sin
            if p_dw is not None:
                dwa += da * a
                dwb += db * b
            da, db = da * wa, db * wb
            dot = (tl.sum(da * a + db * b, 1) / HEAD_DIM)[:, None]
            store_pairs(
                p_d, (da - a * dot) * rstd, (db - b * dot) * rstd, o_m, head, heads, col_a, col_b, mm, mn, stride_d,
                HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, 1, HALF,
            )  # fmt: skip
    if p_dw is not None:
        p_share = p_dw + tl.program_id(0) * HEAD_DIM
        tl.store(p_share + col_a, tl.sum(dwa, 0), mask=mn)
        tl.store(p_share + col_b, tl.sum(dwb, 0), mask=mn)


def resident(size: int, head_dim: int) -> int:
    """Programs of a multiprocessor whose registers suffice, for values of `size` bytes."""
    if size != 2:
        return 2
    return 4 if head_dim <= 128 else 3


def tokens_of(half: int) -> int:
    """Tokens of a tile whose heads have so many (padded) pairs."""
    return max(1, _TILE // half)


def backward(d: Tensor, raw: Tensor, weight: Tensor, after: Finish, *, need_dw: bool) -> Tensor:
    """Turn d (t, heads * head_dim), the gradient of `qkv.finish_stored`'s result, into that of raw, which is like it.

    Returns the gradient of QK-norm's weight (head_dim,) in float32, empty unless `need_dw`.
    """
    tokens, columns = d.shape
    after.check(tokens)
    check_matrix("d", d, (tokens, columns))
    check_matrix("raw", raw, (tokens, columns), d)
    heads, pairing = after.heads(columns), after.pairing()
    block_m = tokens_of(pairing["HALF"])
    tiles = cdiv(tokens, block_m) * cdiv(heads, HEADS)
    programs = programs_for(tiles, resident(d.element_size(), after.head_dim), d.device)
    make = d.new_empty if tiles else d.new_zeros
    shares = make(programs, after.head_dim, dtype=torch.float32) if need_dw else None
    if tiles:
        with on(d.device):
            qk_finish_bwd_kernel_heads[(programs,)](
                d,
                raw,
                weight,
                after.cos,
                after.sin,
                shares,
                tokens,
                heads,
                d.stride(0),
                raw.stride(0),
                BLOCK_M=block_m,
                HEADS=HEADS,
                num_warps=WARPS,
                enable_fp_fusion=False,
                **pairing,
            )
    return d.new_empty(0, dtype=torch.float32) if shares is None else added_up(shares)
