"""Attention by the Triton kernels of `pyckpt.triton_kernels`; what they cannot take goes to PyTorch's products."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import attention as op
from pyckpt.ops import attention_cudnn as cudnn
from pyckpt.ops.attention_torch import Gradients
from pyckpt.ops.registry import implement
from pyckpt.ops.triton_backend import kernels, rounds_badly

_OPTIONS = 11  # from cu_seqlens_q to top_left; what follows is an op's own
_TILE_OUTPUT = 10  # of a pair of tiles: where o stands among its options


def _served(q: Tensor, v: Tensor) -> bool:
    reason = kernels("attention").unsupported(q.dtype, q.shape[-1], v.shape[-1])
    if reason and q.dtype != torch.float64:
        warnings.warn(f"pyckpt: {reason}; PyTorch's own products are used here, which is slower", stacklevel=3)
    return reason is None


def _float(*tensors: Tensor) -> list[Tensor]:
    return [t.float() for t in tensors]


def _options(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    top_left: bool = False,
) -> Any:
    return kernels("attention").Options(
        window=(window_left, window_right),
        softcap=softcap,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout=dropout,
        seed=seed,
        top_left=top_left,
    )


def _tile_options(
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    q_start: int,
    k_start: int,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    first_sequence: int = 0,
    o: Tensor | None = None,
) -> Any:
    options = _options(None, None, window_left, window_right, softcap, scale, None, alibi_slopes, dropout, seed)
    return dataclasses.replace(options, q_start=q_start, k_start=k_start, first_sequence=first_sequence)


@implement("attention_fwd", "triton")
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if not _served(q, v):
        return op.attention_fwd(q, k, v, *options)
    if rounds_badly(q):
        o, lse = attention_fwd(*_float(q, k, v), *options)
        return o.to(q.dtype), lse
    given = _options(*options)
    causal = cudnn.causal(q, k, v, given)
    if causal is not None:
        return cudnn.forward(q, k, v, given.scale, causal)
    return kernels("attention").forward(q, k, v, given)


@implement("attention_bwd", "triton")
def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *args: Any,
) -> Gradients:
    if not _served(q, v):
        return op.attention_bwd(do, q, k, v, o, lse, dlse, *args)
    options, delta = args[:_OPTIONS], args[_OPTIONS] if len(args) > _OPTIONS else None
    if rounds_badly(q):
        grads = attention_bwd(*_float(do, q, k, v, o), lse, dlse, *options, delta)
        dq, dk, dv = (g.to(q.dtype) for g in grads)
        return dq, dk, dv
    attention, given = kernels("attention"), _options(*options)
    causal = cudnn.causal(q, k, v, given) if dlse is None else None
    if causal is not None:
        return cudnn.backward(do, q, k, v, o, lse, given.scale, causal)
    if delta is None:
        delta = attention.delta(do, o, dlse)
    return attention.backward(do, q, k, v, lse, delta, given)


@implement("attention_delta", "triton")
def attention_delta(do: Tensor, o: Tensor, dlse: Tensor | None) -> Tensor:
    if not _served(o, o):
        return op.attention_delta(do, o, dlse)
    if rounds_badly(o):
        do, o = _float(do, o)
    return kernels("attention").delta(do, o, dlse)


@implement("attention_merge_", "triton")
def attention_merge_(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    if any(t.stride(-1) != 1 for t in (o, lse, part_o, part_lse)) or rounds_badly(o):
        return op.attention_merge_(o, lse, part_o, part_lse)
    if rounds_badly(part_o):
        part_o = part_o.float()
    kernels("attention_merge").merge(o, lse, part_o, part_lse)
    return None


@implement("attention_tile_fwd_", "triton")
def attention_tile_fwd_(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any) -> None:
    if not _served(q, v):
        return op.attention_tile_fwd_(q, k, v, o, lse, *options)
    if rounds_badly(q):
        q, k, v = _float(q, k, v)
    given = _tile_options(*options)
    causal = cudnn.causal(q, k, v, given)
    if causal is not None:
        return cudnn.tile_forward(q, k, v, o, lse, given.scale, causal)
    kernels("attention").forward(q, k, v, given, into=(o, lse))
    return None


@implement("attention_tile_bwd_", "triton")
def attention_tile_bwd_(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *options: Any,
) -> None:
    if not _served(q, v):
        return op.attention_tile_bwd_(do, q, k, v, lse, delta, dq, dk, dv, *options)
    if rounds_badly(q):
        do, q, k, v = _float(do, q, k, v)
    given, o = _tile_options(*options), options[_TILE_OUTPUT] if len(options) > _TILE_OUTPUT else None
    if o is not None:
        causal = cudnn.causal(q, k, v, given)
        if causal is not None:
            return cudnn.tile_backward(do, q, k, v, o, lse, given.scale, causal, (dq, dk, dv))
    kernels("attention").backward(do, q, k, v, lse, delta, given, into=(dq, dk, dv))
    return None
