"""Norms, activations and RoPE by the Triton kernels of `pyckpt.triton_kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import activation as _activation
from pyckpt.ops import norm as _norm
from pyckpt.ops import rope as _rope
from pyckpt.ops.registry import implement
from pyckpt.ops.triton_backend import kernels, rounds_badly


def _exact(fn: Callable[..., Any], *tensors: Tensor | None, writes: int = 0) -> Any:
    """fn(*tensors); on float32 copies of those that Triton's interpreter rounds badly.

    The last `writes` tensors are those that fn writes: what it makes of their copies is rounded into them.
    """
    if tensors[0] is not None and tensors[0].device.type != "cpu":
        return fn(*tensors)
    wide = [t.float() if t is not None and rounds_badly(t) else t for t in tensors]
    found = fn(*wide)
    for t, w in list(zip(tensors, wide, strict=True))[len(tensors) - writes :]:
        if t is not None and w is not None and w is not t:
            t.copy_(w)
    return found


# --- norms --------------------------------------------------------------------------------------------------


@implement("rms_norm_fwd", "triton")
def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = _exact(lambda x, w: kernels("norm").forward(x, w, None, eps, centered=False), x, weight)
    return y.to(x.dtype), rstd


@implement("layer_norm_fwd", "triton")
def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _exact(lambda x, w, b: kernels("norm").forward(x, w, b, eps, centered=True), x, weight, bias)
    return y.to(x.dtype), mean, rstd


@implement("add_rms_norm_fwd", "triton")
def add_rms_norm_fwd(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if rounds_badly(x):  # the sum is rounded inside the kernel, which float32 copies cannot imitate
        return _norm.add_rms_norm_fwd(x, residual, weight, eps)
    y, total, _, rstd = kernels("norm").forward(x, weight, None, eps, centered=False, residual=residual)
    return y, total, rstd


@implement("add_layer_norm_fwd", "triton")
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if rounds_badly(x):
        return _norm.add_layer_norm_fwd(x, residual, weight, bias, eps)
    return kernels("norm").forward(x, weight, bias, eps, centered=True, residual=residual)


def _norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    add: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    def run(dy: Tensor, x: Tensor, weight: Tensor | None, dx: Tensor) -> tuple[Tensor, Tensor]:
        return kernels("norm_bwd").backward(dy, x, weight, mean, rstd, dx, add=add, need_dw=need_dw)

    return _exact(run, dy, x, weight, dx, writes=1)


@implement("rms_norm_bwd", "triton")
def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    return dx, _norm_bwd(dy, x, weight, None, rstd, dx, False, need_dw)[0]


@implement("rms_norm_bwd_add_", "triton")
def rms_norm_bwd_add_(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dx: Tensor, need_dw: bool) -> Tensor:
    return _norm_bwd(dy, x, weight, None, rstd, dx, True, need_dw)[0]


@implement("layer_norm_bwd", "triton")
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    return dx, *_norm_bwd(dy, x, weight, mean, rstd, dx, False, need_dw)


@implement("layer_norm_bwd_add_", "triton")
def layer_norm_bwd_add_(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, dx: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor]:
    return _norm_bwd(dy, x, weight, mean, rstd, dx, True, need_dw)


# --- activations --------------------------------------------------------------------------------------------


def _act(gate: Tensor, up: Tensor | None, kind: str, act: Tensor) -> None:
    function = _activation.FUNCTIONS[kind]
    _exact(lambda g, u, a: kernels("activation").forward(g, u, function, a), gate, up, act, writes=1)


def _act_bwd(dact: Tensor, gate: Tensor, up: Tensor | None, kind: str, outs: tuple[Tensor | None, ...]) -> None:
    def run(da: Tensor, g: Tensor, u: Tensor | None, *outs: Tensor | None) -> None:
        kernels("activation").backward(da, g, u, _activation.FUNCTIONS[kind], outs)

    _exact(run, dact, gate, up, *outs, writes=len(outs))


@implement("glu_fwd", "triton")
def glu_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    act = gate.new_empty(gate.shape)
    _act(gate, up, kind, act)
    return act


@implement("glu_fwd_", "triton")
def glu_fwd_(gate: Tensor, up: Tensor, kind: str) -> None:
    _act(gate, up, kind, gate)


@implement("glu_bwd", "triton")
def glu_bwd(dact: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    act, dgate, dup = (t.new_empty(t.shape) for t in (dact, gate, up))
    _act_bwd(dact, gate, up, kind, (act, dgate, dup))
    return act, dgate, dup


@implement("glu_bwd_", "triton")
def glu_bwd_(dact: Tensor, gate: Tensor, up: Tensor, kind: str) -> None:
    _act_bwd(dact, gate, up, kind, (dact, gate, up))


@implement("act_fwd", "triton")
def act_fwd(x: Tensor, kind: str) -> Tensor:
    act = x.new_empty(x.shape)
    _act(x, None, kind, act)
    return act


@implement("act_fwd_", "triton")
def act_fwd_(x: Tensor, kind: str) -> None:
    _act(x, None, kind, x)


@implement("act_bwd", "triton")
def act_bwd(dact: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    act, dx = (t.new_empty(t.shape) for t in (dact, x))
    _act_bwd(dact, x, None, kind, (act, dx, None))
    return act, dx


@implement("act_bwd_", "triton")
def act_bwd_(dact: Tensor, x: Tensor, kind: str) -> None:
    _act_bwd(dact, x, None, kind, (dact, x, None))


# --- RoPE ---------------------------------------------------------------------------------------------------


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool, out: Tensor) -> None:
    shape = (-1, *x.shape[-2:])
    cos, sin = _rope.angle_rows(x, cos, sin)

    def run(x: Tensor, out: Tensor) -> None:
        dense = out.stride(-1) == 1 or out.shape[-1] == 1
        made = out if dense else torch.empty_like(out, memory_format=torch.contiguous_format)
        kernels("rope").rotate(x, cos, sin, inverse, interleaved, made)
        if not dense:
            out.copy_(made)

    _exact(run, x.reshape(shape), out.view(shape), writes=1)


@implement("rope", "triton")
def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> Tensor:
    out = x.new_empty(x.shape)
    _rotate(x, cos, sin, inverse, interleaved, out)
    return out


@implement("rope_", "triton")
def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> None:
    _rotate(x, cos, sin, inverse, interleaved, x)


@implement("rope_qk_", "triton")
def rope_qk_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> None:
    if rounds_badly(q) or q.dtype != k.dtype or not all(t.numel() and t.stride(-1) == 1 for t in (q, k)):
        _rotate(q, cos, sin, inverse, interleaved, q)
        _rotate(k, cos, sin, inverse, interleaved, k)
        return
    rows, k_rows = (t.view(-1, *t.shape[-2:]) for t in (q, k))
    kernels("rope").rotate(rows, *_rope.angle_rows(q, cos, sin), inverse, interleaved, rows, k_rows)
