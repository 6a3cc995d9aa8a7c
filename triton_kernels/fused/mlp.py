"""The MLP around its hidden values: norm, gate and up, activation in one kernel; and its backward with all made again.

With h = norm(x), made as it is loaded from x and the rows' statistics, and φ the activation:

    forward:   gate = h Wgᵀ + bg,  up = h Wuᵀ + bu,  act = φ(gate) up           (plain MLPs: act = φ(up))
    backward:  gate, up as above;  dact = dy Wd;  dgate = dact up φ'(gate),  dup = dact φ(gate),  act

gate and up are rounded to the dtype of the products before the activation, whether they are stored or not, so that
a backward gets the same bits from kept ones and from those it makes itself.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from ..activation import phi, phi_and_slope
from ..rows import on
from ..sizes import cdiv
from . import choice
from .matrices import Normed, check_matrix, check_vector, options
from .tiles import GROUP, load, load_statistics, load_transposed, normalised, place


@triton.jit
def hidden(
    p_x,
    p_norm,
    p_norm_bias,
    p_gate_w,
    p_gate_b,
    p_up_w,
    p_up_b,
    mean,
    rstd,
    o_m,
    o_n,
    mm,
    mn,
    width,
    stride_x,
    stride_gw,
    stride_uw,
    CENTERED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """gate and up [BLOCK_M, BLOCK_N], rounded to the weights' dtype. Without p_gate_w both are up."""
    DTYPE: tl.constexpr = p_up_w.dtype.element_ty
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A loop that may run no times leaves zeros or a product in the accumulators: Hopper's assembler then lets no two
    # products overlap.
    tl.assume(width > 0)
    for start in range(0, width, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mk = o_k < width
        x = load(p_x, o_m, o_k, stride_x, mm, mk, RAGGED)  # [BLOCK_M, BLOCK_K]
        h = normalised(x, p_norm, p_norm_bias, mean, rstd, o_k, mk, CENTERED, RAGGED, DTYPE)
        if p_gate_w is not None:
            w = load_transposed(p_gate_w, o_n, o_k, stride_gw, mn, mk, RAGGED)  # [BLOCK_K, BLOCK_N]
            gate = tl.dot(h, w, gate, input_precision=PRECISION)
        w = load_transposed(p_up_w, o_n, o_k, stride_uw, mn, mk, RAGGED)
        up = tl.dot(h, w, up, input_precision=PRECISION)
    if p_gate_b is not None:
        gate += tl.load(p_gate_b + o_n, mask=mn, other=0.0).to(tl.float32)[None, :]
    if p_up_b is not None:
        up += tl.load(p_up_b + o_n, mask=mn, other=0.0).to(tl.float32)[None, :]
    up = up.to(DTYPE)
    gate = up if p_gate_w is None else gate.to(DTYPE)
    return gate, up


@triton.jit(do_not_specialize=["tokens"])
def mlp_fwd_kernel_hidden(
    p_x,
    p_mean,
    p_rstd,
    p_norm,
    p_norm_bias,
    p_gate_w,
    p_gate_b,
    p_up_w,
    p_up_b,
    p_act,
    p_gate,
    p_up,
    tokens,
    width,
    d_ff,
    stride_x,
    stride_gw,
    stride_uw,
    stride_act,
    stride_gate,
    stride_up,
    FUNCTION: tl.constexpr,
    CENTERED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """act [BLOCK_M tokens, BLOCK_N hidden]; gate and up too where there are pointers for them."""
    i, j = place(tl.cdiv(tokens, BLOCK_M), tl.cdiv(d_ff, BLOCK_N), GROUP)
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mm, mn = o_m < tokens, o_n < d_ff
    mean, rstd = load_statistics(p_mean, p_rstd, o_m, mm, CENTERED)
    gate, up = hidden(
        p_x,
        p_norm,
        p_norm_bias,
        p_gate_w,
        p_gate_b,
        p_up_w,
        p_up_b,
        mean,
        rstd,
        o_m,
        o_n,
        mm,
        mn,
        width,
        stride_x,
        stride_gw,
        stride_uw,
        CENTERED,
        RAGGED,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    _store(p_gate, gate, o_m, o_n, stride_gate, mm, mn)
    _store(p_up, up, o_m, o_n, stride_up, mm, mn)
    act = phi(gate.to(tl.float32), FUNCTION)
    if p_gate_w is not None:
        act *= up.to(tl.float32)
    _store(p_act, act, o_m, o_n, stride_act, mm, mn)


@triton.jit
def _store(p, b, o_m, o_n, stride, mm, mn):
    if p is not None:
        m = mm[:, None] & mn[None, :]
        tl.store(p + o_m.to(tl.int64)[:, None] * stride + o_n[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["tokens"])
def mlp_bwd_kernel_hidden(
    p_x,
    p_mean,
    p_rstd,
    p_norm,
    p_norm_bias,
    p_gate_w,
    p_gate_b,
    p_up_w,
    p_up_b,
    p_dy,
    p_down_w,
    p_gate,
    p_up,
    p_act,
    p_dgate,
    p_dup,
    tokens,
    width,
    d_out,
    d_ff,
    stride_x,
    stride_gw,
    stride_uw,
    stride_dy,
    stride_dw,
    stride_gate,
    stride_up,
    stride_act,
    stride_dgate,
    stride_dup,
    FUNCTION: tl.constexpr,
    CENTERED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """act, dgate and dup [BLOCK_M tokens, BLOCK_N hidden]; gate and up are read where p_up is there, else made."""
    i, j = place(tl.cdiv(tokens, BLOCK_M), tl.cdiv(d_ff, BLOCK_N), GROUP)
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mm, mn = o_m < tokens, o_n < d_ff
    if p_up is not None:
        up = load(p_up, o_m, o_n, stride_up, mm, mn, True)
        gate = up
        if p_gate is not None:
            gate = load(p_gate, o_m, o_n, stride_gate, mm, mn, True)
    else:
        mean, rstd = load_statistics(p_mean, p_rstd, o_m, mm, CENTERED)
        gate, up = hidden(
            p_x,
            p_norm,
            p_norm_bias,
            p_gate_w,
            p_gate_b,
            p_up_w,
            p_up_b,
            mean,
            rstd,
            o_m,
            o_n,
            mm,
            mn,
            width,
            stride_x,
            stride_gw,
            stride_uw,
            CENTERED,
            RAGGED,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    dact = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d_out, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mk = o_k < d_out
        dy = load(p_dy, o_m, o_k, stride_dy, mm, mk, RAGGED)  # [BLOCK_M, BLOCK_K]
        w = load(p_down_w, o_k, o_n, stride_dw, mk, mn, True)  # [BLOCK_K, BLOCK_N]
        dact = tl.dot(dy, w, dact, input_precision=PRECISION)
    dact = dact.to(p_act.dtype.element_ty).to(tl.float32)
    y, d = phi_and_slope(gate.to(tl.float32), FUNCTION)
    if p_gate_w is not None:
        u = up.to(tl.float32)
        _store(p_dup, dact * y, o_m, o_n, stride_dup, mm, mn)
        _store(p_dgate, dact * (d * u), o_m, o_n, stride_dgate, mm, mn)
        y *= u
    else:
        _store(p_dup, dact * d, o_m, o_n, stride_dup, mm, mn)
    _store(p_act, y, o_m, o_n, stride_act, mm, mn)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The weights before the activation: up (F, width), gate too for gated MLPs; biases (F,) or None."""

    up: Tensor
    up_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None

    def check(self, width: int) -> None:
        d_ff = self.up.shape[0]
        check_matrix("the weight of up", self.up, (d_ff, width))
        if self.gate is not None:
            check_matrix("the weight of gate", self.gate, (d_ff, width), self.up)
        check_vector("the bias of up", self.up_bias, d_ff)
        check_vector("the bias of gate", self.gate_bias, d_ff)

    def pointers(self) -> dict[str, Tensor | None]:
        """The kernels' arguments of these tensors."""
        return {
            "p_gate_w": self.gate,
            "p_gate_b": self.gate_bias,
            "p_up_w": self.up,
            "p_up_b": self.up_bias,
        }


def forward(
    normed: Normed,
    weights: Hidden,
    function: str,
    act: Tensor,
    gate: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """Write φ(gate) up, or φ(up) without a gate, to act (t, F); gate and up themselves to those given.

    `function` is φ, one of `activation.FUNCTIONS`. norm(x) is rounded to the weights' dtype, which act has too.
    """
    shape = _checked(normed, weights)
    for name, t in (("act", act), ("gate", gate), ("up", up)):
        if t is not None:
            check_matrix(name, t, shape, weights.up)
    if 0 in shape:
        return
    config = choice.config(choice.key("mlp", normed.width, weights.up.dtype, weights.up.device))
    with on(act.device):
        mlp_fwd_kernel_hidden[_grid(shape, config)](
            **normed.pointers(),
            **weights.pointers(),
            p_act=act,
            p_gate=gate,
            p_up=up,
            tokens=shape[0],
            width=normed.width,
            d_ff=shape[1],
            stride_x=normed.x.stride(0),
            stride_gw=_stride(weights.gate),
            stride_uw=weights.up.stride(0),
            stride_act=act.stride(0),
            stride_gate=_stride(gate),
            stride_up=_stride(up),
            **_constants(normed, function, config, normed.width),
            **options(config, weights.up.dtype),
        )


def backward(
    dy: Tensor,
    down: Tensor,
    normed: Normed,
    weights: Hidden,
    function: str,
    outs: tuple[Tensor, Tensor | None, Tensor],
    kept: tuple[Tensor | None, Tensor] | None = None,
) -> None:
    """Write (act, dgate, dup) (t, F) from dy (t, n) and the weight of the down projection, down (n, F).

    gate and up are made again, or read where `kept`; the outputs may be those. Without a gate there is no dgate.
    """
    shape = _checked(normed, weights)
    check_matrix("dy", dy, (shape[0], dy.shape[1]), weights.up)
    check_matrix("the weight of down", down, (dy.shape[1], shape[1]), weights.up)
    act, dgate, dup = outs
    gate, up = kept or (None, None)
    for name, t in (("act", act), ("dgate", dgate), ("dup", dup), ("gate", gate), ("up", up)):
        if t is not None:
            check_matrix(name, t, shape, weights.up)
    if 0 in shape:
        return
    config = choice.config(choice.key("mlp", normed.width, weights.up.dtype, weights.up.device))
    with on(act.device):
        mlp_bwd_kernel_hidden[_grid(shape, config)](
            **normed.pointers(),
            **weights.pointers(),
            p_dy=dy,
            p_down_w=down,
            p_gate=gate,
            p_up=up,
            p_act=act,
            p_dgate=dgate,
            p_dup=dup,
            tokens=shape[0],
            width=normed.width,
            d_out=dy.shape[1],
            d_ff=shape[1],
            stride_x=normed.x.stride(0),
            stride_gw=_stride(weights.gate),
            stride_uw=weights.up.stride(0),
            stride_dy=dy.stride(0),
            stride_dw=down.stride(0),
            stride_gate=_stride(gate),
            stride_up=_stride(up),
            stride_act=act.stride(0),
            stride_dgate=_stride(dgate),
            stride_dup=dup.stride(0),
            **_constants(normed, function, config, normed.width, dy.shape[1]),
            **options(config, weights.up.dtype),
        )


def _checked(normed: Normed, weights: Hidden) -> tuple[int, int]:
    normed.check()
    weights.check(normed.width)
    return normed.x.shape[0], weights.up.shape[0]


def _constants(normed: Normed, function: str, config: choice.Config, *widths: int) -> dict[str, object]:
    return {
        "FUNCTION": function,
        "CENTERED": normed.mean is not None,
        "RAGGED": any(width % config.block_k for width in widths),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": GROUP,
    }


def _grid(shape: tuple[int, int], config: choice.Config) -> tuple[int]:
    return (cdiv(shape[0], config.block_m) * cdiv(shape[1], config.block_n),)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)
