"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba et al. 2016): one pass over memory each way.

Forward: a tile of rows lies in registers from the load to the store. Backward: every program walks through rows
and sums its share of the weight gradients in registers; the shares are added up in a fixed order, so the result is
the same every time. Rows wider than a tile are gone through in pieces, twice, the second time from the L2 cache.

x̂ = (x - mean) rstd (RMSNorm: mean 0), y = x̂ w + b, and with g = dy w, D columns:

    dx = rstd (g - x̂ Σ(g x̂)/D - Σg/D)     (RMSNorm: without the last term)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .rows import check_device, on, rows_of, rows_to_write, warps
from .sizes import cdiv, next_power_of_2

# Columns that a program holds at once.
FORWARD_COLUMNS = 16384
BACKWARD_COLUMNS = 8192
_TILE = 4096
_PIECE = 2048
_PROGRAMS = 4  # of the backward, for each multiprocessor


@triton.jit
def _load(p, o_r, o_c, stride, m, ACC: tl.constexpr):
    return tl.load(p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m, other=0.0).to(ACC)


@triton.jit
def _store(p, b, o_r, o_c, stride, m):
    tl.store(p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def reciprocal_root(v, ACC: tl.constexpr):
    # Rounded as IEEE has it: one number a row costs nothing, and its error is in every value of the row.
    if tl.float64 == ACC:
        r = 1.0 / tl.sqrt(v)
    else:
        r = tl.div_rn(v * 0.0 + 1.0, tl.sqrt_rn(v))
    return r


@triton.jit
def _summed(
    p_x, p_res, p_sum, o_r, o_c, stride_x, stride_res, stride_sum, m, RESIDUAL: tl.constexpr, ACC: tl.constexpr
):
    """x, or x + residual as it is rounded when stored, which is what a backward will see."""
    x = _load(p_x, o_r, o_c, stride_x, m, ACC)
    if RESIDUAL:
        x = (x + _load(p_res, o_r, o_c, stride_res, m, ACC)).to(p_sum.dtype.element_ty)
        _store(p_sum, x, o_r, o_c, stride_sum, m)
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
        _store(p_y, _scaled(x, mean, rstd, p_w, p_b, o_c, mc, CENTERED, ACC), o_r, o_c, width, m)
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
            _store(p_y, _scaled(x, mean, rstd, p_w, p_b, c, mc, CENTERED, ACC), o_r, c, width, m)
    tl.store(p_rstd + o_r, rstd, mask=mr)
    if CENTERED:
        tl.store(p_mean + o_r, mean, mask=mr)


@triton.jit
def _normalised(
    p_dy, p_x, p_w, mean, rstd, o_r, o_c, stride_dy, stride_x, mr, mc, CENTERED: tl.constexpr, ACC: tl.constexpr
):
    """dy, x̂ and g of a tile; 0 outside."""
    m = mr[:, None] & mc[None, :]
    dy = _load(p_dy, o_r, o_c, stride_dy, m, ACC)
    x = _load(p_x, o_r, o_c, stride_x, m, ACC)
    if CENTERED:
        x = tl.where(m, x - mean[:, None], 0.0)
    hat = x * rstd[:, None]
    g = dy
    if p_w is not None:
        g = dy * tl.load(p_w + o_c, mask=mc, other=0.0).to(ACC)[None, :]
    return dy, hat, g


@triton.jit
def _input_gradient(g, hat, dot, shift, rstd, p_dx, o_r, o_c, stride_dx, m, ADD: tl.constexpr, ACC: tl.constexpr):
    t = (g - hat * dot[:, None] - shift[:, None]) * rstd[:, None]
    if ADD:
        t += _load(p_dx, o_r, o_c, stride_dx, m, ACC)
    _store(p_dx, t, o_r, o_c, stride_dx, m)


@triton.jit(do_not_specialize=["rows"])
def norm_bwd_kernel_rows(
    p_dy,
    p_x,
    p_w,
    p_mean,
    p_rstd,
    p_dx,
    p_dw,
    p_db,
    rows,
    width,
    stride_dy,
    stride_x,
    stride_dx,
    CENTERED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx of every n-th tile of rows, added to what is there if ADD; this program's share of dw and db [width]."""
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    o_c = tl.arange(0, COLUMNS)
    step = tl.num_programs(0) * ROWS
    share = pid.to(tl.int64) * width
    if not WIDE:
        mc = o_c < width
        dw = tl.zeros([ROWS, COLUMNS], ACC)
        db = tl.zeros([ROWS, COLUMNS], ACC)
        for start in range(pid * ROWS, rows, step):
            o_r = start + tl.arange(0, ROWS)
            mr = o_r < rows
            m = mr[:, None] & mc[None, :]
            rstd = tl.load(p_rstd + o_r, mask=mr, other=0.0)
            mean = rstd
            if CENTERED:
                mean = tl.load(p_mean + o_r, mask=mr, other=0.0)
            dy, hat, g = _normalised(p_dy, p_x, p_w, mean, rstd, o_r, o_c, stride_dy, stride_x, mr, mc, CENTERED, ACC)
            dot = tl.sum(g * hat, 1) / width
            shift = tl.zeros([ROWS], ACC)
            if CENTERED:
                shift = tl.sum(g, 1) / width
            _input_gradient(g, hat, dot, shift, rstd, p_dx, o_r, o_c, stride_dx, m, ADD, ACC)
            if p_dw is not None:
                dw += dy * hat
                if CENTERED:
                    db += dy
        if p_dw is not None:
            tl.store(p_dw + share + o_c, tl.sum(dw, 0), mask=mc)
            if CENTERED:
                tl.store(p_db + share + o_c, tl.sum(db, 0), mask=mc)
    else:
        for start in range(pid * ROWS, rows, step):
            o_r = start + tl.arange(0, ROWS)
            mr = o_r < rows
            rstd = tl.load(p_rstd + o_r, mask=mr, other=0.0)
            mean = rstd
            if CENTERED:
                mean = tl.load(p_mean + o_r, mask=mr, other=0.0)
            dots = tl.zeros([ROWS, COLUMNS], ACC)
            shifts = tl.zeros([ROWS, COLUMNS], ACC)
            for first in range(0, width, COLUMNS):
                c = first + o_c
                mc = c < width
                dy, hat, g = _normalised(p_dy, p_x, p_w, mean, rstd, o_r, c, stride_dy, stride_x, mr, mc, CENTERED, ACC)
                dots += g * hat
                if CENTERED:
                    shifts += g
            dot = tl.sum(dots, 1) / width
            shift = tl.sum(shifts, 1) / width
            for first in range(0, width, COLUMNS):
                c = first + o_c
                mc = c < width
                m = mr[:, None] & mc[None, :]
                dy, hat, g = _normalised(p_dy, p_x, p_w, mean, rstd, o_r, c, stride_dy, stride_x, mr, mc, CENTERED, ACC)
                _input_gradient(g, hat, dot, shift, rstd, p_dx, o_r, c, stride_dx, m, ADD, ACC)
                if p_dw is not None:
                    # This program's own row of the shares, which the launcher filled with zeros.
                    before = tl.load(p_dw + share + c, mask=mc, other=0.0)
                    tl.store(p_dw + share + c, before + tl.sum(dy * hat, 0), mask=mc)
                    if CENTERED:
                        before = tl.load(p_db + share + c, mask=mc, other=0.0)
                        tl.store(p_db + share + c, before + tl.sum(dy, 0), mask=mc)


def tile(width: int, most: int) -> tuple[int, int, bool]:
    """(ROWS, COLUMNS, WIDE) for rows of `width` values where a program holds at most `most` columns."""
    columns = next_power_of_2(max(1, width))
    if columns > most:
        return 1, _PIECE, True
    return max(1, min(64, _TILE // columns)), columns, False


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
                _vector(weight),
                _vector(bias),
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


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    *,
    add: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """Write dx (..., D), or add it to what is there; returns dw and db (D,) in rstd's dtype, empty unless `need_dw`.

    LayerNorm if there is a mean. dx may be dy, or x.
    """
    check_device(x)
    width, n = x.shape[-1], rstd.numel()
    flat_dy, flat_x, flat_dx = rows_of(dy), rows_of(x), rows_to_write(dx)
    count, columns, wide = tile(width, BACKWARD_COLUMNS)
    programs = backward_programs(cdiv(n, count), x.device)
    make = rstd.new_zeros if wide or n == 0 else rstd.new_empty
    dw = make(programs if need_dw else 0, width)
    db = make(programs if need_dw and mean is not None else 0, width)
    if n:
        with on(x.device):
            norm_bwd_kernel_rows[(programs,)](
                flat_dy,
                flat_x,
                _vector(weight),
                None if mean is None else mean.reshape(-1),
                rstd.reshape(-1),
                flat_dx,
                dw if need_dw else None,
                db if db.numel() else None,
                n,
                width,
                flat_dy.stride(0),
                flat_x.stride(0),
                flat_dx.stride(0),
                CENTERED=mean is not None,
                ADD=add,
                ROWS=count,
                COLUMNS=columns,
                WIDE=wide,
                num_warps=warps(count * columns),
                enable_fp_fusion=True,
            )
    return added_up(dw), added_up(db)


def backward_programs(tiles: int, device: torch.device) -> int:
    """How many programs go through the tiles of a backward, each with a share of the weights' gradients."""
    return max(1, min(tiles, _PROGRAMS * tuning.multiprocessors(device)))


def added_up(shares: Tensor) -> Tensor:
    """The sum over programs; empty where there are none. Nothing is launched for what nobody asked for."""
    return shares.sum(0) if shares.shape[0] else shares.new_empty(0)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
