"""The MLP's activations, one pass over memory: φ(gate) · up and φ(x), and backwards that make φ again.

The backward's outputs may be its inputs: every value is read before it is written, by the same thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rows import check_device, on, rows_of, rows_to_write
from .sizes import cdiv

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2")
BLOCK = 1024
WARPS = 4
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_GAUSS = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def phi(x, FUNCTION: tl.constexpr):
    """φ(x). The tanh form of GELU is x times a sigmoid: (1 + tanh(u)) / 2 = σ(2u)."""
    if FUNCTION == "silu":
        y = x * tl.sigmoid(x)
    elif FUNCTION == "gelu":
        y = x * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF))
    elif FUNCTION == "gelu_tanh":
        y = x * tl.sigmoid((x + x * x * x * _CUBIC) * _TWO_SQRT_2_OVER_PI)
    else:
        r = tl.where(x < 0, 0.0, x)  # a maximum would lose NaN
        y = r * r
    return y


@triton.jit
def phi_and_slope(x, FUNCTION: tl.constexpr):
    """φ(x) and φ'(x). 1 - σ(v) is taken as σ(-v) where a large factor would show the rounding."""
    if FUNCTION == "silu":
        s = tl.sigmoid(x)
        y = x * s
        d = s * (1.0 + x * (1.0 - s))
    elif FUNCTION == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        y = x * s
        d = s + x * (tl.exp(-0.5 * x * x) * _GAUSS)
    elif FUNCTION == "gelu_tanh":
        v = (x + x * x * x * _CUBIC) * _TWO_SQRT_2_OVER_PI
        s = tl.sigmoid(v)
        y = x * s
        d = s + y * tl.sigmoid(-v) * ((1.0 + 3.0 * (x * x * _CUBIC)) * _TWO_SQRT_2_OVER_PI)
    else:
        r = tl.where(x < 0, 0.0, x)
        y = r * r
        d = 2.0 * r
    return y, d


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """(row, columns, mask) of a program: rows of `width` columns, cut into blocks."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (width - 1) // BLOCK + 1  # not cdiv, whose sum passes 31 bits where a width just does not
    o_c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    return pid // blocks, o_c, o_c < width


@triton.jit
def _read(p, row, o_c, stride, m):
    ACC: tl.constexpr = tl.float64 if p.dtype.element_ty == tl.float64 else tl.float32
    return tl.load(p + row * stride + o_c, mask=m, other=0.0).to(ACC)


@triton.jit
def _write(p, b, row, o_c, stride, m):
    tl.store(p + row * stride + o_c, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def glu_fwd_kernel(
    p_gate, p_up, p_act, width, stride_g, stride_u, stride_a, FUNCTION: tl.constexpr, BLOCK: tl.constexpr
):
    """act = φ(gate) up; without p_up, φ(gate)."""
    row, o_c, m = _place(width, BLOCK)
    y = phi(_read(p_gate, row, o_c, stride_g, m), FUNCTION)
    if p_up is not None:
        y *= _read(p_up, row, o_c, stride_u, m)
    _write(p_act, y, row, o_c, stride_a, m)


@triton.jit
def glu_bwd_kernel(
    p_dact,
    p_gate,
    p_up,
    p_act,
    p_dgate,
    p_dup,
    width,
    stride_da,
    stride_g,
    stride_u,
    stride_a,
    stride_dg,
    stride_du,
    FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """act, dgate and dup from dact, gate and up; without p_up, φ(gate) and dgate."""
    row, o_c, m = _place(width, BLOCK)
    da = _read(p_dact, row, o_c, stride_da, m)
    y, d = phi_and_slope(_read(p_gate, row, o_c, stride_g, m), FUNCTION)
    if p_up is not None:
        u = _read(p_up, row, o_c, stride_u, m)
        _write(p_dup, da * y, row, o_c, stride_du, m)
        y *= u
        d *= u
    _write(p_dgate, da * d, row, o_c, stride_dg, m)
    _write(p_act, y, row, o_c, stride_a, m)


def forward(gate: Tensor, up: Tensor | None, function: str, act: Tensor) -> None:
    """Write φ(gate) up, or φ(gate) without `up`, to act, which may be gate. All (..., F) of one dtype.

    `function` is φ, one of `FUNCTIONS`.
    """
    check_device(gate)
    if gate.numel() == 0:
        return
    (g, u), (a,) = _lined_up((gate, up), (act,))
    with on(gate.device):
        glu_fwd_kernel[(g.shape[0] * cdiv(g.shape[1], BLOCK),)](
            g,
            u,
            a,
            g.shape[1],
            *_strides(g, u, a),
            FUNCTION=function,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def backward(
    dact: Tensor,
    gate: Tensor,
    up: Tensor | None,
    function: str,
    outs: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Write (act, dgate, dup), which may be (dact, gate, up). Without `up` there is no dup."""
    check_device(gate)
    if gate.numel() == 0:
        return
    (da, g, u), (a, dg, du) = _lined_up((dact, gate, up), outs)
    with on(gate.device):
        glu_bwd_kernel[(g.shape[0] * cdiv(g.shape[1], BLOCK),)](
            da,
            g,
            u,
            a,
            dg,
            du,
            g.shape[1],
            *_strides(da, g, u, a, dg, du),
            FUNCTION=function,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def _lined_up(
    read: tuple[Tensor | None, ...], written: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """All as rows; as one long row where nothing lies between the rows."""
    ins = [None if t is None else rows_of(t) for t in read]
    outs = [None if t is None else rows_to_write(t) for t in written]
    if all(t is None or t.is_contiguous() for t in (*ins, *outs)):
        ins, outs = ([None if t is None else t.view(1, -1) for t in ts] for ts in (ins, outs))
    return ins, outs


def _strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]
