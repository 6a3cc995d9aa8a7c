"""The fused products by the Triton kernels of `pyckpt.triton_kernels.fused`; what those do not take is composed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import fused as op
from pyckpt.ops.registry import implement
from pyckpt.ops.triton_backend import kernels, rounds_badly


def _served(*tensors: Tensor | None) -> bool:
    """Not float64; nor bfloat16 in Triton's interpreter, where what a kernel rounds inside could not be imitated."""
    return all(t is None or (t.dtype != torch.float64 and not rounds_badly(t)) for t in tensors)


def _unit(t: Tensor | None) -> Any:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _normed(x: Tensor, mean: Tensor | None, rstd: Tensor, norm_weight: Tensor, norm_bias: Tensor | None) -> Any:
    return kernels("fused.matrices").Normed(*map(_unit, (x, mean, rstd, norm_weight, norm_bias)))


def _pair(mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """As the ops give statistics: a mean that is not there is empty."""
    return (rstd.new_empty(0) if mean is None else mean), rstd


@implement("row_statistics", "triton")
def row_statistics(x: Tensor, centered: bool, eps: float) -> tuple[Tensor, Tensor]:
    if not _served(x):
        return op.row_statistics(x, centered, eps)
    return _pair(*kernels("fused.statistics").row_statistics(_unit(x), eps, centered=centered))


@implement("norm_qkv_", "triton")
def norm_qkv_(*args: Any) -> None:
    norm, (wq, wk, wv, bq, bk, bv), finish, (q, k, v, raw_q, raw_k) = args[:5], args[5:11], args[11:18], args[18:]
    if not _served(norm[0], wq) or finish[-1] % 2:
        return op.norm_qkv_(*args)
    kernels("fused.qkv").forward(
        _normed(*norm),
        tuple(map(_unit, (wq, wk, wv))),
        tuple(map(_unit, (bq, bk, bv))),
        _finish(*finish),
        (q, k, v),
        (raw_q, raw_k),
    )
    return None


def _finish(
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    head_dim: int,
) -> Any:
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    return kernels("fused.qkv").Finish(head_dim, _unit(q_norm), _unit(k_norm), eps, cos, sin, interleaved)


@implement("qk_finish_", "triton")
def qk_finish_(raw: Tensor, weight: Tensor, *args: Any) -> None:
    *options, out = args
    if not _served(raw) or options[-1] % 2:
        return op.qk_finish_(raw, weight, *args)
    after = _finish(weight, None, *options)
    kernels("fused.qkv").finish_stored(_unit(raw), after.q_norm, after, out)
    return None


@implement("qk_finish_bwd_", "triton")
def qk_finish_bwd_(d: Tensor, raw: Tensor, weight: Tensor, *args: Any) -> Tensor:
    *options, need_dw = args
    if not _served(d) or options[-1] % 2:
        return op.qk_finish_bwd_(d, raw, weight, *args)
    after = _finish(weight, None, *options)
    return kernels("fused.qk_finish_bwd").backward(d, _unit(raw), after.q_norm, after, need_dw=need_dw)


@implement("linear_residual_", "triton")
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
    if not _served(x, out):
        return op.linear_residual_(x, weight, bias, residual, out, statistics, centered, eps)
    wanted = (centered, eps) if statistics else None
    found = kernels("fused.linear").add_product(*map(_unit, (x, weight, bias, residual)), out, statistics_of=wanted)
    return op.no_statistics(out) if found is None else _pair(*found)


@implement("linear_delta_", "triton")
def linear_delta_(d: Tensor, weight: Tensor, o: Tensor, do: Tensor, delta: Tensor) -> None:
    if not _served(d):
        return op.linear_delta_(d, weight, o, do, delta)
    kernels("fused.linear").product_with_delta(*map(_unit, (d, weight, o)), do, delta)
    return None


def _hidden(w_gate: Tensor | None, b_gate: Tensor | None, w_up: Tensor, b_up: Tensor | None) -> Any:
    return kernels("fused.mlp").Hidden(*map(_unit, (w_up, b_up, w_gate, b_gate)))


@implement("norm_mlp_", "triton")
def norm_mlp_(*args: Any) -> None:
    norm, weights, kind, outs = args[:5], args[5:9], args[9], args[10:]
    function = op.check_kind(kind, weights[0] is not None)
    if not _served(norm[0], weights[2]):
        return op.norm_mlp_(*args)
    kernels("fused.mlp").forward(_normed(*norm), _hidden(*weights), function, *outs)
    return None


@implement("norm_mlp_bwd_", "triton")
def norm_mlp_bwd_(dy: Tensor, w_down: Tensor, *args: Any) -> None:
    norm, weights, kind, (gate, up), outs = args[:5], args[5:9], args[9], args[10:12], args[12:]
    function = op.check_kind(kind, weights[0] is not None)
    if not _served(norm[0], weights[2]):
        return op.norm_mlp_bwd_(dy, w_down, *args)
    kept = None if up is None else (_unit(gate), _unit(up))
    kernels("fused.mlp").backward(_unit(dy), _unit(w_down), _normed(*norm), _hidden(*weights), function, outs, kept)
    return None


@implement("norm_wgrad_", "triton")
def norm_wgrad_(dy: Tensor, *args: Any) -> None:
    *norm, total, add = args
    if not _served(dy, norm[0], total):
        return op.norm_wgrad_(dy, *args)
    kernels("fused.wgrad").weight_gradient(_unit(dy), _normed(*norm), total, add=add)
    return None


@implement("linears_input_grad_", "triton")
def linears_input_grad_(dys: list[Tensor], weights: list[Tensor], out: Tensor) -> None:
    if not _served(*dys) or len(dys) > 3:
        return op.linears_input_grad_(dys, weights, out)
    kernels("fused.dgrad").input_gradient(list(map(_unit, dys)), list(map(_unit, weights)), out)
    return None
