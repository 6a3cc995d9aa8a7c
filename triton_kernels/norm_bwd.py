"""The backward of RMSNorm and LayerNorm: one pass over memory.

As many programs as fit on the chip walk through the rows, with the next ones on their way while one is computed, and
each sums its share of the weight gradients in registers; the shares are added up in a fixed order, so the result is
the same every time. Rows wider than a tile are gone through in pieces, twice, the second time from the L2 cache.

With x̂ = (x - mean) rstd (RMSNorm: mean 0) and g = dy w, D columns:

    dx = rstd (g - x̂ Σ(g x̂)/D - Σg/D)     (RMSNorm: without the last term)
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .norm import TILE, store, tile, vector
from .rows import check_device, on, rows_of, rows_to_write, warps
from .sizes import cdiv, next_power_of_2

COLUMNS = 8192  # that a program holds at once
# Where nothing has to be masked, no mean subtracted, and two bytes hold a value, the registers suffice for more.
_MOST = 16384
WARPS = 16  # on a multiprocessor: 128 registers for each thread


@triton.jit
def _read(ptrs, m):
    """Without a mask where all of it is there."""
    if m is None:
        v = tl.load(ptrs)
    else:
        v = tl.load(ptrs, mask=m, other=0.0)
    return v


@triton.jit
def _rounded(p, o_r, o_c, stride, m):
    """A tile as it lies in memory."""
    return _read(p + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], m)


@triton.jit
def _weight(p_w, o_c, mc, there, ACC: tl.constexpr):
    """The weights, in a branch that is always taken: what stands outside of one is fetched through shared memory for
    every row anew, instead of from the L1 cache, and kept in registers from its first use to its last."""
    w = tl.zeros(o_c.shape, p_w.dtype.element_ty)
    if there:
        w = _read(p_w + o_c, mc)
    return w.to(ACC)[None, :]


@triton.jit
def _centred(x, mean, CENTERED: tl.constexpr, ACC: tl.constexpr):
    """x̂ but for rstd; beyond a row's end whatever it is: dy is 0 there."""
    t = x.to(ACC)
    if CENTERED:
        t -= mean[:, None]
    return t


@triton.jit
def _times_weight(dy, p_w, o_c, mc, there, ACC: tl.constexpr):
    g = dy.to(ACC)
    if p_w is not None:
        g *= _weight(p_w, o_c, mc, there, ACC)
    return g


@triton.jit
def _input_gradient(
    dy, x, p_w, mean, rstd, dot, shift, old, p_dx, o_r, o_c, stride_dx, m, mc, there, CENTERED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Write dx, made of dy and x again: their floats are not kept over the reduction, for want of registers."""
    x = _centred(x, mean, CENTERED, ACC)
    t = _times_weight(dy, p_w, o_c, mc, there, ACC) - x * (dot * rstd)[:, None]
    if CENTERED:
        t -= shift[:, None]
    t *= rstd[:, None]
    if old is not None:
        t += old.to(ACC)
    store(p_dx, t, o_r, o_c, stride_dx, m)


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
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of every n-th tile of rows, added to what is there if ADD; this program's share of dw and db [width].

    WHOLE: a tile is one row and no wider. STAGES: tiles in flight, and the one that is computed.
    """
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    o_c = tl.arange(0, COLUMNS)
    step = tl.num_programs(0) * ROWS
    share = pid.to(tl.int64) * width
    if not WIDE:
        mc = None if WHOLE else o_c < width
        dw = tl.zeros([ROWS, COLUMNS], ACC)
        db = tl.zeros([ROWS, COLUMNS], ACC)
        for start in tl.range(pid * ROWS, rows, step, num_stages=STAGES):
            o_r = start + tl.arange(0, ROWS)
            mr = o_r < rows
            m = None if WHOLE else mr[:, None] & mc[None, :]
            rstd = tl.load(p_rstd + o_r, mask=mr, other=0.0)
            mean = rstd
            if CENTERED:
                mean = tl.load(p_mean + o_r, mask=mr, other=0.0)
            dy = _rounded(p_dy, o_r, o_c, stride_dy, m)
            x = _rounded(p_x, o_r, o_c, stride_x, m)
            old = _rounded(p_dx, o_r, o_c, stride_dx, m) if ADD else None
            hat = _centred(x, mean, CENTERED, ACC) * rstd[:, None]
            if p_dw is not None:
                dw += dy.to(ACC) * hat
                if CENTERED:
                    db += dy.to(ACC)
            g = _times_weight(dy, p_w, o_c, mc, start < rows, ACC)
            dot = tl.sum(g * hat, 1) / width
            shift = tl.sum(g, 1) / width if CENTERED else None
            _input_gradient(
                dy, x, p_w, mean, rstd, dot, shift, old, p_dx, o_r, o_c, stride_dx, m, mc, start < rows, CENTERED, ACC
            )  # fmt: skip
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
            for first in tl.range(0, width, COLUMNS, num_stages=STAGES):
                c = first + o_c
                mc = c < width
                m = mr[:, None] & mc[None, :]
                dy = _rounded(p_dy, o_r, c, stride_dy, m)
                x = _rounded(p_x, o_r, c, stride_x, m)
                g = _times_weight(dy, p_w, c, mc, start < rows, ACC)
                dots += g * (_centred(x, mean, CENTERED, ACC) * rstd[:, None])
                if CENTERED:
                    shifts += g
            dot = tl.sum(dots, 1) / width
            shift = tl.sum(shifts, 1) / width if CENTERED else None
            for first in range(0, width, COLUMNS):
                c = first + o_c
                mc = c < width
                m = mr[:, None] & mc[None, :]
                dy = _rounded(p_dy, o_r, c, stride_dy, m)
                x = _rounded(p_x, o_r, c, stride_x, m)
                old = _rounded(p_dx, o_r, c, stride_dx, m) if ADD else None
                if p_dw is not None:
                    # This program's own row of the shares, which the launcher filled with zeros.
                    before = tl.load(p_dw + share + c, mask=mc, other=0.0)
                    dw = tl.sum(dy.to(ACC) * (_centred(x, mean, CENTERED, ACC) * rstd[:, None]), 0)
                    tl.store(p_dw + share + c, before + dw, mask=mc)
                    if CENTERED:
                        before = tl.load(p_db + share + c, mask=mc, other=0.0)
                        tl.store(p_db + share + c, before + tl.sum(dy.to(ACC), 0), mask=mc)
                _input_gradient(
                    dy, x, p_w, mean, rstd, dot, shift, old, p_dx, o_r, c, stride_dx, m, mc, start < rows, CENTERED, ACC
                )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the backward goes through rows: the kernel's constants, warps of a program, programs of a multiprocessor."""

    ROWS: int
    COLUMNS: int
    WIDE: bool
    WHOLE: bool
    STAGES: int
    num_warps: int

    @property
    def resident(self) -> int:
        return max(1, WARPS // self.num_warps)

    def constants(self) -> dict[str, int | bool]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def plan_of(width: int, size: int, centered: bool, add: bool, arch: str) -> Plan:
    """For rows of `width` values of `size` bytes."""
    whole = width == next_power_of_2(width) and width >= TILE
    if centered:  # the sums of db are as many registers as those of dw
        most = TILE if add else COLUMNS
    else:
        most = _MOST if whole and size == 2 and not add else COLUMNS
    rows, columns, wide = tile(width, most)
    if wide:
        # The shares are read and written once for two rows, and these come again while they are in the L2 cache.
        return Plan(2, columns, True, False, _stages(size, arch), 8)
    stages, num_warps = _stages(size, arch), warps(max(TILE, columns))
    if columns > COLUMNS or (centered and add):
        stages = min(2, stages)
    if centered and rows == 1 and not (arch.startswith("gfx") and num_warps == 16):  # of 64 lanes: 1,024 threads
        num_warps *= 2
    elif rows > 1 and (centered or (size == 4 and add)):
        rows //= 2
    return Plan(rows, columns, False, whole, stages, num_warps)


def _stages(size: int, arch: str) -> int:
    """Two tiles ahead, as far as Ampere's shared memory goes; none on AMD's 64 KiB, and none of float64."""
    if arch.startswith("gfx") or size > 4:
        return 1
    return 3 if size == 2 else 2


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
    plan = plan_of(width, x.element_size(), mean is not None, add, tuning.architecture(x.device))
    programs = programs_for(cdiv(n, plan.ROWS), plan.resident, x.device)
    sums = (1 if mean is None else 2) if need_dw else 0
    shares = (rstd.new_zeros if plan.WIDE or n == 0 else rstd.new_empty)(sums, programs, width)
    if n:
        with on(x.device):
            norm_bwd_kernel_rows[(programs,)](
                flat_dy,
                flat_x,
                vector(weight),
                None if mean is None else mean.reshape(-1),
                rstd.reshape(-1),
                flat_dx,
                shares[0] if sums else None,
                shares[1] if sums == 2 else None,
                n,
                width,
                flat_dy.stride(0),
                flat_x.stride(0),
                flat_dx.stride(0),
                CENTERED=mean is not None,
                ADD=add,
                enable_fp_fusion=True,
                **plan.constants(),
            )
    # One sum for both would be a launch less, and two outputs of an op in one memory, which PyTorch does not allow.
    dw = added_up(shares[0]) if sums else rstd.new_empty(0)
    return dw, added_up(shares[1]) if sums == 2 else rstd.new_empty(0)


def programs_for(tiles: int, resident: int, device: torch.device) -> int:
    """How many programs go through the tiles of a backward, each with a share of the weights' gradients.

    As many as run at once, `resident` to a multiprocessor: with a third more, 528 where 396 fit, an H200 took twice
    as long as for one round of them.
    """
    return max(1, min(tiles, resident * tuning.multiprocessors(device)))


def added_up(shares: Tensor) -> Tensor:
    """shares (programs, D) summed over the programs, in an order that the shape alone decides."""
    return shares.sum(0)
