"""The MLP's activations: gated (SwiGLU, GeGLU; Shazeer 2020) and plain (GELU, ReLU²; So et al. 2021).

`*_bwd` recomputes the activation beside the gradients, since the down projection's weight gradient needs it
and no save set keeps it. The in-place form overwrites the pre-activations, and needs no further buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype, row_chunks
from pyckpt.ops.direct import ops
from pyckpt.ops.registry import autograd, define

aten = torch.ops.aten

# kind -> the function applied to the gate (or to the only pre-activation)
FUNCTIONS = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def phi_of(x: Tensor, kind: str) -> Tensor:
    """φ of an MLP of this kind, gated or not, by PyTorch's own ops."""
    fn = FUNCTIONS[kind]
    if fn == "silu":
        return torch.nn.functional.silu(x)
    if fn == "relu2":
        return x.clamp_min(0).square_()
    return torch.nn.functional.gelu(x, approximate="tanh" if fn == "gelu_tanh" else "none")


def _dphi(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    fn = FUNCTIONS[kind]
    if fn == "silu":
        return aten.silu_backward(grad, x)
    if fn == "relu2":
        return x.clamp_min(0).mul_(2).mul_(grad)
    return aten.gelu_backward(grad, x, approximate="tanh" if fn == "gelu_tanh" else "none")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# --- gated --------------------------------------------------------------------------------------------------


def _glu_fwd_fake(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return gate.new_empty(gate.shape)


@define("glu_fwd(Tensor gate, Tensor up, str kind) -> Tensor", fake=_glu_fwd_fake)
def glu_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act = φ(gate) * up; gate, up (..., F)."""
    act = gate.new_empty(gate.shape)
    _glu_into(gate, up, kind, act)
    return act


def _glu_into(gate: Tensor, up: Tensor, kind: str, act: Tensor) -> None:
    acc = acc_dtype(gate.dtype)
    g, u, a = _rows(gate), _rows(up), act.view(-1, act.shape[-1])
    for sl in row_chunks(g):
        a[sl] = phi_of(g[sl].to(acc), kind).mul_(u[sl])


def _glu_fwd_inplace_fake(gate: Tensor, up: Tensor, kind: str) -> None:
    return None


@define("glu_fwd_(Tensor(a!) gate, Tensor up, str kind) -> ()", fake=_glu_fwd_inplace_fake)
def glu_fwd_(gate: Tensor, up: Tensor, kind: str) -> None:
    """`glu_fwd` written over gate."""
    _glu_into(gate, up, kind, gate)


def _glu_bwd_fake(dact: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return dact.new_empty(dact.shape), gate.new_empty(gate.shape), up.new_empty(up.shape)


@define("glu_bwd(Tensor dact, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor, Tensor)", fake=_glu_bwd_fake)
def glu_bwd(dact: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(act, dgate, dup) from the gradient of act and the pre-activations."""
    act, dgate, dup = (t.clone(memory_format=torch.contiguous_format) for t in (dact, gate, up))
    glu_bwd_(act, dgate, dup, kind)
    return act, dgate, dup


def _glu_bwd_inplace_fake(dact: Tensor, gate: Tensor, up: Tensor, kind: str) -> None:
    return None


@define("glu_bwd_(Tensor(a!) dact, Tensor(b!) gate, Tensor(c!) up, str kind) -> ()", fake=_glu_bwd_inplace_fake)
def glu_bwd_(dact: Tensor, gate: Tensor, up: Tensor, kind: str) -> None:
    """`glu_bwd` in place: dact becomes act, gate becomes dgate, up becomes dup."""
    acc = acc_dtype(gate.dtype)
    da, g, u = (t.view(-1, t.shape[-1]) for t in (dact, gate, up))
    for sl in row_chunks(g):
        daf, gf, uf = da[sl].to(acc), g[sl].to(acc), u[sl].to(acc)
        phi = phi_of(gf, kind)
        dgate = _dphi(daf * uf, gf, kind)
        act = phi * uf
        u[sl] = phi.mul_(daf)
        g[sl] = dgate
        da[sl] = act


# --- plain --------------------------------------------------------------------------------------------------


def _act_fwd_fake(x: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


@define("act_fwd(Tensor x, str kind) -> Tensor", fake=_act_fwd_fake)
def act_fwd(x: Tensor, kind: str) -> Tensor:
    """act = φ(x); x (..., F)."""
    act = x.new_empty(x.shape)
    _act_into(x, kind, act)
    return act


def _act_into(x: Tensor, kind: str, act: Tensor) -> None:
    acc = acc_dtype(x.dtype)
    rows, out = _rows(x), act.view(-1, act.shape[-1])
    for sl in row_chunks(rows):
        out[sl] = phi_of(rows[sl].to(acc), kind)


def _act_fwd_inplace_fake(x: Tensor, kind: str) -> None:
    return None


@define("act_fwd_(Tensor(a!) x, str kind) -> ()", fake=_act_fwd_inplace_fake)
def act_fwd_(x: Tensor, kind: str) -> None:
    """`act_fwd` in place."""
    _act_into(x, kind, x)


def _act_bwd_fake(dact: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return dact.new_empty(dact.shape), x.new_empty(x.shape)


@define("act_bwd(Tensor dact, Tensor x, str kind) -> (Tensor, Tensor)", fake=_act_bwd_fake)
def act_bwd(dact: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(act, dx) from the gradient of act and the pre-activation."""
    act, dx = (t.clone(memory_format=torch.contiguous_format) for t in (dact, x))
    act_bwd_(act, dx, kind)
    return act, dx


def _act_bwd_inplace_fake(dact: Tensor, x: Tensor, kind: str) -> None:
    return None


@define("act_bwd_(Tensor(a!) dact, Tensor(b!) x, str kind) -> ()", fake=_act_bwd_inplace_fake)
def act_bwd_(dact: Tensor, x: Tensor, kind: str) -> None:
    """`act_bwd` in place: dact becomes act, x becomes dx."""
    acc = acc_dtype(x.dtype)
    da, rows = dact.view(-1, dact.shape[-1]), x.view(-1, x.shape[-1])
    for sl in row_chunks(rows):
        xf = rows[sl].to(acc)
        dx = _dphi(da[sl].to(acc), xf, kind)
        da[sl] = phi_of(xf, kind)
        rows[sl] = dx


# --- autograd -----------------------------------------------------------------------------------------------


def _glu_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _glu_backward(ctx, dact):  # type: ignore[no-untyped-def]
    _, dgate, dup = ops.glu_bwd(dact, *ctx.saved_tensors, ctx.kind)
    return dgate, dup, None


def _act_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _act_backward(ctx, dact):  # type: ignore[no-untyped-def]
    return ops.act_bwd(dact, *ctx.saved_tensors, ctx.kind)[1], None


autograd("glu_fwd", _glu_backward, _glu_setup)
autograd("act_fwd", _act_backward, _act_setup)
