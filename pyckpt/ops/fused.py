"""Products of a block with what stands around them: the norm before, RoPE, an activation or a residual after.

Each op is the composition that its docstring says, and that the ``torch`` implementation runs: products of the
library and the pointwise parts. The ``triton`` one (`fused_triton`) is one kernel: then neither the normalised x nor,
in the MLP's backward, gate and up are ever stored.

norm(x) is given as x (t, width), the rows' statistics (t,) as `row_statistics` makes them (mean None for RMSNorm),
and the norm's weight and bias. It is rounded to the dtype of the products, which is the weights'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt.ops.activation import FUNCTIONS
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.norm import reciprocal_rms, rms_norm_backward
from pyckpt.ops.products import sum_of_products
from pyckpt.ops.registry import define
from pyckpt.spec import GATED_MLPS

ops = torch.ops.pyckpt
_NORM = "Tensor x, Tensor? mean, Tensor rstd, Tensor norm_weight, Tensor? norm_bias"
_MLP = "Tensor? w_gate, Tensor? b_gate, Tensor w_up, Tensor? b_up, str kind"


def normalised(
    x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """norm(x) in `dtype` from the rows' statistics."""
    h = x.to(rstd.dtype)
    if mean is not None:
        h = h - mean[:, None]
    h = h * rstd[:, None] * weight
    return (h if bias is None else h + bias).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _nothing(*args: Any) -> None:
    return None


# --- statistics ---------------------------------------------------------------------------------------------


def _statistics_like(x: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=acc_dtype(x.dtype))
    return rstd.new_empty(x.shape[0] if centered else 0), rstd


def _row_statistics_fake(x: Tensor, centered: bool, eps: float) -> tuple[Tensor, Tensor]:
    return _statistics_like(x, centered)


@define("row_statistics(Tensor x, bool centered, float eps) -> (Tensor, Tensor)", fake=_row_statistics_fake)
def row_statistics(x: Tensor, centered: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the rows of x (t, width), (t,) in float32 (or float64); mean is empty if not centered."""
    x = x.to(acc_dtype(x.dtype))
    mean = x.mean(1) if centered else x.new_empty(0)
    d = x - mean[:, None] if centered else x
    return mean, d.square().mean(1).add_(eps).rsqrt_()


# --- q, k, v ------------------------------------------------------------------------------------------------


@define(
    f"norm_qkv_({_NORM}, Tensor wq, Tensor wk, Tensor wv, Tensor? bq, Tensor? bk, Tensor? bv, Tensor? q_norm, "
    "Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, bool interleaved, int head_dim, Tensor(a!)? q, "
    "Tensor(b!)? k, Tensor(c!)? v, Tensor(d!)? raw_q, Tensor(e!)? raw_k) -> ()",
    fake=_nothing,
)
def norm_qkv_(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    bq: Tensor | None,
    bk: Tensor | None,
    bv: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    head_dim: int,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    raw_q: Tensor | None,
    raw_k: Tensor | None,
) -> None:
    """q = rope(qk_norm(norm(x) Wqᵀ + bq)), likewise k; v = norm(x) Wvᵀ + bv. (t, heads * head_dim), filled.

    raw_q and raw_k get q and k before QK-norm. What is None is not made; v only goes with k.
    """
    h = normalised(x, mean, rstd, norm_weight, norm_bias, wq.dtype)
    for w, b, scale, out, raw in ((wq, bq, q_norm, q, raw_q), (wk, bk, k_norm, k, raw_k)):
        if out is None:
            continue
        made = linear(h, w, b)
        if raw is not None:
            raw.copy_(made)
        _finish(made, scale, eps, cos, sin, interleaved, head_dim, out)
    if v is not None:
        v.copy_(linear(h, wv, bv))


def _finish(
    raw: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    head_dim: int,
    out: Tensor,
) -> None:
    heads = raw.view(raw.shape[0], -1, head_dim)
    if weight is not None:
        heads = ops.rms_norm_fwd(heads, weight, eps)[0]
    if cos is not None:
        heads = ops.rope(heads, cos, sin, False, interleaved)
    out.copy_(heads.reshape(out.shape))


@define(
    "qk_finish_(Tensor raw, Tensor weight, float eps, Tensor? cos, Tensor? sin, bool interleaved, int head_dim, "
    "Tensor(a!) out) -> ()",
    fake=_nothing,
)
def qk_finish_(
    raw: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    head_dim: int,
    out: Tensor,
) -> None:
    """What `norm_qkv_` makes of a raw q or k (t, heads * head_dim) that was kept, with the same bits."""
    _finish(raw, weight, eps, cos, sin, interleaved, head_dim, out)


def _qk_finish_bwd_fake(
    d: Tensor,
    raw: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    head_dim: int,
    need_dw: bool,
) -> Tensor:
    return raw.new_empty(head_dim if need_dw else 0, dtype=acc_dtype(raw.dtype))


@define(
    "qk_finish_bwd_(Tensor(a!) d, Tensor raw, Tensor weight, float eps, Tensor? cos, Tensor? sin, bool interleaved, "
    "int head_dim, bool need_dw) -> Tensor",
    fake=_qk_finish_bwd_fake,
)
def qk_finish_bwd_(
    d: Tensor,
    raw: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    head_dim: int,
    need_dw: bool,
) -> Tensor:
    """Backward of `qk_finish_`: d (t, heads * head_dim), the gradient of what it made, becomes that of raw.

    Returns the weight's gradient (head_dim,) in the accumulation dtype, empty unless `need_dw`.
    """
    shape = (d.shape[0], d.shape[1] // head_dim, head_dim)
    made, rows = d.contiguous().view(shape), raw.view(shape)  # d itself, but where that is part of something wider
    if cos is not None:
        ops.rope_(made, cos, sin, True, interleaved)
    dw = rms_norm_backward(made, rows, weight, reciprocal_rms(rows, eps), made, False, need_dw)
    if not d.is_contiguous():
        d.copy_(made.view(d.shape))
    return dw


# --- the residual stream ------------------------------------------------------------------------------------


def _linear_residual_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out: Tensor,
    statistics: bool,
    centered: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return no_statistics(out) if not statistics else _statistics_like(out, centered)


def no_statistics(out: Tensor) -> tuple[Tensor, Tensor]:
    empty = out.new_empty(0, dtype=acc_dtype(out.dtype))
    return empty, torch.empty_like(empty)


@define(
    "linear_residual_(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor(a!) out, bool statistics, "
    "bool centered, float eps) -> (Tensor, Tensor)",
    fake=_linear_residual_fake,
)
def linear_residual_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out: Tensor,
    statistics: bool,
    centered: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out (t, n) = residual + x Wᵀ + bias; with `statistics` the result is `row_statistics` of out, bit for bit.

    residual and out share a dtype, which need not be that of x (t, width) and weight (n, width). Without `statistics`
    both results are empty.
    """
    if residual.dtype == x.dtype:
        torch.addmm(residual, x, weight.t(), out=out)
        if bias is not None:
            out += bias
    else:
        torch.add(residual, linear(x, weight, bias), out=out)
    return ops.row_statistics(out, centered, eps) if statistics else no_statistics(out)


@define(
    "linear_delta_(Tensor d, Tensor weight, Tensor o, Tensor(a!) do, Tensor(b!) delta) -> ()",
    fake=_nothing,
)
def linear_delta_(d: Tensor, weight: Tensor, o: Tensor, do: Tensor, delta: Tensor) -> None:
    """do (t, heads * dim) = d W, and delta (heads, t) = Σ do o of every head: what the attention backward starts from.

    d (t, n), weight (n, heads * dim), o like do; delta in the accumulation dtype.
    """
    torch.mm(d, weight, out=do)
    by_head = (do.to(delta.dtype) * o).view(do.shape[0], delta.shape[0], -1)
    delta.copy_(by_head.sum(-1).t())


# --- the MLP ------------------------------------------------------------------------------------------------


@define(
    f"norm_mlp_({_NORM}, {_MLP}, Tensor(a!) act, Tensor(b!)? gate, Tensor(c!)? up) -> ()",
    fake=_nothing,
)
def norm_mlp_(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    kind: str,
    act: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
) -> None:
    """act (t, F) = φ(norm(x) Wgᵀ + bg) (norm(x) Wuᵀ + bu), for MLPs without a gate φ(norm(x) Wuᵀ + bu).

    `kind` is one of `spec.MLPS`. gate and up, where given, get the values before the activation.
    """
    check_kind(kind, w_gate is not None)
    h = normalised(x, mean, rstd, norm_weight, norm_bias, w_up.dtype)
    made_up = linear(h, w_up, b_up)
    made_gate = None if w_gate is None else linear(h, w_gate, b_gate)
    if up is not None:
        up.copy_(made_up)
    if gate is not None and made_gate is not None:
        gate.copy_(made_gate)
    act.copy_(ops.act_fwd(made_up, kind) if made_gate is None else ops.glu_fwd(made_gate, made_up, kind))


@define(
    f"norm_mlp_bwd_(Tensor dy, Tensor w_down, {_NORM}, {_MLP}, Tensor? gate, Tensor? up, Tensor(a!) act, "
    "Tensor(b!)? dgate, Tensor(c!) dup) -> ()",
    fake=_nothing,
)
def norm_mlp_bwd_(
    dy: Tensor,
    w_down: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    kind: str,
    gate: Tensor | None,
    up: Tensor | None,
    act: Tensor,
    dgate: Tensor | None,
    dup: Tensor,
) -> None:
    """Backward of the MLP to its inner products: act, dgate and dup (t, F) from dy (t, n) and w_down (n, F).

    gate and up are made again as `norm_mlp_` made them, or read where they were kept. The weight gradients are
    dyᵀ act, dgateᵀ norm(x) and dupᵀ norm(x).
    """
    check_kind(kind, w_gate is not None)
    if up is None:
        h = normalised(x, mean, rstd, norm_weight, norm_bias, w_up.dtype)
        up = linear(h, w_up, b_up)
        gate = None if w_gate is None else linear(h, w_gate, b_gate)
    dact = torch.mm(dy, w_down)
    made = ops.act_bwd(dact, up, kind) if gate is None else ops.glu_bwd(dact, gate, up, kind)
    for out, t in zip((act, dup) if gate is None else (act, dgate, dup), made, strict=True):
        assert out is not None
        out.copy_(t)


@define(f"norm_wgrad_(Tensor dy, {_NORM}, Tensor(a!) total, bool add) -> ()", fake=_nothing)
def norm_wgrad_(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    total: Tensor,
    add: bool,
) -> None:
    """total (n, width) = dyᵀ norm(x), or added to it if `add`: the gradient of a weight behind a norm. dy (t, n)."""
    h = normalised(x, mean, rstd, norm_weight, norm_bias, dy.dtype)
    if add:
        ops.add_product_(total, dy.t(), h)
    else:
        total.copy_(torch.mm(dy.t(), h))


@define("linears_input_grad_(Tensor[] dys, Tensor[] weights, Tensor(a!) out) -> ()", fake=_nothing)
def linears_input_grad_(dys: list[Tensor], weights: list[Tensor], out: Tensor) -> None:
    """out (t, width) = Σ dy W: the gradient of the x that linear layers share. dys (t, n), weights (n, width).

    At least one of each. As one kernel, for up to three, the sum is rounded once and written once.
    """
    sum_of_products(dys, weights, out)


def check_kind(kind: str, gated: bool) -> str:
    """The activation's own name. Raises ValueError for a kind that does not go with a gate, or goes only with one."""
    if kind not in FUNCTIONS or (kind in GATED_MLPS) != gated:
        raise ValueError(f"kind={kind!r} {'has no' if gated else 'needs a'} gate")
    return FUNCTIONS[kind]


# --- FLOPs --------------------------------------------------------------------------------------------------


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def product(x: Any, *weights: Any) -> int:
        return sum(2 * x[0] * w[0] * w[1] for w in weights if w is not None)

    @register_flop_formula(torch.ops.pyckpt.norm_qkv_)
    def qkv(x, mean, rstd, nw, nb, wq, wk, wv, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        outs = args[-5:-2]
        return product(x, *(w for w, out in zip((wq, wk, wv), outs, strict=True) if out is not None))

    @register_flop_formula(torch.ops.pyckpt.linear_residual_)
    def residual(x, weight, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return product(x, weight)

    @register_flop_formula(torch.ops.pyckpt.linear_delta_)
    def delta(d, weight, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return product(d, weight)

    @register_flop_formula(torch.ops.pyckpt.norm_mlp_)
    def mlp(x, mean, rstd, nw, nb, wg, bg, wu, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return product(x, wg, wu)

    @register_flop_formula(torch.ops.pyckpt.norm_mlp_bwd_)
    def mlp_bwd(dy, w_down, x, mean, rstd, nw, nb, wg, bg, wu, bu, kind, gate, up, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
        return product(x, w_down) + (product(x, wg, wu) if up is None else 0)

    @register_flop_formula(torch.ops.pyckpt.norm_wgrad_)
    def wgrad(dy, x, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return 2 * dy[0] * dy[1] * x[1]

    @register_flop_formula(torch.ops.pyckpt.linears_input_grad_)
    def dgrad(dys, weights, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return product(dys[0], *weights)


_register_flops()
