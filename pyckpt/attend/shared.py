"""The autograd node of attention over the tokens of several processes, as a function of q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyckpt.attend.all_to_all import AllToAllAttend
from pyckpt.attend.dense import Layout
from pyckpt.attend.ring import RingAttend
from pyckpt.compiling import uncompiled


@uncompiled
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    attend: RingAttend | AllToAllAttend,
    layout: Layout,
    seed: int | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """o and lse of this process's tokens: q (B, S, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv), o (B, S, H, Dv) and lse
    (B, H, S); packed (T, H, D) and so on, and (H, T). None for lse unless `with_lse`: an exchange of heads has to send
    it."""
    found: tuple[Tensor, Tensor | None] = _Attention.apply(q, k, v, sinks, attend, layout, seed, with_lse)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        attend: Any,
        layout: Layout,
        seed: int | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        flat = [_flat(layout, t) for t in (q, k, v)]
        o, lse = attend.forward(layout, *flat, seed, sinks)
        lse_of_tokens = attend.by_token(layout, lse).clone() if with_lse else None
        ctx.save_for_backward(*flat, sinks, o, lse)
        ctx.attend, ctx.layout, ctx.seed, ctx.shapes = attend, layout, seed, (q.shape, k.shape, v.shape)
        ctx.set_materialize_grads(False)
        return o.view(*q.shape[:-1], attend.value_dim), lse_of_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, sinks, o, lse = ctx.saved_tensors
        attend, layout = ctx.attend, ctx.layout
        if do is None and dlse is None:
            return (None,) * 8
        do = torch.zeros_like(o) if do is None else _flat(layout, do)
        dlse = None if dlse is None else attend.by_lse(layout, dlse)
        grads = attend.backward(layout, do, q, k, v, o, lse, ctx.seed, None, sinks, dlse)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = attend.sinks_backward(layout, do, o, lse, sinks, dlse)
        return *(g.view(shape) for g, shape in zip(grads, ctx.shapes, strict=True)), dsinks, None, None, None, None


def _flat(layout: Layout, t: Tensor) -> Tensor:
    """(T, heads * dims)."""
    return t.reshape(layout.tokens, -1)
