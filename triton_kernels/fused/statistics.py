"""Row statistics for a norm: by themselves from a stored x, or from the shares that a product's epilogue left.

Both add up blocks of COLUMNS in the same order with the same written-out additions, so that they give the same bits:
a backward may take its statistics from a kept tensor where the forward had them from the product that made it.
Compiled without fused multiply-adds, which the compiler is free to place differently in each kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import reciprocal_root
from ..rows import on
from ..sizes import cdiv
from .matrices import check_matrix
from .tiles import block_statistics, load, merge_statistics

COLUMNS = 64  # of a share: a product's tile has this many, or a multiple
LEVELS = COLUMNS.bit_length() - 1
ROWS, MERGED = 16, 128  # of a program


@triton.jit
def _finish(p_mean, p_rstd, mean, squares, width, o_m, mm, EPS: tl.constexpr, CENTERED: tl.constexpr):
    tl.store(p_rstd + o_m, reciprocal_root(squares / width + EPS, tl.float32), mask=mm)
    if CENTERED:
        tl.store(p_mean + o_m, mean, mask=mm)


@triton.jit(do_not_specialize=["tokens"])
def statistics_kernel_rows(
    p_x,
    p_mean,
    p_rstd,
    tokens,
    width,
    stride_x,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """mean (if CENTERED) and rstd of ROWS rows of x [tokens, width]."""
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mm = o_m < tokens
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        o_c = start + tl.arange(0, COLUMNS)
        mc = o_c < width
        x = load(p_x, o_m, o_c, stride_x, mm, mc, True).to(tl.float32)
        count = tl.minimum(width - start, COLUMNS).to(tl.float32)
        m = mm[:, None] & mc[None, :]
        block_mean, block_squares = block_statistics(x, m, count, CENTERED, ROWS, COLUMNS, LEVELS)
        seen = tl.full([ROWS], start, tl.float32)
        mean, squares = merge_statistics(mean, squares, seen, block_mean, block_squares, count, CENTERED)
    _finish(p_mean, p_rstd, mean, squares, width, o_m, mm, EPS, CENTERED)


@triton.jit(do_not_specialize=["tokens"])
def statistics_kernel_merge(
    p_shares,
    p_mean,
    p_rstd,
    tokens,
    width,
    blocks,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same from the shares [blocks, tokens] of squares, and behind them those of means if CENTERED."""
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mm = o_m < tokens
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for block in range(blocks):
        p_block = p_shares + tl.cast(block, tl.int64) * tokens
        block_squares = tl.load(p_block + o_m, mask=mm, other=0.0)
        block_mean = tl.zeros([ROWS], tl.float32)
        if CENTERED:
            block_mean = tl.load(p_block + tl.cast(blocks, tl.int64) * tokens + o_m, mask=mm, other=0.0)
        count = tl.minimum(width - block * COLUMNS, COLUMNS).to(tl.float32)
        seen = tl.full([ROWS], block * COLUMNS, tl.float32)
        mean, squares = merge_statistics(mean, squares, seen, block_mean, block_squares, count, CENTERED)
    _finish(p_mean, p_rstd, mean, squares, width, o_m, mm, EPS, CENTERED)


def row_statistics(x: Tensor, eps: float, *, centered: bool) -> tuple[Tensor | None, Tensor]:
    """(mean, rstd) of the rows of x (t, width), float32 (t,); mean is None unless `centered` (LayerNorm)."""
    check_matrix("x", x, (x.shape[0], x.shape[1]))
    mean, rstd = _empty(x, centered)
    if x.shape[0]:
        with on(x.device):
            statistics_kernel_rows[(cdiv(x.shape[0], ROWS),)](
                x,
                mean,
                rstd,
                *x.shape,
                x.stride(0),
                EPS=eps,
                CENTERED=centered,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                LEVELS=LEVELS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return mean, rstd


def merged(shares: Tensor, x: Tensor, eps: float, *, centered: bool) -> tuple[Tensor | None, Tensor]:
    """`row_statistics` of x from the shares (blocks, or twice that if `centered`, t) that its product left."""
    mean, rstd = _empty(x, centered)
    if x.shape[0]:
        with on(x.device):
            statistics_kernel_merge[(cdiv(x.shape[0], MERGED),)](
                shares,
                mean,
                rstd,
                *x.shape,
                shares.shape[0] // (2 if centered else 1),
                EPS=eps,
                CENTERED=centered,
                ROWS=MERGED,
                COLUMNS=COLUMNS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return mean, rstd


def _empty(x: Tensor, centered: bool) -> tuple[Tensor | None, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(rstd) if centered else None, rstd
