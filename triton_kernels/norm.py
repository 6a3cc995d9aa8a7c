"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba et al. 2016): one pass over memory. `norm_bwd` goes back.

A tile of rows lies in registers from the load to the store. Rows wider than a tile are gone through in pieces, from the
L2 cache after the first time. x̂ = (x - mean) rstd (RMSNorm: mean 0), y = x̂ w + b.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import check_device, on, rows_of, warps
from .sizes import cdiv, next_power_of_2

FORWARD_COLUMNS = 16384  # that a program holds at once
TILE = 4096  # values
_PIECE = 2048  # columns


@triton.jit
def _load(p, o_r, o_c, stride, m, ACC: tl.constexpr):
    return tl.load(p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m, other=0.0).to(ACC)


@triton.jit
def store(p, b, o_r, o_c, stride, m):
    tl.store(p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def reciprocal_root(v, ACC: tl.constexpr):
    # Rounded as IEEE has it: one number a row costs nothing, and its error is in every value of the row.
    if tl.float64 == ACC:
        r = 1.0 / tl.sqrt(v)
    else:
        r = tl.div_rn(tl.full(v.shape, 1.0, tl.float32), tl.sqrt_rn(v))  # 0 where the squares passed float32's range
    return r


@triton.jit
def _summed(
    p_x, p_res, p_sum, o_r, o_c, stride_x, stride_res, stride_sum, m, RESIDUAL: tl.constexpr, ACC: tl.constexpr
):
    """x, or x + residual as it is rounded when stored, which is what a backward will see."""
    x = _load(p_x, o_r, o_c, stride_x, m, ACC)
    if RESIDUAL:
        x = (x + _load(p_res, o_r, o_c, stride_res, m, ACC)).to(p_sum.dtype.element_ty)
        store(p_sum, x, o_r, o_c, stride_sum, m)
        x = x.to(ACC)
    return x


@triton.jit
def _scaled(x, mean, rstd, p_w, p_b, o_c, mc, CENTERED: tl.constexpr, ACC: tl.constexpr):
    if CENTERED:
        x -= mean[:, None]
    y = x * rstd[:, None]
    if p_w is not None:
        y *= tl.load(p_w + o_c, mask=mc, other=0.0).to(ACC)[None, :]
    if p_b is not None:
        y += tl.load(p_b + o_c, mask=mc, other=0.0).to(ACC)[None, :]
    return y


@triton.jit(do_not_specialize=["rows"])
def norm_fwd_kernel_rows(
    p_x,
    p_res,
    p_w,
    p_b,
    p_y,
    p_sum,
    p_mean,
    p_rstd,
    rows,
    width,
    stride_x,
    stride_res,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y, rstd (and mean) of ROWS rows; with a residual, x + residual too. p_y and p_sum are contiguous."""
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    RESIDUAL: tl.constexpr = p_res is not None
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, COLUMNS)
    mr = o_r < rows
    if not WIDE:
        mc = o_c < width
        m = mr[:, None] & mc[None, :]
        x = _summed(p_x, p_res, p_sum, o_r, o_c, stride_x, stride_res, width, m, RESIDUAL, ACC)
        mean = tl.zeros([ROWS], ACC)
        if CENTERED:
            mean = tl.sum(x, 1) / width
        d = tl.where(m, x - mean[:, None], 0.0) if CENTERED else x
        rstd = reciprocal_root(tl.sum(d * d, 1) / width + EPS, ACC)
        store(p_y, _scaled(x, mean, rstd, p_w, p_b, o_c, mc, CENTERED, ACC), o_r, o_c, width, m)
    else:
        total = tl.zeros([ROWS, COLUMNS], ACC)
        for start in range(0, width, COLUMNS):
            c = start + o_c
            m = mr[:, None] & (c < width)[None, :]
            x = _summed(p_x, p_res, p_sum, o_r, c, stride_x, stride_res, width, m, RESIDUAL, ACC)
            total += x if CENTERED else x * x
        # What follows reads the sum, where there is one, with the bits that were stored.
        p_in = p_sum if RESIDUAL else p_x
        stride_in = width if RESIDUAL else stride_x
        if RESIDUAL:
            tl.debug_barrier()
        mean = tl.zeros([ROWS], ACC)
        if CENTERED:
            mean = tl.sum(total, 1) / width
            total = tl.zeros([ROWS, COLUMNS], ACC)
            for start in range(0, width, COLUMNS):
                c = start + o_c
                m = mr[:, None] & (c < width)[None, :]
                d = tl.where(m, _load(p_in, o_r, c, stride_in, m, ACC) - mean[:, None], 0.0)
                total += d * d
        rstd = reciprocal_root(tl.sum(total, 1) / width + EPS, ACC)
        for start in range(0, width, COLUMNS):
            c = start + o_c
            mc = c < width
            m = mr[:, None] & mc[None, :]
            x = _load(p_in, o_r, c, stride_in, m, ACC)
            store(p_y, _scaled(x, mean, rstd, p_w, p_b, c, mc, CENTERED, ACC), o_r, c, width, m)
    tl.store(p_rstd + o_r, rstd, mask=mr)
    if CENTERED:
        tl.store(p_mean + o_r, mean, mask=mr)


def tile(width: int, most: int) -> tuple[int, int, bool]:
    """(ROWS, COLUMNS, WIDE) for rows of `width` values where a program holds at most `most` columns."""
    columns = next_power_of_2(max(1, width))
    if columns > most:
        return 1, _PIECE, True
    return max(1, min(64, TILE // columns)), columns, False


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(y, x + residual, mean, rstd): y and the sum (..., D) in x's dtype; mean and rstd (...) in float32 or float64.

    x, residual (..., D); weight, bias (D,). LayerNorm if `centered`, else RMSNorm, which has no mean. The sum is None
    without a residual.
    """
    check_device(x)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    mean = x.new_empty(x.shape[:-1], dtype=acc) if centered else None
    rstd = x.new_empty(x.shape[:-1], dtype=acc)
    flat, res = rows_of(x), None if residual is None else rows_of(residual)
    count, columns, wide = tile(x.shape[-1], FORWARD_COLUMNS)
    if rstd.numel():
        with on(x.device):
            norm_fwd_kernel_rows[(cdiv(rstd.numel(), count),)](
                flat,
                res,
                vector(weight),
                vector(bias),
                y,
                total,
                mean,
                rstd,
                rstd.numel(),
                x.shape[-1],
                flat.stride(0),
                0 if res is None else res.stride(0),
                EPS=eps,
                CENTERED=centered,
                ROWS=count,
                COLUMNS=columns,
                WIDE=wide,
                num_warps=warps(count * columns),
                enable_fp_fusion=True,
            )
    return y, total, mean, rstd


def vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
