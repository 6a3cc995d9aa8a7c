"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba et al. 2016) over the last dim, with backwards.

Statistics and sums are in float32 (float64 for float64 inputs) and an output is rounded once. Only the rows'
statistics are kept for the backward; weight gradients come back in the accumulation dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype, row_chunks
from pyckpt.ops.direct import ops
from pyckpt.ops.registry import autograd, define


def _output_like(x: Tensor) -> Tensor:
    """For a norm's output: contiguous, and no view, since nobody may write to a view that an op of ours returns."""
    return x.new_empty(x.shape)


def _stat_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=acc_dtype(x.dtype))


def _weight_grad(x: Tensor, wanted: bool) -> Tensor:
    return x.new_zeros(x.shape[-1] if wanted else 0, dtype=acc_dtype(x.dtype))


# --- RMSNorm ------------------------------------------------------------------------------------------------


def _rms_norm_fwd_fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _stat_like(x)


@define("rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)", fake=_rms_norm_fwd_fake)
def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = x * rstd * weight with rstd = (mean(x²) + eps)^-½. x (..., D); gives y (..., D) and rstd (...)."""
    d, acc = x.shape[-1], acc_dtype(x.dtype)
    y, rstd = _output_like(x), _stat_like(x)
    rows, y_rows, r_rows = x.reshape(-1, d), y.view(-1, d), rstd.view(-1)
    w = None if weight is None else weight.to(acc)
    for sl in row_chunks(rows):
        xf = rows[sl].to(acc)
        out = y_rows[sl] if y.dtype == acc else torch.empty(xf.shape, dtype=acc, device=x.device)
        r = reciprocal_rms(xf, eps, out)
        r_rows[sl] = r[:, 0]
        torch.mul(xf, r, out=out)
        if w is not None:
            out.mul_(w)
        if y.dtype != acc:
            y_rows[sl] = out
    return y, rstd


def reciprocal_rms(x: Tensor, eps: float, squares: Tensor | None = None) -> Tensor:
    """RMSNorm's rstd of x (..., D), in the accumulation dtype: (..., 1). `squares`: overwritten, one of x's shape.

    Not by torch.linalg.vector_norm, which adds up one after the other: at D = 65,536 its error is ten times that of
    PyTorch's rms_norm, and hundreds of times where the last dim is not dense.
    """
    x = x.to(acc_dtype(x.dtype))
    squares = torch.empty(x.shape, dtype=x.dtype, device=x.device) if squares is None else squares
    return torch.mul(x, x, out=squares).mean(-1, keepdim=True).add_(eps).rsqrt_()


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dx: Tensor, add: bool, need_dw: bool
) -> Tensor:
    """Write dx (..., D), which may be dy, or add it to what is there; returns dw."""
    d, acc = x.shape[-1], acc_dtype(x.dtype)
    dy, x, dx, rstd = dy.reshape(-1, d), x.reshape(-1, d), dx.view(-1, d), rstd.reshape(-1, 1)
    dw = _weight_grad(x, need_dw)
    w = None if weight is None else weight.to(acc)
    for sl in row_chunks(x):
        dyf, r = dy[sl].to(acc), rstd[sl]
        xhat = x[sl].to(acc) * r
        p = dyf * xhat
        if need_dw:
            dw += p.sum(0)
        dot = (p.sum(-1, keepdim=True) if w is None else torch.mv(p, w).unsqueeze(-1)).div_(d)
        t = dyf.clone() if w is None else dyf * w
        t.addcmul_(xhat, dot, value=-1.0).mul_(r)
        if add:
            dx[sl] += t
        else:
            dx[sl] = t
    return dw


def _rms_norm_bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _weight_grad(x, need_dw)


@define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool need_dw) -> (Tensor, Tensor)",
    fake=_rms_norm_bwd_fake,
)
def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dw: bool) -> tuple[Tensor, Tensor]:
    """dx (..., D) in x's dtype and dw (D,) in the accumulation dtype (empty unless `need_dw`)."""
    dx = x.new_empty(x.shape)
    return dx, rms_norm_backward(dy, x, weight, rstd, dx, False, need_dw)


def _rms_norm_bwd_add_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dx: Tensor, need_dw: bool
) -> Tensor:
    return _weight_grad(x, need_dw)


@define(
    "rms_norm_bwd_add_(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor(a!) dx, bool need_dw) -> Tensor",
    fake=_rms_norm_bwd_add_fake,
)
def rms_norm_bwd_add_(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dx: Tensor, need_dw: bool) -> Tensor:
    """Adds the norm's dx to `dx`, which already holds the residual's gradient. Returns dw."""
    return rms_norm_backward(dy, x, weight, rstd, dx, True, need_dw)


# --- LayerNorm ----------------------------------------------------------------------------------------------


def _layer_norm_fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _stat_like(x), _stat_like(x)


@define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_layer_norm_fwd_fake,
)
def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) * rstd * weight + bias; returns y (..., D), mean (...), rstd (...)."""
    d, acc = x.shape[-1], acc_dtype(x.dtype)
    y, mean, rstd = _output_like(x), _stat_like(x), _stat_like(x)
    rows, y_rows, m_rows, r_rows = x.reshape(-1, d), y.view(-1, d), mean.view(-1), rstd.view(-1)
    w = None if weight is None else weight.to(acc)
    b = None if bias is None else bias.to(acc)
    for sl in row_chunks(rows):
        out, m, r = torch.native_layer_norm(rows[sl].to(acc), [d], w, b, eps)
        y_rows[sl], m_rows[sl], r_rows[sl] = out, m[:, 0], r[:, 0]
    return y, mean, rstd


def _layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    add: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    d, acc = x.shape[-1], acc_dtype(x.dtype)
    dy, x, dx = dy.reshape(-1, d), x.reshape(-1, d), dx.view(-1, d)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    dw, db = _weight_grad(x, need_dw), _weight_grad(x, need_dw)
    w = None if weight is None else weight.to(acc)
    for sl in row_chunks(x):
        dyf, r = dy[sl].to(acc), rstd[sl]
        xhat = (x[sl].to(acc) - mean[sl]) * r
        if need_dw:
            dw += (dyf * xhat).sum(0)
            db += dyf.sum(0)
        t = dyf.clone() if w is None else dyf * w
        dot = (t * xhat).mean(-1, keepdim=True)
        t.sub_(t.mean(-1, keepdim=True)).addcmul_(xhat, dot, value=-1.0).mul_(r)
        if add:
            dx[sl] += t
        else:
            dx[sl] = t
    return dw, db


def _layer_norm_bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _weight_grad(x, need_dw), _weight_grad(x, need_dw)


@define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_dw) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_layer_norm_bwd_fake,
)
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., D) in x's dtype; dw and db (D,) in the accumulation dtype (empty unless `need_dw`)."""
    dx = x.new_empty(x.shape)
    return dx, *_layer_norm_bwd(dy, x, weight, mean, rstd, dx, False, need_dw)


def _layer_norm_bwd_add_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, dx: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor]:
    return _weight_grad(x, need_dw), _weight_grad(x, need_dw)


@define(
    "layer_norm_bwd_add_(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor(a!) dx, "
    "bool need_dw) -> (Tensor, Tensor)",
    fake=_layer_norm_bwd_add_fake,
)
def layer_norm_bwd_add_(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, dx: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """Adds the norm's dx to `dx`, which already holds the residual's gradient. Returns dw and db."""
    return _layer_norm_bwd(dy, x, weight, mean, rstd, dx, True, need_dw)


# --- of a sum -----------------------------------------------------------------------------------------------


def _add_rms_norm_fwd_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _stat_like(x)


@define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_add_rms_norm_fwd_fake,
)
def add_rms_norm_fwd(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, total, rstd): total = x + residual, rounded to x's dtype, and `rms_norm_fwd` of it."""
    total = _sum(x, residual)
    y, rstd = rms_norm_fwd(total, weight, eps)
    return y, total, rstd


def _add_layer_norm_fwd_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _stat_like(x), _stat_like(x)


@define(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_add_layer_norm_fwd_fake,
)
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd): total = x + residual, rounded to x's dtype, and `layer_norm_fwd` of it."""
    total = _sum(x, residual)
    y, mean, rstd = layer_norm_fwd(total, weight, bias, eps)
    return y, total, mean, rstd


def _sum(x: Tensor, residual: Tensor) -> Tensor:
    return torch.add(x, residual, out=x.new_empty(x.shape))


# --- autograd -----------------------------------------------------------------------------------------------


def _rms_norm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_backward(ctx, dy, _drstd):  # type: ignore[no-untyped-def]
    return *_rms_norm_gradients(ctx, dy, None, ctx.needs_input_grad[1]), None


def _rms_norm_gradients(ctx, dy, dtotal, need_dw):  # type: ignore[no-untyped-def]
    """(dx, dw) from the gradient of y, and what reaches x by itself, if anything does."""
    x, weight, rstd = ctx.saved_tensors
    need_dw = weight is not None and need_dw
    if dtotal is None:
        dx, dw = ops.rms_norm_bwd(dy, x, weight, rstd, need_dw)
    else:
        dx = dtotal.clone(memory_format=torch.contiguous_format)
        dw = ops.rms_norm_bwd_add_(dy, x, weight, rstd, dx, need_dw)
    return dx, dw.to(weight.dtype) if need_dw else None


def _layer_norm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])


def _layer_norm_backward(ctx, dy, _dmean, _drstd):  # type: ignore[no-untyped-def]
    return *_layer_norm_gradients(ctx, dy, None, any(ctx.needs_input_grad[1:3])), None


def _layer_norm_gradients(ctx, dy, dtotal, need):  # type: ignore[no-untyped-def]
    """(dx, dw, db) from the gradient of y, and what reaches x by itself, if anything does."""
    x, weight, mean, rstd = ctx.saved_tensors
    if dtotal is None:
        dx, dw, db = ops.layer_norm_bwd(dy, x, weight, mean, rstd, need)
    else:
        dx = dtotal.clone(memory_format=torch.contiguous_format)
        dw, db = ops.layer_norm_bwd_add_(dy, x, weight, mean, rstd, dx, need)
    return (
        dx,
        dw.to(weight.dtype) if need and weight is not None else None,
        db.to(ctx.bias_dtype) if need and ctx.bias_dtype is not None else None,
    )


autograd("rms_norm_fwd", _rms_norm_backward, _rms_norm_setup)
autograd("layer_norm_fwd", _layer_norm_backward, _layer_norm_setup)


def _add_rms_norm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, inputs[2], rstd)


def _add_rms_norm_backward(ctx, dy, dtotal, _drstd):  # type: ignore[no-untyped-def]
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dw = _rms_norm_gradients(ctx, dy, dtotal, ctx.needs_input_grad[2])
    return dx, dx, dw, None


def _add_layer_norm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, bias = inputs[2:4]
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(total, weight, mean, rstd)


def _add_layer_norm_backward(ctx, dy, dtotal, _dmean, _drstd):  # type: ignore[no-untyped-def]
    if dy is None:
        return dtotal, dtotal, None, None, None
    dx, dw, db = _layer_norm_gradients(ctx, dy, dtotal, any(ctx.needs_input_grad[2:4]))
    return dx, dx, dw, db, None


autograd("add_rms_norm_fwd", _add_rms_norm_backward, _add_rms_norm_setup)
autograd("add_layer_norm_fwd", _add_layer_norm_backward, _add_layer_norm_setup)
